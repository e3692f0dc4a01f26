"""Tile shapes of the Triton kernels: committed choices, looked up by operation, architecture, dtype and shape class.

The choices are in ``tile_configs/<operation>.json``, a list of entries that are tried in order. An entry without a
run on a GPU behind it says ``"provisional": true``. Nothing tunes when a program runs; ``python -m benchmarks tune``
writes these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .dispatch import is_triton_interpreter

# Bytes of shared memory a block may have, by architecture (CUDA programming guide, technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_FOLDER = Path(__file__).parent / "tile_configs"


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut up.

    Attributes:
        blocks: the kernel's own constants, by their names in its signature.
        num_warps, num_stages: of the launch.
        provisional: chosen without a run on a GPU.
        provenance: where the choice comes from.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    provisional: bool = True
    provenance: str = ""


def arch_of(device: torch.device) -> int:
    """The entry of :data:`SHARED_MEMORY` that stands for a device: the newest known one that is not newer.

    The interpreter, on the CPU, stands for sm_80.

    Raises:
        ValueError: older than any.
    """
    if device.type == "cpu" and is_triton_interpreter():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return nearest_arch(10 * major + minor, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def nearest_arch(arch: int, shared_memory: int) -> int:
    """The newest known architecture that is not newer than ``arch`` and has no more shared memory.

    Raises:
        ValueError: there is none.
    """
    known = [name for name, size in SHARED_MEMORY.items() if name <= arch and size <= shared_memory]
    if not known:
        raise ValueError(f"no tiles for sm_{arch} with {shared_memory} bytes of shared memory a block")
    return max(known)


def lookup(operation: str, arch: int, dtype: torch.dtype, shape: str = "any") -> TileConfig:
    """The committed choice.

    Args:
        operation: its name, that of the file.
        arch: one of :data:`SHARED_MEMORY`.
        dtype: of the operands.
        shape: class of shapes, as the operation names them.

    Raises:
        KeyError: the file has no entry for this; a mistake of ours.
    """
    return _lookup(operation, arch, str(dtype).removeprefix("torch."), shape)


@cache
def _lookup(operation: str, arch: int, dtype: str, shape: str) -> TileConfig:
    for entry in read_entries(operation):
        if arch in entry["arch"] and dtype in entry["dtype"] and shape in entry["shape"]:
            return _config_of(entry)
    raise KeyError(f"no tile of {operation} for sm_{arch}, {dtype}, shape class {shape!r}")


def read_entries(operation: str) -> list[dict[str, Any]]:
    """The entries of an operation's file, as they stand there."""
    return json.loads((_FOLDER / f"{operation}.json").read_text())["tiles"]


def _config_of(entry: Mapping[str, Any]) -> TileConfig:
    blocks = dict(entry["tile"])
    return TileConfig(
        num_warps=blocks.pop("num_warps"),
        num_stages=blocks.pop("num_stages"),
        blocks=blocks,
        provisional=entry["provisional"],
        provenance=entry["provenance"],
    )
