"""The methods of a class as they were written, to notice what a subclass, an instance or a patch has replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class WrittenMethods:
    """Methods of a class, taken down when its module is imported."""

    def __init__(self, kind: type, *names: str) -> None:
        self._functions = {name: getattr(kind, name) for name in names}

    def replaced_in(self, thing: Any) -> str | None:
        """Return the name of the first method that ``thing`` answers otherwise than as written; None without any."""
        kind, own = type(thing), getattr(thing, "__dict__", {})
        for name, function in self._functions.items():
            if name in own or getattr(kind, name, None) is not function:
                return name
        return None


def what_was_replaced(parts: Mapping[str, tuple[WrittenMethods, Any]]) -> str | None:
    """Return a sentence on the first replaced method of the named parts, each with its thing; None without any."""
    for part, (methods, thing) in parts.items():
        if (name := methods.replaced_in(thing)) is not None:
            return f"{name} of the {part} was replaced"
    return None
