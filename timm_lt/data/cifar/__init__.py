"""Long-tailed CIFAR: the copies that there are, their order, and the subsets of the papers."""

from timm_lt.data.cifar.source import cifar10_lt as cifar10_lt
from timm_lt.data.cifar.source import cifar100_lt as cifar100_lt
from timm_lt.data.cifar.source import cifar_manifest as cifar_manifest
