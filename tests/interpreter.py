"""Triton's interpreter as the tests want it: without work for nothing, and the same on every CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np


def prepare_the_interpreter() -> None:
    """Change the interpreter for every kernel that this process interprets."""
    _leave_out_what_has_no_effect()
    _sum_products_exactly()


def _leave_out_what_has_no_effect() -> None:
    """Save some two fifths of a kernel's time; results are the same."""
    from triton.runtime import interpreter

    # Each integer operation is done again in 64 bits for an assertion that is made in debug mode only.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    # Each call of a function replaces in triton.language what its first call has replaced for good.
    prepared: set[Any] = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(function.fn)
        return function.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


def _sum_products_exactly() -> None:
    """Round a dot once, as no order of summation does.

    NumPy's BLAS sums in an order that is the CPU's: on one with AVX2 alone its scores of 256 channels were seven times
    as wrong, and the errors of kernels were its own. What remains is the kernel's algorithm.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
