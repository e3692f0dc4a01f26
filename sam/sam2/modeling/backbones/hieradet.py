"""The trunk of the image encoder: ``sam2.modeling.backbones.hieradet``."""

from ....modeling.hiera import Hiera, MultiScaleAttention, MultiScaleBlock, do_pool
from ..sam2_utils import MLP, DropPath
from .utils import PatchEmbed, window_partition, window_unpartition

__all__ = [
    "MLP",
    "DropPath",
    "Hiera",
    "MultiScaleAttention",
    "MultiScaleBlock",
    "PatchEmbed",
    "do_pool",
    "window_partition",
    "window_unpartition",
]
