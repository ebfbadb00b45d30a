"""Losses: what a wrong answer costs, depending on how rare the class is.

A new loss is a class in one of these files under ``@register_loss("name")``.
"""

from timm_lt.losses import bilateral as bilateral
from timm_lt.losses import cross_entropy as cross_entropy
from timm_lt.losses import deferred as deferred
from timm_lt.losses import focal as focal
from timm_lt.losses import ldam as ldam
from timm_lt.losses import metric as metric
from timm_lt.losses import prior as prior
from timm_lt.losses import seesaw as seesaw
from timm_lt.losses import smoothing as smoothing
from timm_lt.losses import weighted as weighted
from timm_lt.losses.base import ClassLoss as ClassLoss
from timm_lt.losses.base import Reduction as Reduction
from timm_lt.losses.centroids import DiscriminativeCentroids as DiscriminativeCentroids
from timm_lt.losses.factory import LOSSES as LOSSES
from timm_lt.losses.factory import create_loss as create_loss
from timm_lt.losses.factory import list_losses as list_losses
from timm_lt.losses.factory import register_loss as register_loss
