"""A kernel launch as a value, so that what runs on a GPU is what the compile report compiled without one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tiles import TileConfig


@dataclass(frozen=True)
class Launch:
    """One call of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: number of programs along up to three axes.
        arguments: tensors and numbers, by parameter name.
        constants: compile-time parameters, by name, those of the tile left out.
        tile: the rest of the compile-time parameters, warps and stages.
        fuse_multiply_add: whether the compiler may leave products unrounded that are added to something.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tile: TileConfig
    fuse_multiply_add: bool = True

    @property
    def constexprs(self) -> dict[str, Any]:
        return {**self.constants, **self.tile.blocks}

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the compiler."""
        tile = self.tile
        return {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": self.fuse_multiply_add,
        }

    def run(self) -> None:
        """Launch on the device of the tensors, on its current stream."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constexprs, **self.options)


@dataclass(frozen=True)
class Launches:
    """Launches that follow one another on the same stream."""

    launches: tuple[Launch, ...]

    def run(self) -> None:
        for launch in self.launches:
            launch.run()


def stream_key(device: torch.device) -> int:
    """Return what tells the current streams of a device apart, for caches of tensors that kernels read.

    Work on another stream may read a tensor before it is filled, or after its memory was given away: what is kept for
    later is kept for the stream that made it.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
