"""Every shipped kernel at its real sizes, as launches on the meta device, for every tile that is committed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastsam_kernels.launch import Launch
from fastsam_kernels.tile_config import lookup, read_entries

from .operations import OPERATIONS


@dataclass(frozen=True)
class CompileCase:
    operation: str
    shape: str
    dtype: torch.dtype
    arch: int
    launch: Launch


def compile_cases(operations: list[str] | None = None, arches: list[int] | None = None) -> Iterator[CompileCase]:
    """A case for each launch, committed tile, architecture and dtype."""
    for operation, module in OPERATIONS.items():
        if operations and operation not in operations:
            continue
        for shape_class, launches in module.LAUNCHES.items():
            for arch, dtype in _combinations(operation, shape_class):
                if arches is None or arch in arches:
                    for shape, launch in launches(dtype, lookup(operation, arch, dtype, shape_class)):
                        yield CompileCase(operation, shape, dtype, arch, launch)


def _combinations(operation: str, shape_class: str) -> list[tuple[int, torch.dtype]]:
    """What the operation's file has tiles for, each once."""
    found = {
        (arch, getattr(torch, dtype)): None
        for entry in read_entries(operation)
        if shape_class in entry["shape"]
        for arch in entry["arch"]
        for dtype in entry["dtype"]
    }
    return list(found)
