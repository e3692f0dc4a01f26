"""The grammar of prompts in requests, answers and on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sam
from sam import Prompt
from sam.prompts import wire

DOCUMENTS: list[dict[str, Any]] = [
    {"points": [[1.0, 2.5], [30.0, 4.0]], "labels": [1, 0], "box": None},
    {"points": None, "labels": None, "box": [-1.0, 0.5, 7.0, 8.0]},
    {"points": [[0.0, 0.0]], "labels": [0], "box": [0.0, 0.0, 1.0, 1.0]},
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_there_and_back(document: dict[str, Any]) -> None:
    assert wire.to_dict(wire.from_dict(document)) == document
    present = {name: value for name, value in document.items() if value is not None}
    assert wire.to_dict(wire.from_dict(present)) == document


def test_labels_are_of_the_object_where_none_are_given() -> None:
    assert wire.from_dict({"points": [[1, 2], [3, 4]]}).labels.tolist() == [1, 1]


def test_masks_are_referred_to() -> None:
    reference = wire.mask_reference("0" * 32, 3, 1)
    document = wire.to_dict(Prompt(box=(0, 0, 1, 1)), reference)
    assert document["mask_input"] == {"result": "0" * 32, "prompt": 3, "mask": 1}
    logits = np.zeros((1, 4, 4), np.float32)
    prompt = wire.from_dict(document, logits)
    np.testing.assert_array_equal(prompt.mask_input, logits)
    with pytest.raises(ValueError, match="mask_input must be a reference to an earlier mask in a request"):
        wire.to_dict(prompt)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "points or a box are needed"),
        ({"points": None, "box": None}, "points or a box are needed"),
        ({"labels": [1]}, "points or a box are needed"),
        ({"box": [0, 0, 1, 1], "labels": [1]}, "as many labels as points are needed"),
        ({"points": [[1, 1]], "labels": []}, "as many labels as points are needed"),
        ({"points": [[1, 1]], "labels": [7]}, "labels must be 1"),
        ({"point": [[1, 1]]}, "a prompt has points, labels, box, mask_input, got 'point'"),
        ({"box": [3, 0, 1, 1]}, "x0 <= x1"),
    ],
)
def test_refusals(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wire.from_dict(document)


@pytest.mark.parametrize(
    ("points", "box", "path"),
    [
        ([[0, 0], [90, 60]], None, None),
        ([[0, 0], [91, 60]], None, ("points", 1)),
        ([[0, 60.5]], [0, 0, 1, 1], ("points", 0)),
        ([[-1, 0]], None, ("points", 0)),
        (None, [-9, -9, 0, 0], None),
        (None, [-9, -9, 200, 200], None),
        (None, [90, 60, 99, 99], None),
        (None, [-9, 0, -1, 60], ("box",)),
        ([[1, 1]], [0, 61, 90, 61], ("box",)),
    ],
)
def test_what_lies_outside_an_image(points: Any, box: Any, path: Any) -> None:
    assert wire.find_outside(points, box, (60, 90)) == path


def test_padding_is_no_label_of_a_request() -> None:
    with pytest.raises(ValueError, match=r"labels must be 1 \(object\) or 0 \(background\) in a request"):
        wire.to_dict(Prompt([(1, 1)], [-1]))


def test_texts() -> None:
    assert wire.parse_point("1,2.5") == (1.0, 2.5, 1)
    assert wire.parse_point("-1e-1,2,0") == (-0.1, 2.0, 0)
    assert wire.parse_box("1,2,3,4") == [1.0, 2.0, 3.0, 4.0]
    prompt = wire.from_clicks([wire.parse_point("1,2,0")], wire.parse_box("1,2,3,4"))
    assert wire.to_dict(prompt) == {"points": [[1.0, 2.0]], "labels": [0], "box": [1.0, 2.0, 3.0, 4.0]}
    assert wire.to_dict(wire.from_clicks([], [1, 2, 3, 4]))["points"] is None


def test_schemas_of_requests_have_the_limits_of_the_grammar() -> None:
    schemas = pytest.importorskip("sam.server.schemas", reason="needs the extra serve")
    schema = schemas.PromptRequest.model_json_schema()["properties"]
    points, labels, box = (schema[name]["anyOf"][0] for name in ("points", "labels", "box"))
    x = points["items"]["prefixItems"][0]
    assert (points["maxItems"], x["minimum"], x["maximum"]) == (wire.MAX_POINTS, wire.POINTS.low, wire.POINTS.high)
    label = labels["items"]
    assert (labels["maxItems"], label["minimum"], label["maximum"]) == (wire.MAX_POINTS, 0, 1)
    assert (box["prefixItems"][0]["minimum"], box["prefixItems"][3]["maximum"]) == (wire.BOX.low, wire.BOX.high)
    assert [schema[name]["description"] for name in ("points", "labels", "box")] == [
        part.description for part in (wire.POINTS, wire.LABELS, wire.BOX)
    ]


def test_the_page_writes_requests_in_the_grammar() -> None:
    schemas = pytest.importorskip("sam.server.schemas", reason="needs the extra serve")
    page = (Path(sam.__file__).parent / "server/static/page.js").read_text()

    def literal(pattern: str) -> dict[str, Any]:
        (found,) = re.findall(pattern, page)
        return dict(re.findall(r"(\w+): ([^,]+?)(?:,| \})", found))

    assert set(re.findall(r"prompt\.(\w+) =", page)) == {"box", "mask_input"} < set(wire._PARTS)
    assert literal(r"assign\(prompt, (\{.*\})\)").keys() == {"points", "labels"}
    assert literal(r"prompt\.mask_input = (\{.*\})").keys() == wire.mask_reference("", 0, 0).keys()
    everything = {name: float(value) for name, value in literal(r"EVERYTHING = (\{.*\})").items()}
    assert everything == {"points_per_side": 16}
    assert everything.keys() < schemas.AutomaticRequest.model_fields.keys()
