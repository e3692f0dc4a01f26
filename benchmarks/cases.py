"""The list of everything that is measured."""

from __future__ import annotations

import torch

from .case import Case
from .model import PARTS
from .operations import OPERATIONS

# By the command that runs them.
GROUPS: dict[str, list[Case]] = {
    "kernels": [case for operation in OPERATIONS.values() for case in operation.CASES],
    "model": [case for part in PARTS.values() for case in part.CASES],
}


def select(group: str | None, pattern: str, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Select the cases of a group (None: of all) whose name contains one of the texts in ``pattern``."""
    groups = GROUPS.values() if group is None else [GROUPS[group]]
    return [case for cases in groups for case in cases if _named(case, pattern) and case.fits(device, dtype)]


def jobs(
    group: str | None, pattern: str, device: torch.device, dtypes: list[torch.dtype]
) -> list[tuple[Case, torch.dtype]]:
    """Return the cases with their dtypes, the most important first, for a run that is cut short.

    Every case has its turn in the first of its dtypes before any has it in the second; those that are late come last.
    """
    chosen = [dtype for dtype in _DTYPES if dtype in dtypes]
    selected = [(case, dtype) for dtype in chosen for case in select(group, pattern, device, dtype)]

    def place(job: tuple[Case, torch.dtype]) -> tuple[bool, int]:
        case, dtype = job
        return case.late, [other for other in chosen if other in case.dtypes].index(dtype)

    return sorted(selected, key=place)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _named(case: Case, pattern: str) -> bool:
    return any(text in case.name for text in pattern.split("|"))
