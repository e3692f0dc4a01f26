"""Attention to memories: ``sam2.modeling.memory_attention``."""

from ...modeling.memory_attention import MemoryAttention, MemoryAttentionLayer, RoPEAttention
from .sam2_utils import get_activation_fn, get_clones

__all__ = ["MemoryAttention", "MemoryAttentionLayer", "RoPEAttention", "get_activation_fn", "get_clones"]
