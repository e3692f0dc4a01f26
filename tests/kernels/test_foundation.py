"""The skips of tests that a GPU has no memory for."""

from __future__ import annotations

import pytest
from kernels.foundation import large, needed_memory, skip_without_memory


@large
def test_a_large_test_needs_24_gigabytes(request: pytest.FixtureRequest) -> None:
    assert needed_memory(request.node) == 24


@pytest.mark.gpu_memory(1)
def test_a_mark_says_how_much(request: pytest.FixtureRequest) -> None:
    assert needed_memory(request.node) == 1


def test_others_need_none(request: pytest.FixtureRequest) -> None:
    assert needed_memory(request.node) == 0
    skip_without_memory(0, 0)


def test_the_reason_names_both() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^needs 24 GB of free GPU memory, there are 7\.5$"):
        skip_without_memory(24, 15 * 2**29)
    skip_without_memory(24, 24 * 2**30)
