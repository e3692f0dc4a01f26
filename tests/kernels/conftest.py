"""Fixtures of the kernels' tests, which run on the GPU where there is one and else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernels.foundation import needed_memory, skip_without_memory


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN: an output that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the processes that share the GPU


def pytest_runtest_setup(item: pytest.Item) -> None:
    if torch.cuda.is_available():
        skip_without_memory(needed_memory(item), torch.cuda.mem_get_info()[0])
