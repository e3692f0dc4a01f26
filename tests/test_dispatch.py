"""Which form of an operation runs, where a compiler is watching."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam_kernels.dispatch import choose


def test_a_choice_can_be_compiled() -> None:
    """``kernels="auto"`` in a compiled block: no search of the disk, no message."""

    def chosen(x: Tensor) -> Tensor:
        return x + {"torch": 1, "triton": 2}[choose("an operation of its own", "auto", x.device, None)]

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
