"""The report of a run: one HTML file that needs nothing beside it, not even a network."""

from timm_lt.html_report.differences import Predictions as Predictions
from timm_lt.html_report.gather import gather_report as gather_report
from timm_lt.html_report.render import render_report as render_report
from timm_lt.html_report.render import write_report as write_report
from timm_lt.html_report.thumbnails import ExampleImages as ExampleImages
from timm_lt.html_report.thumbnails import evaluated_rows as evaluated_rows
