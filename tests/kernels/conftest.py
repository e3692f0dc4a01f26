"""Fixtures of the kernels' tests, which run on the GPU where there is one and else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from kernels.foundation import needed_memory, skip_without_memory
from kernels.interpreter_bf16 import bf16_in_the_interpreter

from fastsam_kernels.dispatch import is_triton_interpreter


@pytest.fixture(scope="package", autouse=True)
def bf16() -> Iterator[None]:
    """The dtype that users run is interpreted too, while tests of this folder run."""
    with bf16_in_the_interpreter() if is_triton_interpreter() else nullcontext():
        yield


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
