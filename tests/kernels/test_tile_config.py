"""Tile choices: every operation has one for every architecture, and a device finds the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastsam_kernels
from fastsam_kernels.tile_config import SHARED_MEMORY, lookup, nearest_arch, read_entries

OPERATIONS = sorted(path.stem for path in (Path(fastsam_kernels.__file__).parent / "tile_configs").glob("*.json"))


@pytest.mark.parametrize(
    ("arch", "shared_memory", "expected"),
    [
        (80, 166_912, 80),
        (86, 101_376, 86),
        (87, 166_912, 86),  # Orin has more memory a block than sm_86; tiles of sm_86 fit
        (89, 101_376, 89),
        (90, 232_448, 90),
        (100, 232_448, 100),
        (103, 232_448, 100),
        (120, 101_376, 120),
        (121, 101_376, 120),
        (90, 101_376, 89),  # a share of an H100 that gives a block less
    ],
)
def test_a_device_takes_tiles_that_fit(arch: int, shared_memory: int, expected: int) -> None:
    assert nearest_arch(arch, shared_memory) == expected


def test_too_old_or_too_small() -> None:
    with pytest.raises(ValueError, match="no tiles for sm_75 with 65536 bytes of shared memory a block"):
        nearest_arch(75, 65536)
    with pytest.raises(ValueError, match="no tiles for sm_90 with 49152 bytes"):
        nearest_arch(90, 49152)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_architecture_and_dtype_has_a_tile(operation: str) -> None:
    shapes = {shape for entry in read_entries(operation) for shape in entry["shape"]}
    floating = any("float16" in entry["dtype"] for entry in read_entries(operation))
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if floating else ()
    for shape in shapes:
        for arch in SHARED_MEMORY:
            for dtype in dtypes:
                tile = lookup(operation, arch, dtype, shape)
                assert tile.num_warps in (1, 2, 4, 8, 16)
                assert tile.provenance
    assert shapes


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_entry_is_dead(operation: str) -> None:
    """Entries are tried in order: one whose every combination was taken before it would never be chosen."""
    seen: set[tuple[int, str, str]] = set()
    for entry in read_entries(operation):
        combinations = {(a, d, s) for a in entry["arch"] for d in entry["dtype"] for s in entry["shape"]}
        assert combinations - seen, entry
        seen |= combinations


def test_a_missing_tile_is_named() -> None:
    with pytest.raises(KeyError, match="no tile of hypernetwork_masks for sm_90, float64, shape class 'any'"):
        lookup("hypernetwork_masks", 90, torch.float64)
