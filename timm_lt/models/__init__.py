"""Models with a chosen head, the ``lt_*`` architectures, their weights, and folding to ship."""

from timm_lt.models import lt_resnet as lt_resnet  # importing it registers the architectures
from timm_lt.models.convert import convert_checkpoint as convert_checkpoint
from timm_lt.models.create import create_model as create_model
from timm_lt.models.fold import FoldReport as FoldReport
from timm_lt.models.fold import write_folded as write_folded
from timm_lt.models.networks import attach_attention as attach_attention
from timm_lt.models.networks import create_bilateral as create_bilateral
from timm_lt.models.repo import list_repo_heads as list_repo_heads
