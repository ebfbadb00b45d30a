"""Metrics: accuracy per shot group and class, calibration, shifted priors, intervals, open sets."""

from timm_lt.metrics.intervals import PairedDifference as PairedDifference
from timm_lt.metrics.intervals import confidence_intervals as confidence_intervals
from timm_lt.metrics.intervals import paired_difference as paired_difference
from timm_lt.metrics.intervals import shifted_accuracies as shifted_accuracies
from timm_lt.metrics.intervals import shifted_accuracy as shifted_accuracy
from timm_lt.metrics.open_set import OpenSetMetrics as OpenSetMetrics
from timm_lt.metrics.open_set import OpenSetReport as OpenSetReport
from timm_lt.metrics.open_set import choose_threshold as choose_threshold
from timm_lt.metrics.open_set import open_set_report as open_set_report
from timm_lt.metrics.shot_report import OBJECTIVES as OBJECTIVES
from timm_lt.metrics.shot_report import Objective as Objective
from timm_lt.metrics.shot_report import ShotReport as ShotReport
from timm_lt.metrics.shot_report import compare_per_class as compare_per_class
from timm_lt.metrics.shot_report import objective_field as objective_field
from timm_lt.metrics.shot_report import objective_value as objective_value
from timm_lt.metrics.shot_report import per_class_table as per_class_table
from timm_lt.metrics.shot_report import write_per_class as write_per_class
from timm_lt.metrics.streaming import ShotMetrics as ShotMetrics
from timm_lt.metrics.streaming import calibration_error as calibration_error
from timm_lt.metrics.streaming import evaluate_logits as evaluate_logits
from timm_lt.metrics.streaming import reliability as reliability
from timm_lt.metrics.streaming import shot_accuracy as shot_accuracy
