"""Features: what the backbone hands to the classifier, taken once for every image."""

from timm_lt.features.extract import Features as Features
from timm_lt.features.extract import check_features as check_features
from timm_lt.features.extract import extract_features as extract_features
