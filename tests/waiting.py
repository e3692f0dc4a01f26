"""Waiting for another thread or process: the one place where tests look at a clock, to end one that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

# Before a test counts as hanging; far more than anything takes on a machine that is busy with other things.
SECONDS = 1200


def wait_until(condition: Callable[[], object]) -> None:
    """Return once ``condition()`` is true.

    Raises:
        TimeoutError: it is not after ``SECONDS``.
    """
    until = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not so after {SECONDS} s")
        time.sleep(0.005)
