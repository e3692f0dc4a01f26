"""Tile shapes of the Triton kernels: committed choices, looked up by operation, architecture, dtype and shape class.

``tile_configs/sm_<arch>.json`` is one architecture: its limits, and its tiles as a list of entries that are tried in
order. What it has no entry for it takes from the older architectures whose blocks have no more shared memory, the one
with the most first. A new architecture is one more file. An entry without a run on a GPU behind it says
``"provisional": true``. Nothing tunes when a program runs; ``python -m benchmarks tune`` writes these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..dispatch import is_triton_interpreter

TILE_FOLDER = Path(__file__).parent / "tile_configs"


class ShapeClass(str, Enum):
    """The classes of shapes that an operation has tiles for; each operation has a class of its own."""

    __str__ = str.__str__


class AnyShape(ShapeClass):
    """One tile serves all shapes."""

    ANY = "any"


@dataclass(frozen=True)
class TileConfig:
    """The tile shape and launch options of a kernel.

    Attributes:
        blocks: the kernel's own constants, by their names in its signature.
        num_warps, num_stages: options of the launch.
        provisional: chosen without a run on a GPU.
        provenance: where the choice comes from.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    provisional: bool = True
    provenance: str = ""


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture: limits (CUDA programming guide, technical specifications) and tiles.

    Attributes:
        arch: compute capability, 90 for 9.0.
        shared_memory: bytes that a block may have.
        warps_per_sm, programs_per_sm: limits of a multiprocessor.
        tiles: entries of its file.
    """

    arch: int
    shared_memory: int
    warps_per_sm: int
    programs_per_sm: int
    tiles: tuple[Mapping[str, Any], ...]


@cache
def architectures(folder: Path = TILE_FOLDER) -> dict[int, Architecture]:
    """Return the architectures that ``folder`` has a file for, the oldest first."""
    documents = [json.loads(path.read_text()) for path in folder.glob("sm_*.json")]
    known = [Architecture(**{**document, "tiles": tuple(document["tiles"])}) for document in documents]
    return {one.arch: one for one in sorted(known, key=lambda one: one.arch)}


def arch_of(device: torch.device) -> int:
    """Return the architecture whose tiles a device takes: the newest known one that is not newer.

    The interpreter, on the CPU, takes those of sm_80.

    Raises:
        ValueError: older than any.
    """
    if device.type == "cpu" and is_triton_interpreter():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    return nearest_arch(10 * major + minor, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def nearest_arch(arch: int, shared_memory: int, folder: Path = TILE_FOLDER) -> int:
    """Return the newest known architecture that is not newer than ``arch`` and has no more shared memory.

    Raises:
        ValueError: there is none.
    """
    known = architectures(folder).values()
    fitting = [one.arch for one in known if one.arch <= arch and one.shared_memory <= shared_memory]
    if not fitting:
        raise ValueError(f"no tiles for sm_{arch} with {shared_memory} bytes of shared memory per block")
    return max(fitting)


@cache
def lookup(
    operation: str, arch: int, dtype: torch.dtype, shape: ShapeClass = AnyShape.ANY, folder: Path = TILE_FOLDER
) -> TileConfig:
    """Return the committed choice.

    Args:
        operation: its name, as the entries have it.
        arch: one of :func:`architectures`.
        dtype: dtype of the operands.
        shape: class of shapes of the operation.
        folder: folder of the files.

    Raises:
        KeyError: there is no entry for this; a mistake of ours.
    """
    name = str(dtype).removeprefix("torch.")
    for entry in entries_for(operation, arch, folder):
        if name in entry["dtype"] and shape in entry["shape"]:
            return _config_of(entry)
    raise KeyError(f"no tile of {operation} for sm_{arch}, {name}, shape class {str(shape)!r}")


def entries_for(operation: str, arch: int, folder: Path = TILE_FOLDER) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of an operation that an architecture may take, in the order in which they are tried."""
    known = architectures(folder)
    own = known[arch]
    older = [one for one in known.values() if one.arch < arch and one.shared_memory <= own.shared_memory]
    for one in [own, *sorted(older, key=lambda one: (one.shared_memory, one.arch), reverse=True)]:
        yield from (entry for entry in one.tiles if entry["operation"] == operation)


def _config_of(entry: Mapping[str, Any]) -> TileConfig:
    blocks = dict(entry["tile"])
    return TileConfig(
        num_warps=blocks.pop("num_warps"),
        num_stages=blocks.pop("num_stages"),
        blocks=blocks,
        provisional=entry["provisional"],
        provenance=entry["provenance"],
    )
