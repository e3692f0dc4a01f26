"""A kernel launch as a value, so that what runs on a GPU is what the compile report compiled without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .tile_config import TileConfig


@dataclass(frozen=True)
class Launch:
    """One call of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: number of programs along up to three axes.
        arguments: tensors and numbers, by parameter name.
        constants: compile-time parameters, by name, those of the tile left out.
        tile: the rest of the compile-time parameters, warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tile: TileConfig

    @property
    def constexprs(self) -> dict[str, Any]:
        return {**self.constants, **self.tile.blocks}

    def run(self) -> None:
        self.kernel[self.grid](
            **self.arguments, **self.constexprs, num_warps=self.tile.num_warps, num_stages=self.tile.num_stages
        )


@dataclass(frozen=True)
class Launches:
    """Launches that follow one another on the same stream."""

    launches: tuple[Launch, ...]

    def run(self) -> None:
        for launch in self.launches:
            launch.run()
