"""Samplers: how often each class is drawn in an epoch, reproducible from (seed, epoch) alone."""

from timm_lt.samplers.balanced import power_probabilities as power_probabilities
from timm_lt.samplers.base import SAMPLERS as SAMPLERS
from timm_lt.samplers.base import ClassSampler as ClassSampler
from timm_lt.samplers.base import create_sampler as create_sampler
from timm_lt.samplers.base import list_samplers as list_samplers
from timm_lt.samplers.base import register_sampler as register_sampler
