"""Batches that run again in halves where the device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..inference.graphs import empty_cache
from .errors import OutOfMemoryError, is_out_of_memory

WorkItem = TypeVar("WorkItem")
Result = TypeVar("Result")


class BatchRunner:
    """Runs batches on a device.

    Args:
        device: whose memory may run out.
        on_shortage: called whenever it did.
    """

    def __init__(self, device: torch.device, on_shortage: Callable[[], None]) -> None:
        self._device = device
        self._on_shortage = on_shortage

    def run(
        self, work_items: list[WorkItem], function: Callable[[list[WorkItem]], list[Result]]
    ) -> list[Result | OutOfMemoryError]:
        """Return ``function(work_items)``, one result per item, by halves where memory runs out.

        The items of a half that does not fit either have :class:`OutOfMemoryError` for a result.
        """
        results = self._attempt(work_items, function)
        if results is not None:
            return [*results]
        middle = (len(work_items) + 1) // 2
        halves: list[Result | OutOfMemoryError] = []
        for half in filter(None, (work_items[:middle], work_items[middle:])):
            results = self._attempt(half, function)
            halves += [out_of_memory()] * len(half) if results is None else results
        return halves

    def _attempt(
        self, work_items: list[WorkItem], function: Callable[[list[WorkItem]], list[Result]]
    ) -> list[Result] | None:
        try:
            return function(work_items)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.relieve()  # only now: the error held what the batch had allocated
        return None

    def relieve(self) -> None:
        """Report a shortage, and return unused memory to the device."""
        self._on_shortage()
        if self._device.type == "cuda":
            empty_cache()


def out_of_memory() -> OutOfMemoryError:
    """Return the error of work that does not fit memory."""
    return OutOfMemoryError("out of memory, even with half the batch")
