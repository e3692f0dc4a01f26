"""Measurements as values: a case, its inputs, and the launch problem that tiles are chosen on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam_kernels.numerics import relative_error
from fastsam_kernels.triton.launch import Launch, Launches
from fastsam_kernels.triton.tiles import TileConfig

from .measure import Form, Work

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """The inputs of a case, ready to run.

    Attributes:
        forms: what is timed, by name; "reference" is the plain formula in the same dtype.
        truth: some rows of the result, in fp64.
        rows: of the result, by which forms are held against ``truth``.
        work: the least that has to be done.
        compile: whether ``torch.compile`` of the form "torch" is timed beside the others.
        here: the forms run in this process, so that their memory can be measured.
        baseline: the form that speed-ups are over.
        plain: the plain formula in the case's dtype on ``rows``, whose error makes the budget; None for the baseline's.
    """

    forms: dict[str, Form]
    truth: Callable[[], Result]
    rows: list[int]
    work: Work
    compile: bool = True
    here: bool = True
    baseline: str = "reference"
    plain: Callable[[], Result] | None = None


@dataclass(frozen=True)
class Case:
    """Something to measure; ``python -m benchmarks`` and ``pytest benchmarks/`` share it.

    Attributes:
        name: operation and size.
        make: inputs for a device and dtype.
        devices, dtypes: where it makes sense.
        runs: of every form, at the least.
        late: long and missed least, so that it comes after the others.
    """

    name: str
    make: Callable[[torch.device, torch.dtype], Problem]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    runs: int = 5
    late: bool = False

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type in self.devices and dtype in self.dtypes


@dataclass(frozen=True)
class TuneProblem:
    """An operation at the size it is tuned for.

    Attributes:
        launch: fills ``out`` with a tile.
        out: the result.
        truth, plain: the formula in fp64 and in the inputs' dtype, on ``rows`` of the result.
        candidates: tiles to try.
        reset: makes ``out`` ready for a launch that joins its result to it; None poisons what was there.
    """

    launch: Callable[[TileConfig], Launch | Launches]
    out: Result
    truth: Callable[[], Result]
    plain: Callable[[], Result]
    rows: list[int]
    candidates: list[TileConfig]
    reset: Callable[[], object] | None = None


def candidates(warps: tuple[int, ...], stages: tuple[int, ...], **blocks: tuple[int, ...]) -> list[TileConfig]:
    """Return every combination of warps, stages and blocks as tiles."""
    return [
        TileConfig(dict(zip(blocks, sizes, strict=True)), num_warps, num_stages)
        for *sizes, num_warps, num_stages in itertools.product(*blocks.values(), warps, stages)
    ]


def parts(result: Result) -> tuple[Tensor, ...]:
    """Return the tensors of a result, usually one."""
    return result if isinstance(result, tuple) else (result,)


def worst_error(result: Result, truth: Result) -> float:
    """Return the relative error of the worst part; infinity when something is not finite."""
    return max(relative_error(part, exact) for part, exact in zip(parts(result), parts(truth), strict=True))


def rows_of(result: Result, rows: list[int]) -> Result:
    return tuple(part[rows] for part in parts(result))


def few_rows(count: int) -> list[int]:
    """Return the first, the middle and the last row: enough to hold a large result against fp64."""
    return sorted({0, count // 2, count - 1})


def draw(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Draw normal numbers, the same every time on a kind of device; nothing on the meta device."""
    if device.type == "meta":
        return meta(*shape, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory, for launches that are only compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")
