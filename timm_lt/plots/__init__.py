"""Plots, as PNG: of a run, for its folder and model card, and of a data set."""

from timm_lt.plots.common import COLORS as COLORS
from timm_lt.plots.common import write_figure as write_figure
from timm_lt.plots.counts import save_count_plot as save_count_plot
from timm_lt.plots.run import PLOT_FILES as PLOT_FILES
from timm_lt.plots.run import save_plots as save_plots
