"""Processes that train one model together: each makes the gradients of its own pictures, and all take their mean.

On a CPU, processes of one thread each make more steps than one process of many threads, which its small operations
do not fill; and what one thread adds up repeats to the bit.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


@dataclass(frozen=True)
class Team:
    """Hold the place of this process: ``rank`` of ``size``; the first one keeps the clock and writes the files."""

    rank: int = 0
    size: int = 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all processes, the same to the bit in each of them."""
        if self.size > 1:
            dist.all_reduce(values)

    def broadcast(self, value: float) -> float:
        """Return the leading process's ``value``."""
        if self.size == 1:
            return value
        message = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(message, src=0)
        return float(message)


ALONE = Team()


def run_together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(team, *arguments)`` in ``size`` processes; here where that is one.

    Raises:
        torch.multiprocessing.spawn.ProcessException: one of several processes failed; the others are ended.
    """
    if size == 1:
        work(ALONE, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_join_team, (size, Path(folder) / "team", work, arguments), nprocs=size)


def _join_team(rank: int, size: int, meeting: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # torch has the system interrupt this process when the one that started it dies. Programs that a shell starts in the
    # background ignore interrupts, and so would the processes that they start: a killed run would train on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=size)
    work(Team(rank, size), *arguments)
    dist.destroy_process_group()  # not after a failure: the others would lose their peer before it is told why
