"""Losses for long-tailed data. A new one is a class under ``@register_loss("name")``."""

from timm_lt.losses.base import LOSSES as LOSSES
from timm_lt.losses.base import ClassLoss as ClassLoss
from timm_lt.losses.base import Reduction as Reduction
from timm_lt.losses.base import create_loss as create_loss
from timm_lt.losses.base import list_losses as list_losses
from timm_lt.losses.base import register_loss as register_loss
from timm_lt.losses.cross_entropy import BalancedSoftmaxLoss as BalancedSoftmaxLoss
from timm_lt.losses.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from timm_lt.losses.cross_entropy import LabelAwareSmoothingLoss as LabelAwareSmoothingLoss
from timm_lt.losses.cross_entropy import LDAMLoss as LDAMLoss
from timm_lt.losses.cross_entropy import LogitAdjustmentLoss as LogitAdjustmentLoss
from timm_lt.losses.cross_entropy import SeesawLoss as SeesawLoss
from timm_lt.losses.metric import DiscriminativeCentroids as DiscriminativeCentroids
from timm_lt.losses.metric import LiftedStructureLoss as LiftedStructureLoss
from timm_lt.losses.metric import RangeLoss as RangeLoss
from timm_lt.losses.reweighted import ClassBalancedFocalLoss as ClassBalancedFocalLoss
from timm_lt.losses.reweighted import ClassBalancedLoss as ClassBalancedLoss
from timm_lt.losses.reweighted import FocalLoss as FocalLoss
from timm_lt.losses.reweighted import InverseFrequencyLoss as InverseFrequencyLoss
from timm_lt.losses.reweighted import WeightedLoss as WeightedLoss
from timm_lt.losses.scheduled import BilateralLoss as BilateralLoss
from timm_lt.losses.scheduled import DeferredReweightingLoss as DeferredReweightingLoss
