"""Work on kernels in several processes: kernels cannot be sent to one, forked ones have them already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

Item, Found = TypeVar("Item"), TypeVar("Found")


def map_in_forks(work: Callable[[Item], Found], items: Iterable[Item], workers: int, what: str) -> list[Found]:
    """Return ``work`` of every item, in their order; ``what`` is for the progress bar."""
    _TASKS[:] = [partial(work, item) for item in items]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        positions = range(len(_TASKS))
        return list(tqdm(pool.map(_do, positions), total=len(positions), desc=what, disable=None, leave=False))


_TASKS: list[Callable[[], Any]] = []


def _do(place: int) -> Any:
    return _TASKS[place]()
