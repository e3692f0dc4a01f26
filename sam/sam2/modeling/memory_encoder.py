"""Masks to memories: ``sam2.modeling.memory_encoder``."""

from ...modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from .sam2_utils import DropPath, LayerNorm2d, get_clones

__all__ = ["CXBlock", "DropPath", "Fuser", "LayerNorm2d", "MaskDownSampler", "MemoryEncoder", "get_clones"]
