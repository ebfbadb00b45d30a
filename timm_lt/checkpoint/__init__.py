"""The decoupled checkpoint: one folder with one backbone and many small heads (DESIGN section 4).

``config.json`` and ``model.safetensors`` are an ordinary timm checkpoint with the joint classifier.
A block ``timm_lt`` in the config lists the heads; ``heads/*.safetensors`` have their tensors.
"""

from timm_lt.checkpoint.format import BACKGROUND as BACKGROUND
from timm_lt.checkpoint.format import BLOCK as BLOCK
from timm_lt.checkpoint.format import CARD as CARD
from timm_lt.checkpoint.format import CONFIG as CONFIG
from timm_lt.checkpoint.format import GIVEN_DATA as GIVEN_DATA
from timm_lt.checkpoint.format import GIVEN_MODEL as GIVEN_MODEL
from timm_lt.checkpoint.format import METRICS as METRICS
from timm_lt.checkpoint.format import PLOTS as PLOTS
from timm_lt.checkpoint.format import RECIPE as RECIPE
from timm_lt.checkpoint.format import TEXT_LIMIT as TEXT_LIMIT
from timm_lt.checkpoint.format import WEIGHTS as WEIGHTS
from timm_lt.checkpoint.format import CheckpointInfo as CheckpointInfo
from timm_lt.checkpoint.format import HeadEntry as HeadEntry
from timm_lt.checkpoint.format import TimmBase as TimmBase
from timm_lt.checkpoint.format import background_of as background_of
from timm_lt.checkpoint.format import check_head_name as check_head_name
from timm_lt.checkpoint.format import find_info as find_info
from timm_lt.checkpoint.format import is_statistic as is_statistic
from timm_lt.checkpoint.format import parse_text as parse_text
from timm_lt.checkpoint.format import read_checkpoint as read_checkpoint
from timm_lt.checkpoint.format import read_config as read_config
from timm_lt.checkpoint.load import find_entry as find_entry
from timm_lt.checkpoint.load import load_head as load_head
from timm_lt.checkpoint.load import load_heads as load_heads
from timm_lt.checkpoint.load import read_shapes as read_shapes
from timm_lt.checkpoint.save import head_entry as head_entry
from timm_lt.checkpoint.save import save_checkpoint as save_checkpoint
