"""The implementation that a model is asked for is the one that runs, in every operation of every way to ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, random_image, random_model

import sam
from fastsam_kernels.dispatch import Implementation, Operation
from sam import Prompt, Sam
from sam.engine import Engine

pytest.importorskip("scipy")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The ``kernels`` that each operation was called with."""
    seen: dict[str, set[str]] = {}
    select = Operation.select

    def noting(self: Operation[Any], kernels: str, *arguments: Any) -> Implementation[Any]:
        seen.setdefault(self.name, set()).add(kernels)
        return select(self, kernels, *arguments)

    monkeypatch.setattr(Operation, "select", noting)
    return seen


def everything(model: Sam) -> None:
    """Ask for masks in each way there is."""
    image = random_image(40, 60)
    embedding = model.encode(image, resize_on_device=True)
    model.predict(embedding, [Prompt([[9, 9]], [1])])
    sam.InteractiveSession(model, embedding).click(9, 9)
    generator = sam.SamAutomaticMaskGenerator(
        model, 2, pred_iou_thresh=-10, stability_score_thresh=0, crop_n_layers=1, min_mask_region_area=9
    )
    assert generator.generate(image)
    predictor = sam.SamPredictor(model)
    predictor.set_image(image)
    predictor.predict(np.array([[9, 9]]), np.array([1]))
    next(sam.predict_stream(model, [(image, [Prompt([[9, 9]], [1])])], resize_on_device=True))
    with Engine(model) as engine:
        engine.segment(image, [Prompt([[9, 9]], [1])]).result()


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_every_operation_is_called_with_the_models_kernels(calls: dict[str, set[str]], kernels: str) -> None:
    model = random_model(TINY)
    model.kernels = kernels
    with torch.no_grad():
        everything(model)
    names = {"connected_components", "mask_statistics", "packed_masks", "nms", "preprocess_image"}
    assert names <= set(calls), f"not asked for: {names - set(calls)}"
    assert calls == {operation: {kernels} for operation in calls}
