"""Make Triton's interpreter right in bf16, for the tests.

It keeps bf16 as the bit patterns, truncates where a GPU rounds to nearest even, and multiplies the patterns as
integers in a dot. Here casts round as ``cvt.rn`` does, dots widen their operands, which is exact, and what would still
calculate with bit patterns says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

_NAN = 0x7FC0


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 values of bf16 bit patterns; every bf16 is one."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16 bit patterns, to nearest and ties to even; NaN becomes the quiet NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    with np.errstate(over="ignore"):  # of the patterns of NaN, which are replaced
        rounded = (bits + np.uint32(0x7FFF) + odd) >> 16
    return np.where(np.isnan(values), _NAN, rounded).astype(np.uint16)


@contextmanager
def bf16_in_the_interpreter() -> Iterator[None]:
    """Patch the interpreter until the end of the block."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    unary, binary = InterpreterBuilder.unary_op, InterpreterBuilder.binary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        values = widen(source.data) if before == tl.bfloat16 else source.data.astype(np.float32)
        data = narrow(values) if after == tl.bfloat16 else values.astype(interpreter._get_np_dtype(after))
        return TensorHandle(data, after)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, *rest)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return unary(self, _calculable(x), op)

    def binary_op(self: Any, x: Any, y: Any, op: Any) -> Any:
        return binary(self, _calculable(x), _calculable(y), op)

    def _calculable(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            raise NotImplementedError("the interpreter has bf16 as bit patterns: widen to fp32 before calculating")
        return x

    with pytest.MonkeyPatch.context() as patch:
        for method in (cast_impl, create_dot, unary_op, binary_op):
            patch.setattr(InterpreterBuilder, method.__name__, method)
        yield
