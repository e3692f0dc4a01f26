"""The Triton form of ``connected_components``: union-find in three launches, none of which waits for the host.

Every pixel starts as its own root. It is joined with those of its neighbours above and to the left that the others do
not reach anyway, by an atomic minimum on the larger of two roots; a join that lost a race goes on from what it found.
Links only ever point to smaller indices, so whatever the order, the root is the component's smallest pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from ..tile_config import TileConfig, arch_of, lookup


@triton.jit
def _root(labels_ptr, pixel, active):
    """Follow the links of each active pixel to its root."""
    parent = tl.load(labels_ptr + pixel, mask=active, other=0) - 1
    parent = tl.where(active, parent, pixel)
    while tl.max((parent != pixel).to(tl.int32), 0) > 0:
        pixel = parent
        parent = tl.where(active, tl.load(labels_ptr + pixel, mask=active, other=0) - 1, pixel)
    return pixel


@triton.jit
def _join(labels_ptr, first, second, active):
    """Unite the components of pairs of pixels."""
    first = tl.where(active, first, 0)
    second = tl.where(active, second, 0)
    while tl.max(active.to(tl.int32), 0) > 0:
        first = _root(labels_ptr, first, active)
        second = _root(labels_ptr, second, active)
        low = tl.minimum(first, second)
        high = tl.maximum(first, second)
        active = active & (low != high)
        found = tl.atomic_min(labels_ptr + high, low + 1, mask=active) - 1
        active = active & (found != high)  # somebody linked it before: join with what it was linked to
        first = tl.where(active, found, low)
        second = low


@triton.jit
def connected_components_kernel(
    masks_ptr,  # [N, height, width] uint8, any strides
    labels_ptr,  # [N, height, width] int32
    height,
    width,
    blocks,  # programs a mask
    stride_n,  # of masks, in elements
    stride_h,
    stride_w,
    STEP: tl.constexpr,  # 0 every pixel its own root, 1 join neighbours, 2 every pixel names its root
    BLOCK: tl.constexpr,
):
    mask = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    used = pixel < height * width
    y = pixel // width
    x = pixel % width
    p_labels = labels_ptr + mask * height * width
    if STEP == 0:
        p_mask = masks_ptr + mask * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        inside = tl.load(p_mask, mask=used, other=0) != 0
        tl.store(p_labels + pixel, tl.where(inside, pixel + 1, 0), mask=used)
    else:
        inside = tl.load(p_labels + pixel, mask=used, other=0) != 0
        if STEP == 1:
            row = inside & (y > 0)
            above = row & (tl.load(p_labels + pixel - width, mask=row, other=0) != 0)
            beside = inside & (x > 0)
            left = beside & (tl.load(p_labels + pixel - 1, mask=beside, other=0) != 0)
            corner = row & (x > 0)
            above_left = corner & (tl.load(p_labels + pixel - width - 1, mask=corner, other=0) != 0)
            corner = row & (x < width - 1)
            above_right = corner & (tl.load(p_labels + pixel - width + 1, mask=corner, other=0) != 0)
            # The pixel above touches all the others; the left one touches the one above it.
            neighbour = tl.where(above, pixel - width, tl.where(left, pixel - 1, pixel - width - 1))
            _join(p_labels, pixel, neighbour, above | left | above_left)
            _join(p_labels, pixel, pixel - width + 1, above_right & ~above)
        else:
            root = _root(p_labels, pixel, inside)
            tl.store(p_labels + pixel, root + 1, mask=inside)


def plan(masks: Tensor, labels: Tensor, tile: TileConfig) -> list[Launch]:
    """The three launches that fill ``labels`` [N, H, W]; tensors may be on the meta device."""
    count, height, width = masks.shape
    blocks = triton.cdiv(height * width, tile.blocks["BLOCK"])
    return [
        Launch(
            kernel=connected_components_kernel,
            grid=(count * blocks,),
            arguments={
                "masks_ptr": masks.view(torch.uint8),
                "labels_ptr": labels,
                "height": height,
                "width": width,
                "blocks": blocks,
                "stride_n": masks.stride(0),
                "stride_h": masks.stride(1),
                "stride_w": masks.stride(2),
            },
            constants={"STEP": step},
            tile=tile,
        )
        for step in range(3)
    ]


@torch.library.custom_op("fastsam::connected_components", mutates_args=())
def connected_components_triton(masks: Tensor) -> Tensor:
    """The registered operation; see :func:`fastsam_kernels.connected_components`."""
    labels = torch.empty(masks.shape, dtype=torch.int32, device=masks.device)
    if masks.numel() > 0:
        tile = lookup("connected_components", arch_of(masks.device), torch.bool)
        for launch in plan(masks, labels, tile):
            launch.run()
    return labels


@connected_components_triton.register_fake
def _(masks: Tensor) -> Tensor:
    return torch.empty(masks.shape, dtype=torch.int32, device=masks.device)
