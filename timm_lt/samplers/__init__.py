"""Samplers: how often each class is drawn in an epoch, reproducible from (seed, epoch) alone."""

from timm_lt.samplers.balanced import power_probabilities as power_probabilities
from timm_lt.samplers.base import ClassSampler as ClassSampler
from timm_lt.samplers.bilateral import BilateralSampler as BilateralSampler
from timm_lt.samplers.deferred import DeferredSampler as DeferredSampler
from timm_lt.samplers.factory import SAMPLERS as SAMPLERS
from timm_lt.samplers.factory import check_sampler as check_sampler
from timm_lt.samplers.factory import create_sampler as create_sampler
from timm_lt.samplers.factory import list_samplers as list_samplers
from timm_lt.samplers.factory import register_sampler as register_sampler
from timm_lt.samplers.progressive import (
    ProgressivelyBalancedSampler as ProgressivelyBalancedSampler,
)
from timm_lt.samplers.resampled import OverSampledSampler as OverSampledSampler
from timm_lt.samplers.resampled import UnderSampledSampler as UnderSampledSampler
from timm_lt.samplers.weighted import EffectiveNumberSampler as EffectiveNumberSampler
from timm_lt.samplers.weighted import ReversedSampler as ReversedSampler
