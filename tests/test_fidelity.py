"""``sam.fidelity``: measures of known masks, gates, the report, and ``quantize``, which writes what passes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, random_image, random_model
from PIL import Image
from torch import Tensor

import sam
from sam.cli import main
from sam.fidelity import GATES, Gate, Measures, compare, judge, measure, report
from sam.fidelity.measure import boundary, matches
from sam.fidelity.prompts import Answers
from sam.masks.overlap import mask_iou

LENIENT = Gate(1e9, 0.0, 0.0, 0.0)


def squares(*corners: tuple[int, int, int]) -> Tensor:
    """Masks [N, 40, 40] of squares: row, column and side."""
    masks = torch.zeros(len(corners), 40, 40, dtype=torch.bool)
    for mask, (row, column, side) in zip(masks, corners, strict=True):
        mask[row : row + side, column : column + side] = True
    return masks


def test_iou_of_masks() -> None:
    a, b = squares((0, 0, 10), (0, 0, 10), (0, 0, 0)), squares((0, 0, 10), (0, 5, 10), (0, 0, 0))
    assert mask_iou(a, b).tolist() == [1.0, 50 / 150, 1.0]


def test_the_boundary_is_a_band_inside() -> None:
    """2 % of the diagonal of 40 x 40 pixels is 1.1: the outermost pixels, at the image's border too."""
    (band,) = boundary(squares((10, 10, 20)))
    assert int(band.sum()) == 20**2 - 18**2
    (at_the_border,) = boundary(squares((0, 0, 20)))
    assert int(at_the_border.sum()) == 20**2 - 18**2
    assert len(boundary(squares())) == 0


def test_pairs_are_one_to_one() -> None:
    a = squares((0, 0, 20), (0, 0, 20), (20, 20, 10))
    assert matches(a, a) == 3
    assert matches(a, a[:1]) == 1, "two masks of one are one pair"
    assert matches(a, squares((20, 20, 10), (0, 1, 20))) == 2
    assert matches(a, squares((20, 25, 10))) == 0
    assert matches(squares(), a) == 0


def answers(**changes: Any) -> Answers:
    clicks = torch.stack([squares((0, 0, 10), (0, 0, 20), (0, 0, 30))])
    known = Answers(
        embedding=torch.ones(1, 4, 2, 2),
        box_masks=squares((0, 0, 10), (10, 10, 10)),
        box_iou=torch.tensor([0.9, 0.8]),
        click_masks=clicks,
        click_iou=torch.tensor([[0.5, 0.7, 0.9]]),
        automatic=squares((0, 0, 20), (20, 20, 10)),
    )
    return replace(known, **changes)


def test_equal_answers_have_no_distance() -> None:
    result = measure([compare(answers(), answers(), 0.8)] * 2)
    assert (result.embedding, result.sqnr) == (0, math.inf)
    assert result.box_iou == result.box_iou_p5 == result.boundary_iou == result.click_iou == result.automatic_f1 == 1
    assert result.best_changed == result.drift_most == result.crossed == 0
    assert result.masks == (4, 6, 4)


def test_each_distance_is_seen() -> None:
    other = answers(
        embedding=1.01 * torch.ones(1, 4, 2, 2),
        box_masks=squares((0, 0, 10), (10, 15, 10)),
        box_iou=torch.tensor([0.9, 0.6]),
        click_masks=torch.stack([squares((0, 0, 10), (0, 0, 20), (0, 0, 15))]),
        click_iou=torch.tensor([[0.5, 0.85, 0.7]]),
        automatic=squares((0, 0, 20)),
    )
    result = measure([compare(answers(), other, 0.8)])
    assert math.isclose(result.embedding, 0.01, rel_tol=1e-4)
    assert math.isclose(result.sqnr, 40, rel_tol=1e-4)
    assert math.isclose(result.box_iou, (1 + 1 / 3) / 2)
    assert math.isclose(result.box_iou_least, 1 / 3)
    assert math.isclose(result.click_iou, (1 + 1 + 0.25) / 3)
    assert result.best_changed == 1
    assert math.isclose(result.drift_most, 0.2, rel_tol=1e-5)
    assert math.isclose(result.drift, (0 + 0.2 + 0 + 0.15 + 0.2) / 5, rel_tol=1e-5)
    assert math.isclose(result.crossed, 2 / 3)
    assert math.isclose(result.automatic_f1, 2 / 3)
    assert result.automatic_ratio == 0.5
    assert result.boundary_iou < result.box_iou


