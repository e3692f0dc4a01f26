"""The whole model on a GPU, against the plain formula in fp64 on the CPU; run by ``make gpu-test``."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from comparison import relative_l2
from models import TINY, random_image, random_model
from torch import Tensor

import sam
from sam import Prompt, Sam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def prompts() -> list[Prompt]:
    return [
        Prompt(points=np.array([[20.0, 30.0]]), labels=np.array([1])),
        Prompt(points=np.array([[5.0, 6.0], [40.0, 9.0]]), labels=np.array([1, 0])),
        Prompt(box=np.array([4.0, 8.0, 50.0, 44.0])),
    ]


def outputs(model: Sam, image: np.ndarray) -> dict[str, Tensor]:
    embedding = model.encode(image)
    prediction = model.predict(embedding, prompts())
    return {
        "features": embedding.features.double().cpu(),
        "logits": prediction.low_res_logits.double().cpu(),
        "predicted IoU": prediction.iou_predictions.double().cpu(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_model_within_budget(name: str, kernels: str, dtype: torch.dtype) -> None:
    model = sam.load_model() if name == "nano" else random_model(TINY)
    image = random_image(48, 64)
    truth_model = copy.deepcopy(model).double()
    truth_model.kernels = "reference"
    truth = outputs(truth_model, image)
    model = model.to("cuda", dtype)
    model.kernels = "reference"
    plain = outputs(model, image)
    model.kernels = kernels
    found = outputs(model, image)
    for what, expected in truth.items():
        error, baseline = relative_l2(found[what], expected), relative_l2(plain[what], expected)
        budget = 2 * baseline + torch.finfo(dtype).eps
        assert error <= budget, f"{what}: {error:.2e} is over the budget of {budget:.2e} (plain {baseline:.2e})"


def test_auto_is_triton_after_a_move() -> None:
    """People write ``registry[...](checkpoint=...).to("cuda")``."""
    model = sam.load_model(device="cpu")
    assert model.resolved_kernels == "torch"
    assert model.to("cuda").resolved_kernels == "triton"
    assert np.isfinite(model.predict(model.encode(random_image(48, 64)), prompts()).low_res_logits.cpu()).all()


def test_predictor_and_embedding_move() -> None:
    image = random_image(48, 64)
    on_gpu, on_cpu = sam.load_model(device="cuda"), sam.load_model(device="cpu")
    predictor = sam.SamPredictor(on_gpu)
    predictor.set_image(image)
    coords, labels = np.array([[20.0, 30.0]]), np.array([1])
    masks, _, logits = predictor.predict(coords, labels)
    assert masks.shape == (3, 48, 64)
    embedding = predictor.embedding.to("cpu")
    there = on_cpu.predict(embedding, [Prompt(points=coords, labels=labels)])
    agree = (torch.from_numpy(masks) == there.masks[0]).double().mean()
    assert agree > 0.999
    assert relative_l2(torch.from_numpy(logits), there.low_res_logits[0]) < 1e-3
