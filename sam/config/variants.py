"""The table of all variants, of SAM and of SAM 2."""

from __future__ import annotations

from ..checks import require
from .sam1 import VARIANTS, SamConfig
from .sam2 import SAM2_VARIANTS, Sam2Config


def variant_config(variant: str) -> SamConfig | Sam2Config:
    """Return the tables' entry for ``variant``.

    Raises:
        TypeError: a ``variant`` that is no name.
        ValueError: no such variant; the message lists those there are.
    """
    known: dict[str, SamConfig | Sam2Config] = {**VARIANTS, **SAM2_VARIANTS}
    require("variant", variant, str, f"one of {', '.join(known)}")
    try:
        return known[variant]
    except KeyError:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(known)}") from None