def test_gates_are_per_scheme_and_relative_to_bf16() -> None:
    exact = measure([compare(answers(), answers(), 0.8)])
    noise = replace(exact, embedding=0.01)

    def passed(scheme: str, **changes: float) -> dict[str, bool]:
        changed: Measures = replace(exact, **changes)  # type: ignore[arg-type]
        return {verdict.name: verdict.passed for verdict in judge(changed, noise, GATES[scheme])}

    assert all(passed("int8", embedding=0.0199).values())
    assert passed("int8", embedding=0.021)["embedding"] is False
    assert all(passed("fp8", embedding=0.039).values())
    for name, value in (("box_iou", 0.989), ("box_iou_p5", 0.96), ("automatic_f1", 0.97)):
        verdicts = passed("int8", **{name: value})
        assert [key for key, good in verdicts.items() if not good] == [name]


def test_the_report(tmp_path: Path) -> None:
    model = random_model(TINY)
    images = {"first": random_image(60, 80), "second": random_image(70, 64, 1)}
    with pytest.raises(ValueError, match="the second model is not quantised"):
        report(model, model, images)
    quantized, calls = sam.quantize(model, "int8"), []
    with pytest.raises(ValueError, match="images must be at least one, got none"):
        report(model, quantized, {})
    options = {"clicks_per_side": 2, "points_per_side": 2}
    result = report(model, quantized, images, gate=LENIENT, progress=lambda: calls.append(1), **options)
    assert result.passed
    assert len(calls) == 6
    assert 0 < result.rows["int8"].embedding < 10 * result.rows["bf16"].embedding
    assert result.other_batch < result.rows["int8"].embedding
    result.write(tmp_path, images)
    document = json.loads((tmp_path / "fidelity.json").read_text())
    assert document["quantised"] == "custom-int8"
    assert document["model_hash"] == model.model_hash
    assert document["measures"].keys() == {"int8", "bf16"}
    assert {gate["name"] for gate in document["gates"]} == {"embedding", "box_iou", "box_iou_p5", "automatic_f1"}
    page = (tmp_path / "fidelity.md").read_text()
    assert page.startswith("# Fidelity of custom-int8 to custom: passed")
    assert len(result.worst) == len(list(tmp_path.glob("worst_*.png"))) == page.count("](worst_")
    assert result.worst == sorted(result.worst, key=lambda worst: worst.iou)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity")
    sam.save_checkpoint(random_model(TINY), folder / "plain.safetensors")
    (folder / "images").mkdir()
    for index in range(2):
        Image.fromarray(random_image(48, 64, index)).save(folder / "images" / f"{index}.png")
    return folder


def call(source: Path, target: Path, *more: str) -> int:
    files = [str(source / "plain.safetensors"), str(target), "--images", str(source / "images"), "--max-images", "1"]
    return main(["quantize", *files, *more])


def test_what_passes_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(GATES, "int8", LENIENT)
    target = tmp_path / "int8.safetensors"
    assert call(source, target, "--calibration", str(source / "images")) == 0
    assert sam.load_model(target).quantization == "int8"
    assert (tmp_path / "int8.fidelity" / "fidelity.json").is_file()
    assert "# Fidelity of custom-int8 to custom: passed" in capsys.readouterr().out
    assert call(source, target) == 2
    assert f"{target} exists; --force replaces it" in capsys.readouterr().err
    assert main(["info", str(target)]) == 0
    assert {"quantization       int8", "sam_fidelity       passed"} < set(capsys.readouterr().out.splitlines())


def test_what_does_not_pass_is_not_written(source: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(GATES, "int8", replace(LENIENT, embedding=0.0))
    target = tmp_path / "int8.safetensors"
    assert call(source, target) == 1
    assert not target.exists()
    assert "was not written: embedding did not pass" in capsys.readouterr().err
    assert (tmp_path / "int8.fidelity" / "fidelity.md").read_text().count("**not passed**") == 1
    assert call(source, target, "--force") == 0
    assert sam.checkpoint.read_checkpoint(target).metadata == {"sam_fidelity": "not passed"}


def test_bad_options(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert call(source, tmp_path / "int8.pth") == 2
    assert "quantised weights are written as .safetensors" in capsys.readouterr().err
    assert call(source, tmp_path / "fp8.safetensors", "--scheme", "fp8", "--device", "cpu") == 2
    assert "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, got cpu" in capsys.readouterr().err


def test_commands_take_quantize(source: Path, tmp_path: Path, capsys: Any) -> None:
    image = str(source / "images" / "0.png")
    options = ["--checkpoint", str(source / "plain.safetensors"), "--quantize", "int8", "--out", str(tmp_path)]
    assert main(["segment", image, "--point", "20,20", *options]) == 0
    document = json.loads((tmp_path / "0.json").read_text())
    assert document["model"]["variant"] == "custom-int8"
    assert np.array(document["masks"][0]["predicted_iou"]).size == 1
