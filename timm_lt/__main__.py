"""``python -m timm_lt COMMAND``."""

import sys

from timm_lt.cli import main

if __name__ == "__main__":
    sys.exit(main())
