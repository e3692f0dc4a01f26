"""What every kernel's tests do: views between guard bands, kernels with a cast taken out."""

from __future__ import annotations

import inspect
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Many GB on a GPU: of the processes that run tests side by side, one runs all of these.
large = pytest.mark.xdist_group("large")
_LARGE_GB = 24.0
_mutants = tempfile.TemporaryDirectory()


def needed_memory(item: pytest.Item) -> float:
    """The gigabytes of free GPU memory that a test needs, by its marks ``large`` and ``gpu_memory``."""
    marked = [mark.args[0] for mark in item.iter_markers("gpu_memory")]
    return max([*marked, _LARGE_GB if large.mark in item.iter_markers() else 0.0])


def skip_without_memory(needed: float, free: int) -> None:
    """Skip a test that needs more gigabytes than the ``free`` bytes of a GPU."""
    if free < needed * 2**30:
        pytest.skip(f"needs {needed:g} GB of free GPU memory, there are {free / 2**30:.1f}")


def guarded(values: Tensor, order: Sequence[int] | None = None, gap: int = 7) -> Tensor:
    """The values in a strided view whose surroundings are NaN: reading a neighbour shows in the result.

    Args:
        values: any tensor of floating point.
        order: axes from the outermost in memory to the innermost; None keeps them.
        gap: elements of NaN beside each row of the innermost axis but two, and before and after everything.
    """
    order = list(range(values.ndim)) if order is None else list(order)
    shape = [values.shape[axis] for axis in order]
    if len(shape) > 1:
        shape[-2] += gap
    storage = values.new_full((gap * 64 + torch.Size(shape).numel() + gap * 64,), torch.nan)
    inner = storage[gap * 64 : -gap * 64].view(shape)
    if len(shape) > 1:
        inner = inner.narrow(-2, 0, values.shape[order[-2]])
    view = inner.permute(*[order.index(axis) for axis in range(values.ndim)])
    view.copy_(values)
    return view


def guarded_output(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A contiguous output inside a larger buffer of a sentinel, and that buffer."""
    count, band = torch.Size(shape).numel(), 4096
    buffer = torch.full((count + 2 * band,), -777.0, dtype=dtype, device=device)
    return buffer[band : band + count].view(*shape), buffer


def assert_bands_untouched(buffer: Tensor, count: int) -> None:
    band = (len(buffer) - count) // 2
    assert (buffer[:band] == -777).all(), "written before the output"
    assert (buffer[-band:] == -777).all(), "written behind the output"


def far_apart(qkv: Tensor, axis: int) -> Tensor:
    """``qkv`` with steps of 2^30 elements along an axis of three, in memory reserved but never touched between them.

    The view starts in the middle: an offset that wraps at 2^32 stays inside, and reads what is no image.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(6 * 2**30, dtype=qkv.dtype, device=qkv.device)
    torch.utils.deterministic.fill_uninitialized_memory = True
    strides = list(qkv.contiguous().stride())
    strides[axis] = 2**30
    view = storage.as_strided(qkv.shape, strides, 3 * 2**30)
    view.copy_(qkv)
    return view


def kernel_without(module: ModuleType, kernel: Any, text: str) -> Any:
    """The same kernel compiled from its source with every occurrence of ``text`` taken out."""
    source = textwrap.dedent(inspect.getsource(kernel.fn))
    assert text in source, f"{text!r} does not occur in the kernel"
    code = source.replace(text, "")
    path = Path(_mutants.name) / f"{kernel.fn.__name__}_{len(os.listdir(_mutants.name))}.py"
    path.write_text(code)  # Triton reads a kernel's source from its file
    scope = dict(vars(module))
    exec(compile(code, path, "exec"), scope)
    return scope[kernel.fn.__name__]
