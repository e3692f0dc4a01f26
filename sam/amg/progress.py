"""Progress bars of automatic masks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Report clicks that are done: a bar on stderr, a function, or nothing."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self._call = progress if callable(progress) else None
        self._bar = tqdm(total=total, desc="clicks", leave=False) if progress is True else None
        self._done, self._total = 0, total

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def follow(self, steps: Generator[int, None, T]) -> T:
        """Run a generator of numbers of clicks to its end, and return what it returns."""
        while True:
            try:
                count = next(steps)
            except StopIteration as stop:
                return stop.value
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            if self._call is not None:
                self._call(self._done, self._total)
