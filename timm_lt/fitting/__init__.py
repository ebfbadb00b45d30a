"""Fitting heads on frozen features, with whatever is tuned selected on validation."""

from timm_lt.fitting import closed_form as closed_form
from timm_lt.fitting import fslwf as fslwf
from timm_lt.fitting import gradient as gradient
from timm_lt.fitting import oltr as oltr
from timm_lt.fitting.base import FITS as FITS
from timm_lt.fitting.base import FitData as FitData
from timm_lt.fitting.base import check_fit_classes as check_fit_classes
from timm_lt.fitting.base import check_fit_options as check_fit_options
from timm_lt.fitting.base import register_fit as register_fit
from timm_lt.fitting.curves import AccuracyCurve as AccuracyCurve
from timm_lt.fitting.curves import head_curves as head_curves
from timm_lt.fitting.curves import tau_curve as tau_curve
from timm_lt.fitting.fit import AUTO as AUTO
from timm_lt.fitting.fit import DEFAULT_HEADS as DEFAULT_HEADS
from timm_lt.fitting.fit import fit_head as fit_head
from timm_lt.fitting.fit import take_best as take_best
