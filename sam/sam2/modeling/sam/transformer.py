"""Attention between tokens and images: ``sam2.modeling.sam.transformer``."""

from ....modeling.memory_attention import RoPEAttention
from ....modeling.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer
from ..position_encoding import apply_rotary_enc, compute_axial_cis
from ..sam2_utils import MLP

__all__ = [
    "MLP",
    "Attention",
    "RoPEAttention",
    "TwoWayAttentionBlock",
    "TwoWayTransformer",
    "apply_rotary_enc",
    "compute_axial_cis",
]
