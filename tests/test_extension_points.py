"""What programs change of Meta's package acts here as there: ``tests/official_extensions.json`` holds its answers.

``python -m benchmarks.official_extensions --segment-anything PATH`` wrote them down, by the functions that run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import SECONDS

import sam
from benchmarks.extension_points import Change
from benchmarks.official_extensions import IMAGE, TABLES, written
from sam import Prompt
from sam.engine import Engine
from sam.masks import rle
from sam.sessions import InteractiveSession

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


def mask_of_a_click(change: Change) -> dict[str, np.ndarray]:
    """Return the best mask by each way to ask; the predictor's is held against the official one above."""
    prompt, predictor = Prompt([(30, 20)], [1]), change.predictor()
    predictor.set_image(IMAGE)
    by_predictor, _, _ = predictor.predict(prompt.points, prompt.labels)
    by_model = change.model.predict(change.model.encode(IMAGE), [prompt]).masks[0].numpy()
    with Engine(change.model) as engine:
        (answer,) = engine.segment(IMAGE, [prompt]).result(SECONDS)
    by_engine = np.stack([rle.decode(encoded) for encoded in answer.rles])
    by_session = InteractiveSession(change.model, change.model.encode(IMAGE)).click(30, 20).mask()
    ways = {"predictor": by_predictor, "model": by_model, "engine": by_engine}
    return {way: masks[answer.best] for way, masks in ways.items()} | {"session": by_session}


@pytest.mark.parametrize("owner", ["instance", "class", "subclass"])
def test_a_program_s_own_postprocessing_makes_the_masks_of_every_way_to_ask(owner: str) -> None:
    with Change(sam) as change:
        stock = mask_of_a_click(change)["predictor"]
        if owner == "subclass":
            change.model.__class__ = type("Own", (sam.modeling.Sam,), {})
        thing = change.model if owner == "instance" else type(change.model)
        change.wrap(thing, "postprocess_masks", alter=lambda logits: logits + 0.5)
        answers = mask_of_a_click(change)
        assert (answers["predictor"] != stock).any()
        for way, mask in answers.items():
            np.testing.assert_array_equal(mask, answers["predictor"], way)
        assert len(change.log) == len(answers)


def test_the_engine_refuses_masks_of_everything_that_only_the_official_loop_makes() -> None:
    with Change(sam) as change, Engine(change.model) as engine:
        change.wrap(change.model, "postprocess_masks")
        reason = "postprocess_masks of the predictor's model was replaced"
        with pytest.raises(ValueError, match=f"needs the image, not its embedding; it runs because {reason}"):
            engine.automatic(IMAGE)
        assert engine.segment(IMAGE, [Prompt([(30, 20)], [1])]).result(SECONDS)  # it lives on


def test_every_change_has_an_official_answer() -> None:
    for table, (changes, _) in TABLES.items():
        assert changes().keys() == OFFICIAL[table].keys(), "run python -m benchmarks.official_extensions again"
