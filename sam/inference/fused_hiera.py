"""SAM 2's image encoder with fused operations in its blocks, and its neck composed with what the mask decoder reads.

On a CPU the tokens of an image lie window by window, so that a block takes a few windows at a time from their first
norm to the end of their MLP, in the cache; pooling halves windows and keeps the order, so that tokens are moved once,
where the windows of the third stage begin. Elsewhere tokens lie in the order of the grid. Nothing is padded. What a
program hooked, patched or replaced in a block is called as officially, and the other blocks stay fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam_kernels import window_attention

from ..modeling import hiera
from ..modeling.common import MLP, uncompiled
from ..modeling.feature_pyramid import FpnNeck, ImageEncoder
from ..modeling.hiera import Hiera, MultiScaleAttention, MultiScaleBlock
from ..modeling.position_encoding import PositionEmbeddingSine
from ..modeling.quantized_linear import QuantizedLinear, check_whole
from ..modeling.weight_cache import packing
from ..system.device_profile import device_profile
from .dense import Linears
from .eligibility import has_no_hooks, is_stock, look, why_not_now
from .token_order import Level, Order

# What the official blocks call by these names of their module.
_FUNCTIONS = {f.__name__: f for f in (hiera.do_pool, hiera.window_partition, hiera.window_unpartition)}
_MAX_CACHED_GRIDS = 4


class Plan(NamedTuple):
    """The parts of an image encoder that are fused.

    Attributes:
        blocks: one per block, False for one that is called as a module.
        trunk: the patches, the positions and the walk through the blocks.
        neck: its convolutions are matrix products, and its positions those of the class.
    """

    blocks: tuple[bool, ...]
    trunk: bool
    neck: bool


def plan(encoder: ImageEncoder) -> Plan:
    """Return what is fused of ``encoder`` as it is now."""
    trunk, neck = encoder.trunk, encoder.neck
    is_trunk = is_stock(trunk, Hiera) and is_stock(trunk.patch_embed, hiera.PatchEmbed) and len(trunk.stage_ends) == 4
    if not is_trunk or not trunk.return_interm_layers:
        return Plan((), False, False)
    is_neck = (
        is_stock(neck, FpnNeck)
        and has_no_hooks(neck)
        and type(neck.position_encoding) is PositionEmbeddingSine
        and len(neck.convs) == 4
        and all(type(conv) is nn.Sequential and len(conv) == 1 and is_product(conv[0]) for conv in neck.convs)
        and (neck.fpn_interp_model, neck.fuse_type) == ("nearest", "sum")
        and set(neck.fpn_top_down_levels) - {3} == {2}
        and encoder.scalp == 1
    )
    return Plan(tuple(map(_is_fused, trunk.blocks)), True, is_neck)


def _plan_of_generation(encoder: ImageEncoder, _: int) -> Plan:
    return plan(encoder)


def _is_fused(block: Any) -> bool:
    if not is_stock(block, MultiScaleBlock) or not has_no_hooks(block):
        return False
    attention, mlp, pool = block.attn, block.mlp, block.pool
    linears = [attention.qkv, attention.proj, *mlp.layers] if isinstance(mlp, MLP) else []
    if block.dim != block.dim_out:
        linears.append(block.proj)
    return (
        type(attention) is MultiScaleAttention
        and len(linears) >= 4
        and {type(linear) for linear in linears[:4]} in ({nn.Linear}, {QuantizedLinear})
        and all(type(linear) is nn.Linear for linear in linears[4:])
        and type(block.norm1) is type(block.norm2) is nn.LayerNorm
        and type(block.drop_path) is nn.Identity
        and type(mlp) is MLP
        and len(mlp.layers) == 2
        and type(mlp.act) is nn.GELU
        and not mlp.sigmoid_output
        and attention.q_pool is pool
        and (pool is None or _pools_two_by_two(pool, block.window_size))
        and (pool is None) == (block.q_stride is None)
    )


def _pools_two_by_two(pool: Any, window: int) -> bool:
    if type(pool) is not nn.MaxPool2d or not window or window % 2:
        return False
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return settings in (((2, 2), (2, 2), 0, 1, False), ([2, 2], [2, 2], 0, 1, False), (2, 2, 0, 1, False))


def is_product(conv: Any) -> bool:
    """Return whether a convolution is a matrix product of each pixel's channels."""
    return (
        is_stock(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.groups, conv.bias is None) == ((1, 1), (1, 1), 1, False)
        and conv.padding in ((0, 0), "valid", "same")
    )


