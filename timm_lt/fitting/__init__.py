"""Fitting heads on frozen features, with options selected on validation."""

from timm_lt.fitting import closed_form as closed_form
from timm_lt.fitting import few_shot as few_shot
from timm_lt.fitting import gradient as gradient
from timm_lt.fitting.base import AUTO as AUTO
from timm_lt.fitting.base import DEFAULT_HEADS as DEFAULT_HEADS
from timm_lt.fitting.base import FITS as FITS
from timm_lt.fitting.base import Fit as Fit
from timm_lt.fitting.base import FitData as FitData
from timm_lt.fitting.base import create_fit as create_fit
from timm_lt.fitting.base import fit_head as fit_head
from timm_lt.fitting.base import register_fit as register_fit
from timm_lt.fitting.base import take_best as take_best
from timm_lt.fitting.curves import AccuracyCurve as AccuracyCurve
from timm_lt.fitting.curves import head_curves as head_curves
from timm_lt.fitting.curves import tau_curve as tau_curve
