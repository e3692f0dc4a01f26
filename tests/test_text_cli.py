"""``python -m sam text``, from a photograph and a folder to a picture and COCO's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

import sam
from sam.cli import main
from sam.text import load_detector, segment

pytest.importorskip("transformers", reason="text prompts need transformers")
import text_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector")
    for part in text_models.grounding_dino():
        part.save_pretrained(path)
    return path


@pytest.fixture
def image_file(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(photo).save(path)
    return path


def test_a_picture_and_a_document_of_coco(
    tmp_path: Path, image_file: Path, folder: Path, photo: np.ndarray, nano: sam.Sam, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["text", str(image_file), "--label", "Cat", "--label", "red car=0.45", "--threshold", "0.4"]
    command += ["--detector", str(folder), "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    detector = load_detector(folder, device="cpu")
    (expected,) = segment(nano, detector, [photo], [["cat", "red car"]], threshold=0.4, thresholds={"red car": 0.45})
    assert len(expected) > 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{len(expected)} objects; wrote to {out}: cat_text.png, cat_text.json"
    assert len(said) == len(expected) + 1

    document = COCO(out / "cat_text.json")
    assert document.imgs == {1: {"id": 1, "file_name": "cat.png", "height": 300, "width": 451}}
    assert [each["name"] for each in document.loadCats(document.getCatIds())] == ["cat", "red car"]
    records = document.loadAnns(document.getAnnIds())
    for row, each in enumerate(records):
        np.testing.assert_array_equal(document.annToMask(each).astype(bool), expected.masks[row].numpy())
        assert each["category_id"] == expected.label_ids[row] + 1
        assert each["score"] == pytest.approx(float(expected.scores[row]), abs=1e-6)
        assert each["predicted_iou"] == pytest.approx(float(expected.predicted_iou[row]), abs=1e-5)
        assert each["bbox"] == coco.toBbox(each["segmentation"]).tolist()
        np.testing.assert_allclose(each["detected_box"], expected.boxes[row].numpy(), atol=1e-2)
    assert Image.open(out / "cat_text.png").size == (451, 300)

    assert main([*command, "--within", "0,0,1,1"]) == 0  # again: results of this image are replaced
    assert json.loads((out / "cat_text.json").read_text())["annotations"] == []
    assert np.array_equal(np.array(Image.open(out / "cat_text.png")), photo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to find: give --label LABEL"),
        (["--label", "cat", "--detector", "nowhere"], "no such folder: nowhere"),
        (["--label", "cat", "--label", "CAT"], "must differ from each other, got 'CAT' twice"),
        (["--label", "cat. dog"], "label 'cat. dog' must not hold '.'"),
        (["--label", "cat=2"], "thresholds['cat'] must lie in 0..1, got 2.0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    image_file: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["text", str(image_file), "--detector", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
