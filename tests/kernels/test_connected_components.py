"""``connected_components``: every form against OpenCV's partition, which the reference does not know of."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.foundation import kernel_without, large

from fastsam_kernels import UnsupportedKernelError, connected_components
from fastsam_kernels.triton.tiles import TileConfig, arch_of, architectures, lookup


def canonical(mask: np.ndarray) -> np.ndarray:
    """OpenCV's labels, each renamed to one more than its first pixel."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    names = np.zeros(count, np.int32)
    present, first = np.unique(labels, return_index=True)
    names[present] = first + 1
    names[0] = 0  # no object
    return names[labels]


def draw(seed: int, largest: int = 24) -> np.ndarray:
    """A few masks of one size: noise of every density, which has the most junctions, and smooth shapes."""
    rng = np.random.default_rng(seed)
    count, height, width = rng.integers(1, 4), *rng.integers(1, largest, 2)
    noise = rng.random((count, height, width))
    if rng.random() < 0.3:
        noise = np.stack([cv2.blur(plane, (3, 3)) for plane in noise])
    return noise < rng.choice([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.1])


def spiral(side: int) -> np.ndarray:
    """One component that winds to the middle: the longest way from a pixel to its first."""
    mask = np.zeros((side, side), bool)
    y, x, dy, dx = 0, 0, 0, 1
    low, high = np.array([0, 0]), np.array([side - 1, side - 1])
    mask[0, 0] = True
    while (low <= high).all():
        while low[0] <= y + dy <= high[0] and low[1] <= x + dx <= high[1]:
            y, x = y + dy, x + dx
            mask[y, x] = True
        if (dy, dx) == (0, 1):
            low[0] += 2
        elif (dy, dx) == (1, 0):
            high[1] -= 2
        elif (dy, dx) == (0, -1):
            high[0] -= 2
        else:
            low[1] += 2
        dy, dx = dx, -dy
    return mask


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_opencv(seed: int) -> None:
    masks = draw(seed, largest=14)
    expected = np.stack([canonical(mask) for mask in masks])
    for kernels in ("reference", "torch"):
        labels = connected_components(torch.from_numpy(masks), kernels=kernels)
        assert labels.dtype == torch.int32
        np.testing.assert_array_equal(labels.numpy(), expected, kernels)


@pytest.mark.parametrize("seed", range(1000 if torch.cuda.is_available() else 5))
def test_triton_form(device: torch.device, seed: int) -> None:
    masks = draw(seed, largest=12 if device.type == "cpu" else 300)
    labels = connected_components(torch.from_numpy(masks).to(device), kernels="triton")
    np.testing.assert_array_equal(labels.cpu().numpy(), np.stack([canonical(mask) for mask in masks]))


