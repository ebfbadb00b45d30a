"""Samplers: draw images by class, as a function of (seed, epoch) alone."""

from timm_lt.samplers.balanced import ClassBalancedSampler as ClassBalancedSampler
from timm_lt.samplers.balanced import EffectiveNumberSampler as EffectiveNumberSampler
from timm_lt.samplers.balanced import InstanceBalancedSampler as InstanceBalancedSampler
from timm_lt.samplers.balanced import OverSampledSampler as OverSampledSampler
from timm_lt.samplers.balanced import PowerSampler as PowerSampler
from timm_lt.samplers.balanced import ReversedSampler as ReversedSampler
from timm_lt.samplers.balanced import SquareRootSampler as SquareRootSampler
from timm_lt.samplers.balanced import UnderSampledSampler as UnderSampledSampler
from timm_lt.samplers.balanced import power_probabilities as power_probabilities
from timm_lt.samplers.base import SAMPLERS as SAMPLERS
from timm_lt.samplers.base import ClassSampler as ClassSampler
from timm_lt.samplers.base import check_sampler as check_sampler
from timm_lt.samplers.base import create_sampler as create_sampler
from timm_lt.samplers.base import list_samplers as list_samplers
from timm_lt.samplers.base import register_sampler as register_sampler
from timm_lt.samplers.scheduled import BilateralSampler as BilateralSampler
from timm_lt.samplers.scheduled import DeferredSampler as DeferredSampler
from timm_lt.samplers.scheduled import ProgressivelyBalancedSampler as ProgressivelyBalancedSampler
