"""Attention of a tracked frame at 1024 x 1024 pixels: to seven memories and sixteen pointers, and to itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsam_kernels import memory_attention
from fastsam_kernels.memory_attention.reference import reference
from fastsam_kernels.triton.tiles import ShapeClass

from ..case import Case, Problem, TuneProblem, draw
from ..measure import Form, Work

_TOKENS, _WIDTH = 4096, 256
_MEMORIES = 7 * _TOKENS + 4 * 16

# There is no kernel yet.
LAUNCHES: dict[ShapeClass, Callable[..., object]] = {}
TUNING: dict[ShapeClass, Callable[[torch.device, torch.dtype], TuneProblem]] = {}


def _case(objects: int, keys: int, width: int) -> Callable[[torch.device, torch.dtype], Problem]:
    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        queries = draw((objects, _TOKENS, _WIDTH), device, dtype, 1)
        lengths, rows = (keys,) * objects, sorted({0, objects - 1})
        tokens, values = (
            draw((objects * keys, _WIDTH), device, dtype, 2),
            draw((objects * keys, width), device, dtype, 3),
        )

        def form(kernels: str) -> Form:
            return lambda: memory_attention(queries, tokens, values, lengths, kernels=kernels)

        def truth() -> Tensor:
            of_rows = (x.view(objects, keys, -1)[rows].flatten(0, 1).double() for x in (tokens, values))
            return reference(queries[rows].double(), *of_rows, (keys,) * len(rows))

        scores = objects * _TOKENS * keys
        return Problem(
            forms={name: form(name) for name in ("reference", "torch")},
            truth=truth,
            rows=rows,
            work=Work(
                bytes=(queries.numel() + tokens.numel() + values.numel()) * queries.element_size()
                + objects * _TOKENS * width * queries.element_size(),
                flops=2 * scores * (_WIDTH + width),
                scalar_ops=scores,
            ),
            compile=False,
        )

    return make


CASES = [
    Case(f"memory_attention, {name}, {objects} objects", _case(objects, keys, width), devices, late=objects > 1)
    for name, keys, width in (("to memories", _MEMORIES, 64), ("to itself", _TOKENS, _WIDTH))
    for objects, devices in ((1, ("cpu", "cuda")), (4, ("cuda",)))
]
