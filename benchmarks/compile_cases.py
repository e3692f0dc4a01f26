"""Every shipped kernel at its real sizes, as launches on the meta device, for every tile that is committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastsam_kernels.triton.launch import Launch
from fastsam_kernels.triton.tiles import ShapeClass, architectures, entries_for, lookup

from .operations import OPERATIONS

# Compiled with the tiles of sm_80 to see that it would; no kernel runs there.
AMD = "gfx942"
ARCHES: tuple[int | str, ...] = (*architectures(), AMD)


@dataclass(frozen=True)
class CompileCase:
    operation: str
    shape: str
    dtype: torch.dtype
    arch: int | str
    launch: Launch


def compile_cases(operations: list[str] | None = None, arches: list[int | str] | None = None) -> Iterator[CompileCase]:
    """Return a case for each launch, committed tile, architecture and dtype."""
    for operation, module in OPERATIONS.items():
        if operations and operation not in operations:
            continue
        for shape_class, launches in module.LAUNCHES.items():
            for arch in arches or ARCHES:
                tiles_of = 80 if arch == AMD else int(arch)
                for dtype in _dtypes(operation, shape_class, tiles_of):
                    for shape, launch in launches(dtype, lookup(operation, tiles_of, dtype, shape_class)):
                        yield CompileCase(operation, shape, dtype, arch, launch)


def _dtypes(operation: str, shape_class: ShapeClass, arch: int) -> list[torch.dtype]:
    """Return the dtypes that the operation has tiles for, each once."""
    names = {
        dtype: None
        for entry in entries_for(operation, arch)
        if shape_class in entry["shape"]
        for dtype in entry["dtype"]
    }
    return [getattr(torch, name) for name in names]
