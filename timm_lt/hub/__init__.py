"""Publishing on the Hugging Face Hub: a checkpoint folder, or one more head of a repo."""

from timm_lt.hub.commit import Pushed as Pushed
from timm_lt.hub.heads import add_head as add_head
from timm_lt.hub.push import check_push as check_push
from timm_lt.hub.push import push_to_hub as push_to_hub
