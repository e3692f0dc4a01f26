"""A progress bar over the steps of a command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm


class Steps:
    """A progress bar over named steps on stderr, silent where that is no terminal, that also times them."""

    def __init__(self, total: int) -> None:
        self.milliseconds: dict[str, float] = {}
        self._bar = tqdm(total=total, disable=None, leave=False, bar_format="{desc:<24}{bar} {n_fmt}/{total_fmt}")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one named step, and advance the bar at its end."""
        self._bar.set_description_str(name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.milliseconds[name] = 1000 * (time.perf_counter() - start)
        self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
