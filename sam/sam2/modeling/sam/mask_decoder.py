"""Tokens to masks: ``sam2.modeling.sam.mask_decoder``."""

from ....modeling.sam2_mask_decoder import Sam2MaskDecoder as MaskDecoder
from ..sam2_utils import MLP, LayerNorm2d

__all__ = ["MLP", "LayerNorm2d", "MaskDecoder"]
