"""The main job: train a backbone on long-tailed data, fit every head on it, and compare them.

Run it with ``accelerate launch train_lt.py [RECIPE] [--option value ...]``, or with plain
``python``; ``--help`` explains every option.
"""

import sys

from timm_lt.run import main

if __name__ == "__main__":
    sys.exit(main())
