"""The model card of a checkpoint, rendered from what its folder holds and nothing else.

So it can be rendered again when a head is added. What is generated stands between comments; a
person may write around them. Names and figures may come from anybody: they are escaped.
"""

from timm_lt.model_card.render import render_card as render_card
from timm_lt.model_card.update import folder_card as folder_card
from timm_lt.model_card.update import merge_cards as merge_cards
from timm_lt.model_card.update import stated_license as stated_license
from timm_lt.model_card.update import update_card as update_card
from timm_lt.model_card.update import write_card as write_card
