"""SAM 2's memory attention on packed weights, for several objects of one frame.

Values are the memories themselves, 64 channels wide (:mod:`fastsam_kernels.memory_attention`); the first layer up to
its queries to the memories knows no object and is made once a frame; the keys of a layer are made in one pass from the
memories with their positions. The residual stays in fp32 at least, whatever the dtype of the products.

Throughout: B objects, N tokens of a frame, C channels, S tokens of the memories of all objects, M channels of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam_kernels import memory_attention

from ..modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from .eligibility import look, why_not_now
from .packed_weights import ByDtype, LayerNorm, Linear, pack_composed, pack_wide_norm, without_autocast

Rotations = Callable[[int, torch.device], Tensor]


class Memories(NamedTuple):
    """The memories of B objects, one behind the other: the grids of frames first, then tokens on no grid.

    Attributes:
        values: [S, M], the memories.
        sources: [S, M], the memories with their positions, of which keys are made.
        grids: of each object, how many frames.
        lengths: of each object, how many tokens in all.
    """

    values: Tensor
    sources: Tensor
    grids: tuple[int, ...]
    lengths: tuple[int, ...]


class FrameQueries(NamedTuple):
    """A frame when it begins to ask for memories: [1, N, C] for all objects, or [B, N, C].

    Attributes:
        x: the residual after the first layer's attention to itself.
        queries: of the first layer, rotated.
    """

    x: Tensor
    queries: Tensor


@dataclass(frozen=True)
class PackedLayer:
    """The weights of a layer.

    Attributes:
        norms: before each of its three parts.
        qkv: of the attention to itself: queries, keys, and values that have been through the output projection.
        rotations, cross_rotations: of both attentions: the table of a grid of so many tokens.
        queries: of the attention to memories.
        keys: of memories with their positions.
        out: of attended memories: their projection as values and the output projection.
        mlp: both linear layers.
    """

    norms: tuple[LayerNorm, LayerNorm, LayerNorm]
    qkv: Linear
    rotations: Rotations
    queries: Linear
    keys: Linear
    out: Linear
    mlp: tuple[Linear, Linear]
    cross_rotations: Rotations


@dataclass(frozen=True)
class PackedMemoryAttention:
    """The weights of one generation.

    Attributes:
        layers: in their order.
        norm: the last one.
        adds_positions: a tenth of the frame's positions is added to it.
    """

    layers: tuple[PackedLayer, ...]
    norm: LayerNorm
    adds_positions: bool


def pack_memory_attention(attention: MemoryAttention, generation: int = 0) -> ByDtype[PackedMemoryAttention]:
    """Pack the weights of ``attention``, of which :func:`sam.inference.eligibility.look` has no objection."""
    packed = PackedMemoryAttention(
        layers=tuple(map(_pack_layer, attention.layers)),  # type: ignore[arg-type]
        norm=pack_wide_norm(attention.norm),
        adds_positions=attention.pos_enc_at_input,
    )
    return ByDtype(packed, attention.norm.weight.dtype)


def _pack_layer(layer: MemoryAttentionLayer) -> PackedLayer:
    inner: Any = layer.self_attn
    cross: Any = layer.cross_attn_image
    value = pack_composed(inner.out_proj, inner.v_proj)
    linears = (inner.q_proj, inner.k_proj)
    return PackedLayer(
        norms=(pack_wide_norm(layer.norm1), pack_wide_norm(layer.norm2), pack_wide_norm(layer.norm3)),
        qkv=Linear(
            torch.cat([*(linear.weight for linear in linears), value.weight]),
            torch.cat([*(linear.bias for linear in linears), value.bias]),  # weights of an attention sum to 1
        ),
        rotations=inner._rotations,
        queries=Linear(cross.q_proj.weight, cross.q_proj.bias),
        keys=Linear(cross.k_proj.weight, cross.k_proj.bias),
        out=pack_composed(cross.out_proj, cross.v_proj),
        mlp=(Linear(layer.linear1.weight, layer.linear1.bias), Linear(layer.linear2.weight, layer.linear2.bias)),
        cross_rotations=cross._rotations,
    )


def frame_queries(
    packed: PackedMemoryAttention, features: Tensor, positions: Tensor | None, kernels: str
) -> FrameQueries:
    """Run what of the first layer knows no memory, on features [1 or B, N, C] and their positions."""
    layer, x = packed.layers[0], features.to(packed.norm.weight.dtype)
    with without_autocast(x.device):
        if packed.adds_positions and positions is not None:
            x = torch.add(x, positions, alpha=0.1)
        x = _attend_to_itself(layer, x, kernels)
        return FrameQueries(x, _queries(layer, x))


def learn_from_memories(packed: PackedMemoryAttention, frame: FrameQueries, memories: Memories, kernels: str) -> Tensor:
    """Let a frame learn from the memories of each object; returns [B, N, C] in fp32 at least."""
    x, queries = frame
    values, sources = (tokens.to(queries.dtype) for tokens in (memories.values, memories.sources))
    with without_autocast(x.device):
        for index, layer in enumerate(packed.layers):
            if index:
                x = _attend_to_itself(layer, x, kernels)
                queries = _queries(layer, x)
            keys = _keys(layer, sources, memories, x.shape[1])
            learnt = memory_attention(queries, keys, values, memories.lengths, kernels=kernels)
            x = _mlp(layer, x + layer.out(learnt))
        return packed.norm(x)


def _attend_to_itself(layer: PackedLayer, x: Tensor, kernels: str) -> Tensor:
    objects, tokens, channels = x.shape
    qkv = layer.qkv(layer.norms[0](x).to(layer.qkv.weight.dtype))
    width = (qkv.shape[2] - channels) // 2
    turned = layer.rotations(tokens, x.device)[:, None]
    q, k = _rotate(qkv[..., : 2 * width].unflatten(2, (2, width)), turned).unbind(2)
    lengths = (tokens,) * objects
    attended = memory_attention(q, k.flatten(0, 1), qkv[..., 2 * width :].flatten(0, 1), lengths, kernels=kernels)
    return x + attended


def _queries(layer: PackedLayer, x: Tensor) -> Tensor:
    queries = layer.queries(layer.norms[1](x).to(layer.queries.weight.dtype))
    return _rotate(queries, layer.cross_rotations(x.shape[1], x.device))


def _keys(layer: PackedLayer, sources: Tensor, memories: Memories, tokens: int) -> Tensor:
    """Make the keys of all memories [S, D]: a product, and the rotation of those that are on a grid."""
    keys, turned, start = layer.keys(sources), layer.cross_rotations(tokens, sources.device), 0
    for grids, length in zip(memories.grids, memories.lengths, strict=True):
        on_grid = keys[start : start + grids * tokens]
        rotated = _rotate(on_grid.unflatten(0, (grids, tokens)), turned)
        if keys.dtype.itemsize < 4:  # narrow ones were rotated in a wide copy
            on_grid.copy_(rotated.flatten(0, 1))
        start += length
    return keys


def _rotate(x: Tensor, turned: Tensor) -> Tensor:
    """Rotate pairs of channels [..., D] by complex numbers [..., D / 2], in place where ``x`` is fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turned)
    return wide.to(x.dtype)


