"""SAM 2's modules against Meta's with the same weights, which ``benchmarks.official_sam2`` wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.official_sam2 import SIZE, computed, images, names_of, random_sam2, sample
from fastsam_kernels.numerics import relative_error
from sam.config import SAM2_VARIANTS
from sam.modeling.build import build_empty
from sam.modeling.sam2_base import SAM2Base

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "official_sam2.json").read_text())
LIMITS = {"s0": 2e-5, "s1": 2e-5, "embedding": 2e-5, "ious": 1e-4}  # relative L2; of all else 2e-4


def distance(ours: Tensor, official: list[float]) -> float:
    return relative_error(sample(ours), torch.tensor(official))


@pytest.fixture(scope="module", params=list(OFFICIAL["figures"]))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(variant: str) -> SAM2Base:
    return random_sam2(variant)


@pytest.mark.parametrize("name", SAM2_VARIANTS)
def test_the_weights_have_the_official_names(name: str) -> None:
    assert names_of(build_empty(SAM2_VARIANTS[name]).state_dict()) == OFFICIAL["names"][name]


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_an_image_is_encoded_as_officially(model: SAM2Base, variant: str, kernels: str) -> None:
    model.kernels = kernels
    features = model.image_features(images()[:1])
    maps = dict(zip(("s0", "s1"), features.high_res, strict=True), embedding=features.embedding)
    assert [x.shape[1:] for x in features.high_res] == [(32, SIZE // 4, SIZE // 4), (64, SIZE // 8, SIZE // 8)]
    for name, official in OFFICIAL["figures"][variant]["image"].items():
        assert distance(maps[name], official) <= LIMITS[name]


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_everything_is_computed_as_officially(model: SAM2Base, variant: str, kernels: str) -> None:
    if (variant, kernels) == ("sam2_tiny", "reference"):
        pytest.skip("the modules are those of 2.1")
    model.kernels = kernels
    results = computed(model)
    assert results.keys() == OFFICIAL["figures"][variant].keys()
    for case, official in OFFICIAL["figures"][variant].items():
        for name, figures in official.items():
            assert distance(results[case][name], figures) <= LIMITS.get(name, 2e-4), (case, name)


def test_present_and_absent_objects_occur() -> None:
    cases = [figures for of_variant in OFFICIAL["figures"].values() for figures in of_variant.values()]
    scores = [torch.tensor(case.get("scores") or case["object_score_logits"]) > 0 for case in cases if len(case) > 3]
    assert {(bool(x.any()), bool(x.all())) for x in scores} == {(True, True), (True, False), (False, False)}
