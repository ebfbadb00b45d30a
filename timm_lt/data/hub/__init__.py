"""Image-classification data sets of the Hub, and local parquet and arrow files."""

from timm_lt.data.hub.source import hub as hub