def _mlp(layer: PackedLayer, x: Tensor) -> Tensor:
    first, second = layer.mlp
    return x + second(first(layer.norms[2](x).to(first.weight.dtype)).relu_())


# Called by a program itself ----------------------------------------------------------------------------------


def attend(
    attention: MemoryAttention,
    curr: Tensor,
    memory: Tensor,
    curr_pos: Tensor | None,
    memory_pos: Tensor | None,
    num_obj_ptr_tokens: int,
) -> Tensor | None:
    """Compute :meth:`MemoryAttention.forward` fused; None where the official operations shall run."""
    if type(attention) is not MemoryAttention or attention.kernels == "reference" or curr.ndim != 3:
        return None
    inputs = [x for x in (curr, memory, curr_pos, memory_pos) if x is not None]
    if why_not_now(*inputs, part=attention, takes_autocast=True) is not None:
        return None
    tokens, on_grid = curr.shape[0], memory.shape[0] - num_obj_ptr_tokens
    if memory_pos is None or on_grid < tokens or on_grid % tokens or curr.shape[1] != memory.shape[1]:
        return None
    if any(x.device != attention.norm.weight.device for x in inputs) or look(attention).why_not_fused is not None:
        return None
    weights = look(attention).packed(pack_memory_attention, attention)
    narrow = not torch.is_autocast_enabled(curr.device.type)
    if narrow and any(x.dtype != weights.dtype for x in (curr, memory)):
        return None
    features = curr.transpose(0, 1)
    positions = None if curr_pos is None else curr_pos.transpose(0, 1)
    if curr.stride(1) == 0:  # one frame, expanded to its objects
        features, positions = features[:1], None if positions is None else positions[:1]
    objects = memory.shape[1]
    memories = Memories(
        values=memory.transpose(0, 1).flatten(0, 1),
        sources=(memory + memory_pos).transpose(0, 1).flatten(0, 1),
        grids=(on_grid // tokens,) * objects,
        lengths=(memory.shape[0],) * objects,
    )
    packed = weights.now(curr.device)
    frame = frame_queries(packed, features, positions, attention.kernels)
    learnt = learn_from_memories(packed, frame, memories, attention.kernels)
    return (learnt.to(curr.dtype) if narrow else learnt).transpose(0, 1)