@pytest.mark.parametrize("mask", [spiral(36), np.tile([True, False], (3, 40)), np.eye(4, 40, 30, dtype=bool)])
@pytest.mark.parametrize("block_w", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_blocks_of_columns(device: torch.device, mask: np.ndarray, block_w: int) -> None:
    """Runs over several blocks; the result does not hang on the tile."""
    from fastsam_kernels.connected_components.triton.kernel import plan

    masks = torch.from_numpy(mask[None]).to(device)
    parents, labels = (torch.empty(masks.shape, dtype=torch.int32, device=device) for _ in range(2))
    tile = replace(lookup("connected_components", arch_of(device), torch.bool), blocks={"BLOCK_W": block_w})
    for launch in plan(masks, parents, labels, tile):
        launch.run()
    np.testing.assert_array_equal(labels[0].cpu().numpy(), canonical(mask))


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
def test_any_strides_and_other_masks_do_not_matter(device: torch.device, kernels: str) -> None:
    masks = torch.from_numpy(np.random.default_rng(0).random((3, 3, 7)) < 0.5).to(device)
    expected = connected_components(masks, kernels=kernels)
    turned = masks.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(connected_components(turned, kernels=kernels), expected)
    assert torch.equal(connected_components(masks[1:2], kernels=kernels), expected[1:2])


@large
def test_offsets_are_64_bit(device: torch.device) -> None:
    """Masks 2^30 bytes apart; without its casts the kernel reads others."""
    from fastsam_kernels.connected_components.triton import kernel

    masks = torch.from_numpy(np.random.default_rng(0).random((3, 4, 5)) < 0.6).to(device)
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(6 * 2**30, dtype=torch.bool, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = storage.as_strided(masks.shape, (2**30, 5, 1), 3 * 2**30)
    far.copy_(masks)
    expected = connected_components(masks, kernels="triton")
    assert torch.equal(connected_components(far, kernels="triton"), expected)
    parents, labels = (torch.empty(masks.shape, dtype=torch.int32, device=device) for _ in range(2))
    launches = kernel.plan(far, parents, labels, lookup("connected_components", arch_of(device), torch.bool))
    mutated = kernel_without(kernel, kernel.place, ".to(tl.int64)")
    broken = kernel_without(kernel, kernel.runs_kernel, ".to(tl.int64)")
    broken.fn.__globals__["place"] = mutated
    replace(launches[0], kernel=broken).run()
    for launch in launches[1:]:
        launch.run()
    assert not torch.equal(labels[2], expected[2])


@pytest.mark.parametrize("width", [1, 12, 31, 33, 64, 65, 200, 3000])
def test_a_pixel_has_one_thread(width: int) -> None:
    """Two would read the pointers that others change, and go on differently: undefined where they meet."""
    from fastsam_kernels.connected_components.triton.kernel import plan

    masks = torch.empty(2, 3, width, dtype=torch.bool, device="meta")
    numbers = torch.empty(masks.shape, dtype=torch.int32, device="meta")
    for arch in architectures():
        for launch in plan(masks, numbers, numbers, lookup("connected_components", arch, torch.bool)):
            assert 32 * launch.tile.num_warps <= launch.tile.blocks["BLOCK_W"]
            assert launch.grid[0] * launch.tile.blocks["BLOCK_W"] >= masks.numel()


@pytest.mark.parametrize("block_w", [1, 16])
def test_a_block_narrower_than_a_warp_is_refused(block_w: int) -> None:
    """Its threads would outnumber its pixels; without a whole warp there would be none to launch."""
    from fastsam_kernels.connected_components.triton.kernel import plan

    masks = torch.empty(1, 3, 40, dtype=torch.bool, device="meta")
    numbers = torch.empty(masks.shape, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=f"BLOCK_W must be at least 32, a column a thread, got {block_w}"):
        plan(masks, numbers, numbers, TileConfig({"BLOCK_W": block_w}, 4, 1))


def test_opcheck(device: torch.device) -> None:
    from fastsam_kernels.connected_components.triton.custom_op import connected_components_triton

    masks = torch.from_numpy(np.random.default_rng(0).random((3, 2, 4)) < 0.5).to(device)
    results = torch.library.opcheck(connected_components_triton, (masks.permute(1, 2, 0),))
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


def test_nothing_and_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsam_kernels.dispatch.device.triton_limitation", lambda device: None)
    for shape in ((0, 3, 4), (2, 0, 4)):
        empty = torch.zeros(shape, dtype=torch.bool)
        assert connected_components(empty, kernels="torch").shape == shape
        assert connected_components(empty, kernels="reference").shape == shape
        with pytest.raises(UnsupportedKernelError, match="connected_components cannot run here: there are no pixels"):
            connected_components(empty, kernels="triton")
    with pytest.raises(ValueError, match=r"masks must be \[N, H, W\] bool, got \[3, 4\] of torch.float32"):
        connected_components(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at most 2147483646 pixels, got 4294967296"):
        connected_components(torch.zeros(1, 2**16, 2**16, dtype=torch.bool, device="meta"))
