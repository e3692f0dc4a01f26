"""The classes that the fused memory attention and memory encoder of SAM 2 know, by place and with their settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..modeling.common import LayerNorm2d
from ..modeling.memory_attention import MemoryAttention, MemoryAttentionLayer, RoPEAttention
from ..modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from ..modeling.position_encoding import PositionEmbeddingSine

Places = Iterator[tuple[str, type[nn.Module]]]
MEMORY = (MemoryAttentionLayer, RoPEAttention, MaskDownSampler, Fuser, CXBlock)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def places_of_attention(attention: MemoryAttention) -> Places:
    """Yield the modules that the fused form replaces, and their classes."""
    for index in range(len(attention.layers)):
        path = f"layers.{index}"
        yield path, MemoryAttentionLayer
        for inner in ("self_attn", "cross_attn_image"):
            yield f"{path}.{inner}", RoPEAttention
            yield from ((f"{path}.{inner}.{name}", nn.Linear) for name in _PROJECTIONS)
        yield from ((f"{path}.norm{number}", nn.LayerNorm) for number in (1, 2, 3))
        yield from ((f"{path}.{name}", nn.Dropout) for name in ("dropout", "dropout1", "dropout2", "dropout3"))
        yield from ((f"{path}.{name}", nn.Linear) for name in ("linear1", "linear2"))
    yield "norm", nn.LayerNorm


def places_of_encoder(encoder: MemoryEncoder) -> Places:
    """Yield the modules that the fused form replaces, and their classes."""
    yield "mask_downsampler", MaskDownSampler
    layers = getattr(encoder.mask_downsampler, "encoder", ())
    kinds = (nn.Conv2d, LayerNorm2d, nn.GELU)
    for index in range(len(layers)):
        yield f"mask_downsampler.encoder.{index}", kinds[index % 3]
    yield "pix_feat_proj", nn.Conv2d
    yield "out_proj", nn.Identity if type(encoder.out_proj) is nn.Identity else nn.Conv2d
    yield from (("fuser", Fuser), ("fuser.proj", nn.Identity), ("position_encoding", PositionEmbeddingSine))
    for index in range(len(getattr(encoder.fuser, "layers", ()))):
        path = f"fuser.layers.{index}"
        yield from ((path, CXBlock), (f"{path}.norm", LayerNorm2d), (f"{path}.drop_path", nn.Identity))
        yield from ((f"{path}.dwconv", nn.Conv2d), (f"{path}.act", nn.GELU))
        yield from ((f"{path}.pwconv{number}", nn.Linear) for number in (1, 2))


def unusual_setting(part: nn.Module, name: str) -> str | None:
    """Return a sentence on the first setting that the fused form does not compute with; None without any.

    The modules of ``part`` are of the classes of their places.
    """
    if any(module.training for module in part.modules()):
        return f"{name} is in training mode"
    if isinstance(part, MemoryEncoder):
        projections = [part.pix_feat_proj, part.out_proj, part.mask_downsampler.encoder[-1]]  # type: ignore[index]
        convs = [conv for conv in projections if type(conv) is nn.Conv2d]
        if any(conv.kernel_size != (1, 1) or conv.bias is None for conv in convs):
            return f"{name} projects by more than single pixels"
        return None
    assert isinstance(part, MemoryAttention)
    if not part.batch_first:
        return f"{name} takes tokens before objects"
    for index, layer in enumerate(part.layers):
        path = f"{name}.layers.{index}"
        adds = (layer.pos_enc_at_attn, layer.pos_enc_at_cross_attn_queries, layer.pos_enc_at_cross_attn_keys)
        if adds != (False, False, True):
            return f"{path} adds positions elsewhere than to the keys of memories"
        if layer.activation is not F.relu:
            return f"{path} has another activation than ReLU"
        attentions = (layer.self_attn, layer.cross_attn_image)
        if any(attention.num_heads != 1 for attention in attentions):  # type: ignore[union-attr]
            return f"{path} has attention of several heads"
        linears = [getattr(attention, projection) for attention in attentions for projection in _PROJECTIONS]
        if any(linear.bias is None for linear in (*linears, layer.linear1, layer.linear2)):
            return f"{path} has a linear layer without bias"
        norms: tuple[Any, ...] = (layer.norm1, layer.norm2, layer.norm3)
        if any(norm.weight is None or norm.bias is None for norm in norms):
            return f"{path} has a norm without weights"
    return None
