"""Images in a directory per class."""

from timm_lt.data.folder.source import folder as folder
