"""Data sets that are defined by published lists of images, and what is known of the lists."""

from timm_lt.data.published_lists.check import check_image_list as check_image_list
from timm_lt.data.published_lists.facts import Published as Published
from timm_lt.data.published_lists.facts import PublishedList as PublishedList
from timm_lt.data.published_lists.facts import published as published
from timm_lt.data.published_lists.source import published_splits as published_splits
