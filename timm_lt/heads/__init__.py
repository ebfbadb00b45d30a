"""Classifier heads: drop-in replacements of a model's linear classifier (DESIGN section 3).

A new head is a class in one of these files under ``@register_head("name")`` plus, if it needs one,
a fit in ``timm_lt/fitting``.
"""

from timm_lt.heads.attach import NoClassifierError as NoClassifierError
from timm_lt.heads.attach import as_joint as as_joint
from timm_lt.heads.attach import classifier_name as classifier_name
from timm_lt.heads.attach import find_classifiers as find_classifiers
from timm_lt.heads.attach import fold_head as fold_head
from timm_lt.heads.attach import get_head as get_head
from timm_lt.heads.attach import get_heads as get_heads
from timm_lt.heads.attach import head_statistics as head_statistics
from timm_lt.heads.attach import set_head as set_head
from timm_lt.heads.base import HEADS as HEADS
from timm_lt.heads.base import Head as Head
from timm_lt.heads.base import as_linear as as_linear
from timm_lt.heads.base import check_head_options as check_head_options
from timm_lt.heads.base import create_head as create_head
from timm_lt.heads.base import head_option_names as head_option_names
from timm_lt.heads.base import list_heads as list_heads
from timm_lt.heads.base import register_head as register_head
from timm_lt.heads.linear import CRTHead as CRTHead
from timm_lt.heads.linear import LinearHead as LinearHead
from timm_lt.heads.linear import LogitAdjustedHead as LogitAdjustedHead
from timm_lt.heads.linear import LWSHead as LWSHead
from timm_lt.heads.linear import TauNormHead as TauNormHead
from timm_lt.heads.linear import limit_norms as limit_norms
from timm_lt.heads.linear import log_prior as log_prior
from timm_lt.heads.linear import nonzero_norm as nonzero_norm
from timm_lt.heads.linear import seeded_linear as seeded_linear
from timm_lt.heads.metric import CosineHead as CosineHead
from timm_lt.heads.metric import FSLwFHead as FSLwFHead
from timm_lt.heads.metric import NCMHead as NCMHead
from timm_lt.heads.metric import OLTRHead as OLTRHead
