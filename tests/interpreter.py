"""Triton's interpreter without the work that it does for nothing, some two fifths of a kernel's time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def spare_the_interpreter() -> None:
    """Leave out of every kernel that this process interprets what has no effect on its results."""
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