# The trunk ---------------------------------------------------------------------------------------------------


RunBlock = Callable[[Any, Tensor, str], Tensor]


def encode_levels(
    encoder: ImageEncoder, made: Plan, pixels: Tensor, kernels: str, run: RunBlock | None = None
) -> list[Level]:
    """Run the trunk on normalised pixels [B, 3, H, W]; on a CPU, of one image.

    ``run`` stands for :func:`run_grid_block`, compiled: all tokens then lie in the order of the grid.

    Raises:
        ValueError: a side that is no multiple of 32 px.
    """
    trunk: Any = encoder.trunk
    x = trunk.patch_embed.proj(pixels.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
    size = (x.shape[1], x.shape[2])
    x, order = Level.of(x, trunk.window_spec[0]) if run is None else Level(x, None)
    positions = _positions(encoder, size, order)
    level = Level(x.add_(positions) if x.dtype == positions.dtype else x + positions, order)
    levels: list[Level] = []
    for index, (block, is_fused) in enumerate(zip(trunk.blocks, made.blocks, strict=True)):
        # A block writes to its tokens, but not to a stage's result, nor to what a module returned and a hook may keep.
        keeps = index > 0 and (index - 1 in trunk.stage_ends or not made.blocks[index - 1])
        if is_fused and run is not None:
            level = Level(run(block, level.tokens, kernels), None)
        else:
            level = run_block(block, level, kernels, keeps) if is_fused else _call_block(block, level)
        if index in trunk.stage_ends:
            levels.append(level)
    return levels


def _positions(encoder: ImageEncoder, size: tuple[int, int], order: Order | None) -> Tensor:
    """Return the positions of a grid in an order of tokens, kept for the next image."""
    trunk: Any = encoder.trunk
    sources = (trunk.pos_embed, trunk.pos_embed_window)
    cached: dict[Any, Tensor] = encoder.packed("positions", dict, *sources)
    key = (size, order)
    positions = cached.get(key)
    if positions is None:
        with packing(sources):
            positions = trunk._get_pos_embed(size)
            positions = positions if order is None else order.from_grid(positions)
        if len(cached) >= _MAX_CACHED_GRIDS:
            cached.clear()
        cached[key] = positions
    return positions


def _call_block(block: nn.Module, level: Level) -> Level:
    grid = block(level.grid())
    if level.order is None:
        return Level(grid, None)
    order = Order((grid.shape[1], grid.shape[2]), level.order.window)
    return Level(order.from_grid(grid), order)


def run_block(block: Any, level: Level, kernels: str, keeps_input: bool) -> Level:
    """Run a block; its result is in the memory of ``level``, unless ``keeps_input`` or it has another shape."""
    level = level.ordered(block.window_size)
    x, order = level
    changes, pools = block.dim != block.dim_out or keeps_input, block.pool is not None
    after = order.pooled() if order is not None and pools else order
    chunk = device_profile(x.device).mlp_tokens_per_chunk
    if order is None or chunk is None or not block.window_size:
        grid = x if order is None else x.view(1, 1, *x.shape)
        attended, y = attend(block, grid, kernels)
        if not (changes or pools):
            return Level(_add_mlp(block, x.add_(attended.view(x.shape)), kernels), after)
        added = _shortcut(block, grid, y, Linears(kernels)) + attended
        return Level(_add_mlp(block, added if order is None else added.flatten(0, 2), kernels), after)
    out, linears = x if not (changes or pools) else None, Linears(kernels, keeps_order=True)
    for start, stop, window in order.chunks(chunk):
        windows = x[start:stop].view(-1, *window, x.shape[1])
        attended, y = attend(block, windows, kernels, linears)
        if out is None or out is not x:
            attended = _shortcut(block, windows, y, linears) + attended
            if out is None:
                out = attended.new_empty((len(x) // (4 if pools else 1), block.dim_out))
            part = out[start // 4 : stop // 4] if pools else out[start:stop]
            part.copy_(attended.view(part.shape))
        else:
            part = x[start:stop]
            part += attended.view(part.shape)
        part += _mlp(block, part, linears)
    assert out is not None
    return Level(out, after)


def run_grid_block(block: Any, x: Tensor, kernels: str) -> Tensor:
    """Run a block on tokens [B, H, W, C], which stay as they are, in one piece: the form to be compiled."""
    linears = Linears(kernels)
    attended, y = attend(block, x, kernels, linears)
    x = _shortcut(block, x, y, linears) + attended
    return x + _mlp(block, x, linears)


def attend(block: Any, x: Tensor, kernels: str, linears: Linears | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the attention of [B, H, W, C] with its projection, and the normalised tokens for a shortcut."""
    attention, linears = block.attn, linears or Linears(kernels)
    y = None if block.dim == block.dim_out else block.norm1(x)
    qkv = linears.normed(block.norm1, attention.qkv, x) if y is None else linears(attention.qkv, y)
    attended = window_attention(
        qkv,
        num_heads=attention.num_heads,
        window_size=block.window_size,
        qkv_bias=attention.qkv.bias.to(qkv.dtype),
        pool_queries=block.pool is not None,
        kernels=kernels,
    )
    return linears(attention.proj, attended), y


def _shortcut(block: Any, x: Tensor, y: Tensor | None, linears: Linears) -> Tensor:
    if y is None:
        return x
    shortcut = linears(block.proj, y)
    if block.pool is None:
        return shortcut
    shortcut = torch.maximum(shortcut[:, 0::2], shortcut[:, 1::2])
    return torch.maximum(shortcut[:, :, 0::2], shortcut[:, :, 1::2])


def _add_mlp(block: Any, x: Tensor, kernels: str) -> Tensor:
    """Add the MLP of tokens [..., C] to them."""
    tokens = x.view(-1, x.shape[-1])
    linears = Linears(kernels, keeps_order=True)
    for part in tokens.split(device_profile(x.device).mlp_tokens_per_chunk or len(tokens)):
        part += _mlp(block, part, linears)
    return x


def _mlp(block: Any, x: Tensor, linears: Linears) -> Tensor:
    """Return what the MLP adds to tokens [T, C]."""
    first, second = block.mlp.layers
    return linears(second, linears.normed_gelu(block.norm2, first, x, block.mlp.act.approximate))


# The neck ----------------------------------------------------------------------------------------------------


def image_features(
    encoder: nn.Module, finer: Sequence[nn.Module], pixels: Tensor, kernels: str, run: RunBlock | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Encode images for a mask decoder; None where the official calls shall run.

    Args:
        encoder: the image encoder, or what ``torch.compile`` made of it.
        finer: the decoder's convolutions of the finest maps, ``conv_s0`` and ``conv_s1``, or none.
        pixels: normalised, [B, 3, H, W].
        kernels: implementation of the operations.
        run: :func:`run_grid_block`, compiled; None where nothing is.

    Returns:
        the embedding [B, C, h, w], and one high-resolution map per convolution.
    """
    encoder = uncompiled(encoder)
    made = _usable_plan(encoder, pixels, kernels)
    if made is None or not made.neck or not is_stock(encoder, ImageEncoder) or not all(map(is_product, finer)):
        return None
    if why_not_now(pixels, *(p for conv in finer for p in conv.parameters()), takes_autocast=True) is not None:
        return None
    assert isinstance(encoder, ImageEncoder)

    def maps_of(images: Tensor) -> list[Tensor]:
        return _project(encoder, finer, encode_levels(encoder, made, images, kernels, run))

    maps = maps_of(pixels) if run is not None else _per_image(made, pixels, maps_of)
    return maps[0], tuple(maps[1:])


def _project(encoder: ImageEncoder, finer: Sequence[Any], levels: list[Level]) -> list[Tensor]:
    """Return the embedding [B, C, h, w] and the finer maps of the stages of one image, or of a batch."""
    lateral: list[Any] = [conv[0] for conv in reversed(encoder.neck.convs)]  # type: ignore[index]
    maps = [_embedding(lateral, levels)]
    for index, (following, level) in enumerate(zip(finer, levels, strict=False)):
        sources = (following.weight, following.bias, lateral[index].weight, lateral[index].bias)
        composed = encoder.packed(f"finer {index}", partial(_composed, *sources), *sources)
        maps.append(level.project(*composed).permute(0, 3, 1, 2))
    return maps


def _composed(after: Tensor, after_bias: Tensor, before: Tensor, before_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix and the bias of two convolutions of single pixels in a row."""
    wide = torch.promote_types(after.dtype, torch.float32)
    matrix = after.flatten(1).to(wide)
    weight, bias = matrix @ before.flatten(1).to(wide), matrix @ before_bias.to(wide) + after_bias.to(wide)
    return weight.to(before.dtype), bias.to(before.dtype)


def _embedding(lateral: Sequence[Any], levels: list[Level]) -> Tensor:
    """Return the map [B, C, h, w] at stride 16: its stage projected, and the coarser one upsampled."""
    middle, coarse = (levels[i].project(lateral[i].weight.flatten(1), lateral[i].bias) for i in (2, 3))
    coarse = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
    middle = middle.to(torch.promote_types(middle.dtype, torch.float32))
    cells = middle.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    cells += coarse[:, :, None, :, None]
    return middle.permute(0, 3, 1, 2)


def encode(encoder: ImageEncoder, pixels: Tensor) -> dict[str, Any] | None:
    """Compute :meth:`ImageEncoder.forward` fused; None where the official operations shall run."""
    made = _usable_plan(encoder, pixels, encoder.kernels)
    if made is None or not made.neck:
        return None
    lateral: list[Any] = [conv[0] for conv in reversed(encoder.neck.convs)]  # type: ignore[index]

    def maps(image: Tensor) -> list[Tensor]:
        levels = encode_levels(encoder, made, image, encoder.kernels)
        finer = [levels[i].project(lateral[i].weight.flatten(1), lateral[i].bias).permute(0, 3, 1, 2) for i in (0, 1)]
        return [*finer, _embedding(lateral, levels)]

    features = _per_image(made, pixels, maps)
    positions = [encoder.neck.position_encoding(x).to(x.dtype) for x in features]
    return {"vision_features": features[-1], "vision_pos_enc": positions, "backbone_fpn": features}


def _per_image(made: Plan, pixels: Tensor, run: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    """Run images one by one on a CPU, where a batch is no faster, and all at once elsewhere.

    A block that is called as a module sees them all: a hook, or the scale of a quantised input, is of a batch.
    """
    if pixels.device.type != "cpu" or len(pixels) == 1 or not all(made.blocks):
        return run(pixels)
    return [torch.cat(maps) for maps in zip(*(run(image) for image in pixels.split(1)), strict=True)]


def _usable_plan(encoder: nn.Module, pixels: Tensor, kernels: str) -> Plan | None:
    """Return what is fused of ``encoder`` for this call; None where nothing is."""
    if type(encoder) is not ImageEncoder:
        return None
    check_whole(encoder)
    if kernels == "reference" or pixels.ndim != 4:
        return None
    if why_not_now(pixels, part=encoder, takes_autocast=True) is not None:
        return None
    if any(getattr(hiera, name) is not function for name, function in _FUNCTIONS.items()):
        return None
    made = look(encoder).packed(_plan_of_generation, encoder)
    return made if made.trunk else None
