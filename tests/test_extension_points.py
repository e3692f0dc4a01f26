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

# What does not act as officially yet.
PENDING = {
    "image_encoder.forward on the class",
    "image_encoder.blocks.0.forward on the class",
    "image_encoder.blocks.0.attn.forward on the class",
    "image_encoder.blocks.1.attn.forward on the class",
    "image_encoder.blocks.0.mlp.forward on the class",
    "prompt_encoder.forward on the instance",
    "prompt_encoder.forward on the class",
    "prompt_encoder.forward on the subclass",
    "prompt_encoder._embed_boxes on the instance",
    "prompt_encoder._embed_boxes on the class",
    "prompt_encoder._embed_boxes on the subclass",
    "prompt_encoder._get_batch_size on the instance",
    "prompt_encoder._get_batch_size on the class",
    "prompt_encoder._get_batch_size on the subclass",
    "mask_decoder.transformer.layers.0.mlp.forward on the class",
    "forward hook on image_encoder",
    "forward_pre hook on image_encoder",
    "forward hook on image_encoder.blocks.0",
    "forward_pre hook on image_encoder.blocks.0",
    "forward hook on image_encoder.blocks.0.attn",
    "forward_pre hook on image_encoder.blocks.0.attn",
    "forward hook on image_encoder.blocks.1.attn",
    "forward_pre hook on image_encoder.blocks.1.attn",
    "image_encoder.window_partition",
    "image_encoder.window_unpartition",
    "image_encoder.get_rel_pos",
    "image_encoder.add_decomposed_rel_pos",
    "hooks on every module",
    "a hook for all modules there are",
}

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


def assert_as_written(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold answers against the official ones: calls as they are, numbers to the rounding of fp32 and of six digits."""
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        ours, theirs = written(answer), expected[name]
        if isinstance(theirs, list):
            assert ours == theirs, name
            continue
        assert ours["shape"] == theirs["shape"], name
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4), name
        largest = max(map(abs, theirs["samples"]))
        assert ours["samples"] == pytest.approx(theirs["samples"], rel=1e-3, abs=1e-4 * largest), name


ROWS = [
    pytest.param(table, name, id=f"{table}: {name}", marks=[pytest.mark.xfail] if name in PENDING else [])
    for table, (changes, _) in TABLES.items()
    for name in changes()
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
