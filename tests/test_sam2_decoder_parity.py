"""SAM 2's prompts and masks against transformers' ``Sam2Model`` with the same weights, at a small size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import TINY_2
from torch import Tensor

import sam
from benchmarks.official_sam2 import draw_weights
from fastsam_kernels.numerics import relative_error
from sam import ImageEmbedding
from sam.images.geometry import ImageGeometry
from sam.prompts.batch import PromptBatch

SIZE, PROMPTS = TINY_2.image_size, 6
LIMITS = (2e-5, 1e-5, 1e-5)  # logits, predicted IoU, object scores


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[sam.SAM2Base, Any]:
    """Our model and theirs."""
    transformers = pytest.importorskip("transformers")
    model = draw_weights(sam.build_from_config(replace(TINY_2, has_memory=False)))
    folder = tmp_path_factory.mktemp("model")
    sam.save_checkpoint(model, folder, "transformers")
    return model, transformers.Sam2Model.from_pretrained(folder).eval()


def prompts(kind: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return points [P, K, 2], boxes [P, 4] and mask inputs [P, 1, h, w] of a kind."""
    generator = torch.Generator().manual_seed(1)
    points = SIZE * torch.rand(PROMPTS, 2, 2, generator=generator)
    corners = (SIZE * torch.rand(PROMPTS, 2, 2, generator=generator)).sort(1).values.flatten(1)
    masks = 4 * torch.randn(PROMPTS, 1, SIZE // 4, SIZE // 4, generator=generator)
    return (
        points if "points" in kind else None,
        corners if "boxes" in kind else None,
        masks if "masks" in kind else None,
    )


LABELS = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [1, 1], [0, 0]])


def ours(model: sam.SAM2Base, pixels: Tensor, kind: str, multimask_output: bool) -> tuple[Tensor, ...]:
    points, boxes, masks = prompts(kind)
    features = model.image_features(pixels)
    embedding = ImageEmbedding(
        features.embedding, ImageGeometry.stretched(SIZE, SIZE, SIZE), high_res=features.high_res
    )
    clicks = None if points is None else (points, LABELS)
    batch = PromptBatch.from_tensors(clicks, boxes, masks, model.device, model.prompt_layout)
    decoded = model.decode([embedding], batch, multimask_output)
    assert decoded.object_scores is not None
    return decoded.logits, decoded.iou, decoded.object_scores


def median_stability(model: sam.SAM2Base, pixels: Tensor, kind: str) -> float:
    """Return a threshold of stability that half of the single masks reach."""
    model.sam_mask_decoder.dynamic_multimask_via_stability = False
    stability = (
        model.sam_mask_decoder._get_stability_scores(ours(model, pixels, kind, False)[0]).flatten().sort().values
    )
    model.sam_mask_decoder.dynamic_multimask_via_stability = True
    middle = PROMPTS // 2
    assert stability[middle - 1] < stability[middle]
    return float(stability[middle - 1 : middle + 1].mean())


def theirs(model: Any, pixels: Tensor, kind: str, multimask_output: bool) -> tuple[Tensor, ...]:
    """Ask for a prompt at a time where it has a mask, of which the port takes one for an image."""
    points, boxes, masks = prompts(kind)
    answers = []
    for rows in [slice(row, row + 1) for row in range(PROMPTS)] if masks is not None else [slice(None)]:
        out = model(
            pixel_values=pixels,
            input_points=None if points is None else points[None, rows],
            input_labels=None if points is None else LABELS[None, rows],
            input_boxes=None if boxes is None else boxes[None, rows],
            input_masks=None if masks is None else masks[rows],
            multimask_output=multimask_output,
        )
        answers.append((out.pred_masks[0], out.iou_scores[0], out.object_score_logits[0, :, 0]))
    return tuple(map(torch.cat, zip(*answers, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("kind", ["points", "boxes", "points and boxes", "points and masks", "boxes and masks"])
def test_answers_are_those_of_transformers(models: tuple[sam.SAM2Base, Any], kind: str, multimask_output: bool) -> None:
    """Of single masks half are stable, and half give way to an alternative."""
    model, port = models
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for decoder in (model.sam_mask_decoder, port.mask_decoder):
            decoder.dynamic_multimask_stability_thresh = median_stability(model, pixels, kind)
        answers = ours(model, pixels, kind, multimask_output), theirs(port, pixels, kind, multimask_output)
    for answer, expected, limit in zip(*answers, LIMITS, strict=True):
        assert answer.shape == expected.shape
        assert relative_error(answer, expected) <= limit
