"""The one error of this package."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 12


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


def listing(items: Iterable[str]) -> str:
    """Format ``items`` for a message, the first dozen in full."""
    names = list(items)
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
