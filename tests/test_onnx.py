"""``sam.utils.onnx``: equal to Meta's module of that name, and traceable with every size left open."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_image

from benchmarks.official_onnx import PROMPTS, inputs_of, summary
from sam import Sam, SamPredictor
from sam.utils.onnx import SamOnnxModel

OFFICIAL = json.loads((Path(__file__).parent / "official_onnx.json").read_text())


def test_of_these_weights(nano: Sam) -> None:
    assert OFFICIAL["model_hash"] == nano.model_hash, "run python -m benchmarks.official_onnx again"


@pytest.mark.parametrize("result", OFFICIAL["results"], ids=lambda result: f"{result['prompts']}, {result['options']}")
def test_equals_the_official_module(nano: Sam, result: dict[str, Any]) -> None:
    """Logits to 1e-4 and scores to 2e-5, as far as five decimals tell; areas to the pixel."""
    ours = summary(SamOnnxModel(nano, **result["options"])(**inputs_of(result["prompts"], 512)))
    for name, stored in ours.items():
        assert stored["shape"] == result[name]["shape"]
        tolerance = {"areas": 0, "scores": 2e-5, "stability": 2e-5}.get(name, 1e-4)
        np.testing.assert_allclose(stored["values"], result[name]["values"], rtol=0, atol=tolerance, err_msg=name)


def traced(model: SamOnnxModel, inputs: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, tuple(inputs.values()), check_trace=False)


@pytest.mark.parametrize("options", [{"return_single_mask": True}, {"return_single_mask": False}], ids=str)
def test_a_trace_keeps_every_size_open(tiny: Sam, options: dict[str, bool]) -> None:
    """Traced with one click and a small image; then more points, a box, a mask input, other images, more prompts."""
    model = SamOnnxModel(tiny, **options, return_extra_metrics=True)
    one_click, *others = [inputs_of(name, 128) for name in PROMPTS]
    for inputs in (one_click, *others):
        inputs["image_embeddings"] = inputs["image_embeddings"][:, :64]
    trace = traced(model, one_click)
    for inputs in (one_click, *others):
        with torch.jit.optimized_execution(False):  # compiling it for each new shape takes seconds
            answers = trace(*inputs.values())
        for ours, eager in zip(answers, model(**inputs), strict=True):
            assert ours.shape == eager.shape
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_answers_as_the_predictor(tiny: Sam) -> None:
    """As the official notebook prepares its inputs: points and a padding point; a box and a point; a mask fed back."""
    predictor, image = SamPredictor(tiny), random_image(70, 111)
    predictor.set_image(image)
    point, box = np.array([[40.0, 30.0]]), np.array([10.0, 5.0, 90.0, 60.0])
    model = SamOnnxModel(tiny, return_single_mask=False)

    def answer(coords: np.ndarray, labels: list[int], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return model(
            image_embeddings=predictor.get_image_embedding(),
            point_coords=torch.as_tensor(predictor.transform.apply_coords(coords, (70, 111))[None]).float(),
            point_labels=torch.tensor([labels], dtype=torch.float32),
            mask_input=torch.zeros(1, 1, 32, 32) if mask is None else mask,
            has_mask_input=torch.tensor([0.0 if mask is None else 1.0]),
            orig_im_size=torch.tensor([70.0, 111.0]),
        )

    masks, scores, low_res = answer(np.concatenate([point, [[0, 0]]]), [1, -1], None)
    expected = predictor.predict(point, np.array([1]), return_logits=True)
    for ours, theirs in zip((masks, scores, low_res), expected, strict=True):
        torch.testing.assert_close(ours[0, 1:], torch.as_tensor(theirs), rtol=1e-4, atol=1e-4)

    masks, scores, _ = answer(np.concatenate([point, box.reshape(2, 2)]), [0, 2, 3], low_res[:, 2:3])
    expected = predictor.predict(point, np.array([0]), box, low_res[0, 2:3].numpy(), return_logits=True)
    torch.testing.assert_close(masks[0, 1:], torch.as_tensor(expected[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0, 1:], torch.as_tensor(expected[1]), rtol=1e-4, atol=1e-4)


def test_one_mask_of_several(tiny: Sam) -> None:
    """Up to two points, of which one may be padding, the best alternative answers; for more, the single mask."""
    model = SamOnnxModel(tiny, return_single_mask=True)
    masks = torch.arange(8.0).reshape(2, 4, 1, 1)
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.0, 0.3, 0.2, 0.9]])
    for points, expected in ((2, [2, 3]), (3, [0, 0])):
        chosen, score = model.select_masks(masks, scores, points)
        assert chosen.flatten().tolist() == [expected[0], 4 + expected[1]]
        assert score[:, 0].tolist() == [scores[0, expected[0]], scores[1, expected[1]]]
    assert SamOnnxModel.resize_longest_image_size(torch.tensor([1500.0, 2250.0]), 1024).tolist() == [683, 1024]
