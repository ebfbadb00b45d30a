"""Lists of image files with their labels: text, CSV, JSON."""

from timm_lt.data.lists.paths import Paths as Paths
from timm_lt.data.lists.reader import ImageList as ImageList
from timm_lt.data.lists.reader import read_image_list as read_image_list
from timm_lt.data.lists.source import listed as listed
