"""Publishing on the Hugging Face Hub: a checkpoint folder, one more head of a repo, the card."""

from timm_lt.hub.card import folder_card as folder_card
from timm_lt.hub.card import merge_cards as merge_cards
from timm_lt.hub.card import render_card as render_card
from timm_lt.hub.card import stated_license as stated_license
from timm_lt.hub.card import update_card as update_card
from timm_lt.hub.card import write_card as write_card
from timm_lt.hub.push import Pushed as Pushed
from timm_lt.hub.push import add_head as add_head
from timm_lt.hub.push import check_push as check_push
from timm_lt.hub.push import push_to_hub as push_to_hub
