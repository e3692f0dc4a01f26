"""The order of a prompt's tokens, which a model was trained with."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

T = TypeVar("T")


class PromptLayout(Enum):
    """The tokens of a prompt, in their order.

    ``POINTS_FIRST`` is SAM's, ``BOX_FIRST`` that of SAM 2. A prompt without points and box has no tokens in both.
    """

    POINTS_FIRST = "clicks, then the corners of the box, or a padding point where there is no box"
    BOX_FIRST = "the corners of the box, then clicks, and a padding point at last"

    def arrange(self, clicks: T | None, corners: T | None) -> tuple[list[T], bool]:
        """Return the parts that are given in their order, and whether a padding point follows them."""
        if self is PromptLayout.BOX_FIRST:
            parts = [part for part in (corners, clicks) if part is not None]
            return parts, bool(parts)
        return [part for part in (clicks, corners) if part is not None], clicks is not None and corners is None
