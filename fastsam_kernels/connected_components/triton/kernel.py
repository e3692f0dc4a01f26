"""The Triton kernels of ``connected_components``: union-find in three launches.

Each pixel first points to the start of its run within a block of columns; runs that touch across blocks or rows are
then united by atomic minima, after which every pixel follows its pointers to the root. A root is the least pixel of
its component, so the order in which atomics happen does not show. A pointer read late is an older ancestor in the
same component, and the atomic itself says what was there: nothing has to be in step.

Every pixel has one thread: two threads of a pixel may read different pointers, and would no longer agree on how often
to go on. So a block has no more threads than columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton.launch import Launch
from ...triton.tiles import TileConfig

_WARP = 32  # threads


@triton.jit
def greater(a, b):
    return tl.maximum(a, b)


# Masks have all sizes: the compiler is to know nothing about them, or some would be compiled for while serving.
_SIZES = ["height", "width", "blocks"]


@triton.jit(do_not_specialize=[*_SIZES, "stride_n", "stride_h"])
def runs_kernel(
    masks_ptr,  # [N, H, W] bool
    parents_ptr,  # [N, H, W] int32
    height,
    width,
    blocks,  # programs a row
    stride_n,
    stride_h,
    stride_w,
    BLOCK_W: tl.constexpr,
):
    mask, y, x = place(height, blocks, BLOCK_W)
    used = x < width
    p_row = masks_ptr + mask * stride_n + y.to(tl.int64) * stride_h
    inside = tl.load(p_row + x.to(tl.int64) * stride_w, mask=used, other=0) != 0
    before = tl.load(p_row + (x - 1).to(tl.int64) * stride_w, mask=used & (x % BLOCK_W > 0), other=0) != 0
    start = tl.associative_scan(tl.where(inside & ~before, x, -1), 0, greater)
    parents = tl.where(inside, y * width + start, -1)
    tl.store(parents_ptr + mask * height * width + y * width + x, parents, mask=used)


@triton.jit(do_not_specialize=_SIZES)
def unite_kernel(
    parents_ptr,  # [N, H, W] int32
    height,
    width,
    blocks,
    BLOCK_W: tl.constexpr,
):
    mask, y, x = place(height, blocks, BLOCK_W)
    p_parents = parents_ptr + mask * height * width
    own = y * width + x
    has_left = (x > 0) & (x < width)
    has_above = (y > 0) & (x < width)
    inside = tl.load(p_parents + own, mask=x < width, other=-1) >= 0
    left = tl.load(p_parents + own - 1, mask=has_left, other=-1) >= 0
    right = tl.load(p_parents + own + 1, mask=x + 1 < width, other=-1) >= 0
    above = tl.load(p_parents + own - width, mask=has_above, other=-1) >= 0
    above_left = tl.load(p_parents + own - width - 1, mask=has_above & has_left, other=-1) >= 0
    above_right = tl.load(p_parents + own - width + 1, mask=has_above & (x + 1 < width), other=-1) >= 0
    # A neighbour in the same run unites what both touch: only the first of them has to.
    unite(p_parents, own, own - 1, inside & left & (x % BLOCK_W == 0))
    unite(p_parents, own, own - width, inside & above & ~(left & above_left))
    unite(p_parents, own, own - width - 1, inside & above_left & ~above & ~left)
    unite(p_parents, own, own - width + 1, inside & above_right & ~above & ~right)


@triton.jit(do_not_specialize=_SIZES)
def labels_kernel(
    parents_ptr,  # [N, H, W] int32
    labels_ptr,  # [N, H, W] int32
    height,
    width,
    blocks,
    BLOCK_W: tl.constexpr,
):
    mask, y, x = place(height, blocks, BLOCK_W)
    used = x < width
    first = mask * height * width
    own = tl.load(parents_ptr + first + y * width + x, mask=used, other=-1)
    inside = own >= 0
    root = find(parents_ptr + first, tl.maximum(own, 0), inside)
    tl.store(labels_ptr + first + y * width + x, tl.where(inside, root + 1, 0), mask=used)


@triton.jit
def place(height, blocks, BLOCK_W: tl.constexpr):
    """Return the mask (int64), the row and the columns of this program."""
    row = tl.program_id(0) // blocks
    x = (tl.program_id(0) % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    return (row // height).to(tl.int64), row % height, x


@triton.jit
def find(p_parents, node, active):
    """Return the roots above the active nodes."""
    parent = tl.load(p_parents + node, mask=active, other=0, volatile=True)
    climbing = active & (parent != node)
    while tl.max(climbing.to(tl.int32), 0) > 0:
        node = tl.where(climbing, parent, node)
        parent = tl.load(p_parents + node, mask=climbing, other=0, volatile=True)
        climbing = climbing & (parent != node)
    return node


@triton.jit
def unite(p_parents, a, b, active):
    """Join the components of the active pairs of pixels."""
    while tl.max(active.to(tl.int32), 0) > 0:
        a = find(p_parents, a, active)
        b = find(p_parents, b, active)
        high = tl.maximum(a, b)
        low = tl.minimum(a, b)
        active = active & (high != low)
        # Nothing else is read on the strength of it, and a pointer read late is still an ancestor.
        before = tl.atomic_min(p_parents + high, low, mask=active, sem="relaxed")
        active = active & (before != high)  # another had hung it elsewhere: that is to be joined too
        a = low
        b = tl.where(active, before, low)


def plan(masks: Tensor, parents: Tensor, labels: Tensor, tile: TileConfig) -> list[Launch]:
    """Plan the three launches that fill ``labels``; ``parents`` is of its shape. Tensors may be on the meta device.

    Raises:
        ValueError: a tile of fewer columns than a warp has threads, of which two would share a pixel.
    """
    count, height, width = masks.shape
    if tile.blocks["BLOCK_W"] < _WARP:
        raise ValueError(f"BLOCK_W must be at least {_WARP}, a column a thread, got {tile.blocks['BLOCK_W']}")
    block_w = min(tile.blocks["BLOCK_W"], max(_WARP, triton.next_power_of_2(width)))
    warps = min(tile.num_warps, block_w // _WARP)
    blocks = triton.cdiv(width, block_w)
    sizes = {"height": height, "width": width, "blocks": blocks}
    strides = {f"stride_{axis}": stride for axis, stride in zip("nhw", masks.stride(), strict=True)}
    arguments = (
        (runs_kernel, {"masks_ptr": masks, "parents_ptr": parents, **sizes, **strides}),
        (unite_kernel, {"parents_ptr": parents, **sizes}),
        (labels_kernel, {"parents_ptr": parents, "labels_ptr": labels, **sizes}),
    )
    tile = TileConfig({"BLOCK_W": block_w}, warps, tile.num_stages, tile.provisional, tile.provenance)
    return [Launch(kernel, (count * height * blocks,), values, {}, tile) for kernel, values in arguments]
