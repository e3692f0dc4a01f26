"""Tile choices: every operation has one for every architecture, and a device finds the right one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.dispatch.operation import OPERATIONS
from fastsam_kernels.hypernetwork_masks.triton.shapes import UpscalingShape
from fastsam_kernels.rel_pos_attention.triton.shapes import AttentionShape
from fastsam_kernels.triton.tiles import (
    TILE_FOLDER,
    AnyShape,
    Architecture,
    ShapeClass,
    TileConfig,
    architectures,
    entries_for,
    lookup,
    nearest_arch,
)
from fastsam_kernels.window_attention.triton.shapes import WindowShape

NAMES = sorted({entry["operation"] for gpu in architectures().values() for entry in gpu.tiles})
SHAPES: dict[str, type[ShapeClass]] = {
    "hypernetwork_masks": UpscalingShape,
    "image_to_token_attention": TokenShape,
    "rel_pos_attention": AttentionShape,
    "token_to_image_attention": TokenShape,
    "two_way_attention": TokenShape,
    "window_attention": WindowShape,
}


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """A folder of six architectures, whatever others there are."""
    for arch in (80, 86, 89, 90, 100, 120):
        shutil.copy(TILE_FOLDER / f"sm_{arch}.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arch", "shared_memory", "expected"),
    [
        (80, 166_912, 80),
        (86, 101_376, 86),
        (87, 166_912, 86),  # Orin has more memory per block than sm_86; tiles of sm_86 fit
        (89, 101_376, 89),
        (90, 232_448, 90),
        (100, 232_448, 100),
        (103, 232_448, 100),
        (120, 101_376, 120),
        (121, 101_376, 120),
        (90, 101_376, 89),  # a share of an H100 that gives a block less
    ],
)
def test_a_device_takes_tiles_that_fit(arch: int, shared_memory: int, expected: int, six: Path) -> None:
    assert nearest_arch(arch, shared_memory, six) == expected


def test_too_old_or_too_small() -> None:
    with pytest.raises(ValueError, match="no tiles for sm_75 with 65536 bytes of shared memory per block"):
        nearest_arch(75, 65536)
    with pytest.raises(ValueError, match="no tiles for sm_90 with 49152 bytes"):
        nearest_arch(90, 49152)


@pytest.mark.parametrize("operation", NAMES)
def test_every_architecture_and_dtype_has_a_tile(operation: str) -> None:
    result = [entry for gpu in architectures().values() for entry in gpu.tiles if entry["operation"] == operation]
    floating = any("float16" in entry["dtype"] for entry in result)
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if floating else ()
    shapes = list(SHAPES.get(operation, AnyShape))
    assert {shape for entry in result for shape in entry["shape"]} == set(shapes), "shapes are those of the enumeration"
    for shape in shapes:
        for arch in architectures():
            for dtype in dtypes:
                tile = lookup(operation, arch, dtype, shape)
                assert tile.num_warps in (1, 2, 4, 8, 16)
                assert tile.provenance


def test_tiles_are_of_operations() -> None:
    """Counting and packing of masks are two operations and one kernel; some have none yet."""
    without = {"memory_attention", "quantize_rows", "int8_linear", "fp8_linear"}
    assert {"mask_postprocess", *OPERATIONS} - {"mask_statistics", "packed_masks", *without} == set(NAMES)


@pytest.mark.parametrize("gpu", architectures().values(), ids=lambda gpu: f"sm_{gpu.arch}")
def test_no_entry_is_dead(gpu: Architecture) -> None:
    """Entries are tried in order: one whose every combination was taken before it would never be chosen."""
    seen: set[tuple[str, str, str]] = set()
    for entry in gpu.tiles:
        combinations = {(entry["operation"], d, s) for d in entry["dtype"] for s in entry["shape"]}
        assert combinations - seen, entry
        seen |= combinations


def test_a_missing_tile_is_named() -> None:
    with pytest.raises(KeyError, match="no tile of hypernetwork_masks for sm_90, float64, shape class 'any'"):
        lookup("hypernetwork_masks", 90, torch.float64)


def test_a_new_gpu_is_one_file(six: Path) -> None:
    """Its own tile where it has one; else that of an older architecture whose blocks have no more shared memory."""
    known = list(architectures(six))
    architectures.cache_clear()
    entry = {
        "operation": "two_way_attention",
        "dtype": ["bfloat16"],
        "shape": [TokenShape.UP_TO_8],
        "tile": {"BLOCK_N": 48, "num_warps": 2, "num_stages": 5},
        "provisional": True,
        "provenance": "a test",
    }
    limits = {"shared_memory": 163 * 1024, "warps_per_sm": 64, "programs_per_sm": 32}
    (six / "sm_130.json").write_text(json.dumps({"arch": 130, **limits, "tiles": [entry]}))
    assert list(architectures(six)) == [*known, 130]

    def of(arch: int, dtype: torch.dtype, operation: str = "two_way_attention") -> TileConfig:
        shape = TokenShape.UP_TO_8 if operation == "two_way_attention" else AnyShape.ANY
        return lookup(operation, arch, dtype, shape, six)

    own = TileConfig({"BLOCK_N": 48}, 2, 5, True, "a test")
    assert of(130, torch.bfloat16) == own
    assert of(130, torch.float16) == of(80, torch.float16) != of(100, torch.float16), "sm_100's do not fit"
    assert of(130, torch.float16, "hypernetwork_masks") == of(80, torch.float16, "hypernetwork_masks")
    assert all(of(arch, torch.bfloat16) != own for arch in known)
    (six / "sm_140.json").write_text(json.dumps({"arch": 140, **limits, "tiles": []}))
    architectures.cache_clear()
    assert of(140, torch.bfloat16) == own, "one that begins without tiles takes those of older ones"
    assert nearest_arch(135, 200 * 1024, six) == 130
    assert nearest_arch(125, 200 * 1024, six) == 120


def test_a_new_gpu_falls_back_in_the_order_of_shared_memory() -> None:
    tried = [entry["tile"] for entry in entries_for("hypernetwork_masks", 90) if AnyShape.ANY in entry["shape"]]
    assert tried[0] == lookup_of(80)
    assert lookup_of(86) in tried[1:]


def lookup_of(arch: int) -> dict[str, int]:
    tile = lookup("hypernetwork_masks", arch, torch.float16)
    return {**tile.blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
