"""Settings of the C library for memory that a model on a CPU frees and soon needs again."""

from __future__ import annotations

import ctypes
import os

import torch

_MAX_ADJUSTMENT = 31 << 20  # bytes; glibc learns from pieces of less than 32 MiB


def keep_freed_memory() -> None:
    """Make malloc keep freed memory, up to 62 MiB per thread, instead of returning it to the system after every mask.

    A click takes and frees a dozen tensors of 1 to 4 MB. If they come fresh from the system each time, it touches some
    4,000 new pages, a sixth of its time. glibc decides by thresholds that grow with the largest piece that it saw
    freed, so one piece that is never touched sets them (mallopt(3), "dynamic mmap threshold"). With thresholds of the
    user's own (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``) or another malloc nothing changes.
    """
    torch.empty(_MAX_ADJUSTMENT, dtype=torch.uint8, device="cpu")  # also while a model is laid out on "meta"


def return_freed_memory() -> None:
    """Return memory that malloc caches to the system, of every thread's arena; do nothing with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
