"""Reports: tables on the terminal, plots, one HTML file, and the recommended head."""

from timm_lt.report.html import render_report as render_report
from timm_lt.report.html import write_report as write_report
from timm_lt.report.plots import PLOT_FILES as PLOT_FILES
from timm_lt.report.plots import save_count_plot as save_count_plot
from timm_lt.report.plots import save_plots as save_plots
from timm_lt.report.record import ExampleImages as ExampleImages
from timm_lt.report.record import Predictions as Predictions
from timm_lt.report.record import Report as Report
from timm_lt.report.record import evaluated_rows as evaluated_rows
