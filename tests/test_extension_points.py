"""What programs change of Meta's package acts here as there: ``tests/official_extensions.json`` holds its answers.

``python -m benchmarks.official_extensions --segment-anything PATH`` wrote them down, by the functions that run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sam
from benchmarks.extension_points import Change
from benchmarks.official_extensions import TABLES, written

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "official_extensions.json").read_text())

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit.trace, which programs still call
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of this size are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_as_written(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold answers against the official ones: calls as they are, numbers to the rounding of fp32 and of six digits."""
    assert result.keys() == expected.keys()
    for name, answer in result.items():
        ours, theirs = written(answer), expected[name]
        if isinstance(theirs, list):
            assert ours == theirs, name
            continue
        assert ours["shape"] == theirs["shape"], name
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4), name
        largest = max(map(abs, theirs["samples"]))
        assert ours["samples"] == pytest.approx(theirs["samples"], rel=1e-3, abs=1e-4 * largest), name


ROWS = [
    pytest.param(table, name, id=f"{table}: {name}") for table, (changes, _) in TABLES.items() for name in changes()
]


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_a_change_acts_as_officially(table: str, name: str) -> None:
    changes, ask = TABLES[table]
    with Change(sam) as change:
        changes()[name](change)
        assert_as_written(ask(change), OFFICIAL[table][name])


def test_every_change_has_an_official_answer() -> None:
    for table, (changes, _) in TABLES.items():
        assert changes().keys() == OFFICIAL[table].keys(), "run python -m benchmarks.official_extensions again"
