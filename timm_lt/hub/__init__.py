"""Publishing on the Hugging Face Hub: a checkpoint folder, one more head of a repo, the card."""

import importlib
from typing import TYPE_CHECKING, Any

from timm_lt.hub.card import write_card as write_card

if TYPE_CHECKING:
    from timm_lt.hub.push import Pushed as Pushed
    from timm_lt.hub.push import add_head as add_head
    from timm_lt.hub.push import check_push as check_push
    from timm_lt.hub.push import push_to_hub as push_to_hub


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Most runs do not push.
    return getattr(importlib.import_module("timm_lt.hub.push"), name)
