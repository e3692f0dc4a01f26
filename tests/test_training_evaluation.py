"""The evaluation of weights: baselines whose scores are known, and a model that is never wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY
from training_runs import CPU, fresh_model

import sam
from sam.training import evaluate
from sam.training.crops import CropModel
from sam.training.scenes import held_out_scene


def test_baselines_on_shapes_whose_scores_are_known() -> None:
    mask = np.zeros((100, 120), bool)
    mask[20:60, 30:50] = True
    mask[40:60, 50:70] = True  # an L: three quarters of its box
    assert evaluate.filled_box_iou(mask) == pytest.approx(0.75)
    y, x = np.mgrid[:100, :120]
    disc = np.hypot(x - 60, y - 50) <= evaluate._DISC_RADII[12]
    ious = evaluate.disc_ious(disc, (60, 50))
    assert ious[12] == 1
    assert ious.argmax() == 12
    assert ious[0] == pytest.approx((np.hypot(x - 60, y - 50) <= evaluate._DISC_RADII[0]).sum() / disc.sum())
    assert ious[-1] == pytest.approx(disc.mean())  # the largest disc is the whole picture


def test_the_deepest_point_is_where_the_object_is_widest() -> None:
    mask = np.zeros((60, 60), bool)
    mask[10:15, 5:50] = True
    mask[5:26, 30:51] = True
    assert evaluate.deepest_point(mask) == (40, 15)
    mask[:] = False
    mask[3, 59] = True
    assert evaluate.deepest_point(mask) == (59, 3)


def test_evaluation_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "held_out_scene", lambda index: held_out_scene(index, size=128))
    torch.manual_seed(0)
    checkpoint = tmp_path / "weights.safetensors"
    sam.save_checkpoint(sam.build_from_config(TINY), checkpoint, metadata={"seed": "7"})
    text = evaluate.evaluate_checkpoint(checkpoint, scenes=2, device=CPU, out=tmp_path)
    result = json.loads((tmp_path / "weights.evaluation.json").read_text())
    assert (tmp_path / "weights.evaluation.md").read_text() == text
    assert list(result["table"]) == list(evaluate.ROWS)
    for row in result["table"].values():
        assert 0 <= row["mean"] <= 1
    assert result["table"]["click_best"]["mean"] >= result["table"]["click"]["mean"]
    assert result["objects"] >= 2
    assert result["weights"]["seed"] == "7"
    assert "seed: 7" in text
    assert (tmp_path / "weights.evaluation.png").stat().st_size > 10_000


def test_a_perfect_model_scores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scoring itself, with a model that knows the truth at the resolution of its logits."""
    scene = held_out_scene(4, size=128)
    truth = torch.from_numpy(scene.masks(evaluate.MIN_PIXELS))

    def know(self: CropModel, features: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.where(truth, 20.0, -20.0)[:, None].expand(-1, 4, -1, -1)
        return logits, torch.ones(len(truth), 4)

    monkeypatch.setattr(CropModel, "decode", know)
    scores = evaluate.Scores()
    evaluate.score_scene(fresh_model().eval(), scene, 0, scores)
    table = scores.table()
    for name in ("click", "click_best", "random_click", "box", "corrected"):
        assert table[name]["mean"] == 1
    assert np.mean(scores.iou_error) == 0
    assert 0 < table["disc"]["mean"] < 1
