"""The model against ``transformers.SamModel``, an independent port, with every parameter re-randomised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparison import assert_close_l2, assert_close_max, relative_l2
from models import TINY, random_model
from torch import Tensor

import sam
from sam import Sam

EMBEDDING, LOGITS, IOU = 1e-5, 1e-4, 1e-4


class Oracle:
    """A SamModel with the weights of one of ours, through a folder written for ``from_pretrained``."""

    def __init__(self, model: Sam, folder: Path) -> None:
        from transformers import SamModel

        sam.save_checkpoint(model, folder, layout="transformers")
        self.model, report = SamModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        self.model.eval().requires_grad_(False)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_embeddings(pixels)

    def decode(
        self,
        features: Tensor,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        out = self.model(
            image_embeddings=features,
            input_points=points[0][None] if points else None,
            input_labels=points[1][None] if points else None,
            input_boxes=boxes[None] if boxes is not None else None,
            input_masks=masks,
            multimask_output=multimask_output,
        )
        return out.pred_masks[0], out.iou_scores[0]


Models = tuple[Sam, Oracle]


@pytest.fixture(scope="module", params=["tiny", pytest.param("vit_b", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    config = TINY if request.param == "tiny" else sam.VARIANTS[request.param]
    model = random_model(config)
    return model, Oracle(model, tmp_path_factory.mktemp(request.param))


def pixels_of(model: Sam, seed: int = 0) -> Tensor:
    size = model.image_encoder.img_size
    generator = torch.Generator().manual_seed(seed)
    return model.preprocess(torch.randint(0, 256, (1, 3, size, size * 3 // 4), generator=generator))


def features_of(model: Sam, seed: int = 1) -> Tensor:
    grid = model.prompt_encoder.image_embedding_size
    return torch.randn(1, model.prompt_encoder.embed_dim, *grid, generator=torch.Generator().manual_seed(seed))


def prompts_of(model: Sam, kind: str) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
    size, side = model.image_encoder.img_size, model.prompt_encoder.mask_input_size[0]
    generator = torch.Generator().manual_seed(2)
    count = 1 if "mask" in kind else 3  # the port takes one mask an image
    points = boxes = masks = None
    if "points" in kind:
        coords = torch.rand(count, 4, 2, generator=generator) * size
        points = coords, torch.tensor([[1, 0, 1, -1]]).expand(count, -1)
    if "box" in kind:
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
        boxes = corners.flatten(1) * size
    if "mask" in kind:
        masks = 4 * torch.randn(count, 1, side, side, generator=generator)
    return points, boxes, masks


def test_image_embedding(models: Models) -> None:
    model, oracle = models
    pixels = pixels_of(model)
    assert_close_l2(model.image_encoder(pixels), oracle.encode(pixels), EMBEDDING, "image embedding")


@pytest.mark.parametrize("kind", ["points", "box", "points+box", "points+mask", "points+box+mask"])
@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_masks(models: Models, kind: str, multimask_output: bool, kernels: str) -> None:
    model, oracle = models
    features = features_of(model)
    points, boxes, masks = prompts_of(model, kind)
    predictor = sam.SamPredictor(model)
    predictor.features, predictor.is_image_set = features, True
    predictor.input_size = predictor.original_size = (model.image_encoder.img_size,) * 2
    model.kernels = kernels
    coords, labels = points or (None, None)
    _, iou, logits = predictor.predict_torch(coords, labels, boxes, masks, multimask_output)
    expected_logits, expected_iou = oracle.decode(features, points, boxes, masks, multimask_output)
    assert_close_l2(logits, expected_logits, LOGITS, f"low-resolution logits, {kind}")
    assert_close_max(iou, expected_iou, IOU, f"predicted IoU, {kind}")


def test_a_missing_relative_position_would_be_noticed(models: Models) -> None:
    """On freshly initialised weights it would not: those tables start at zero."""
    model, oracle = models
    pixels = pixels_of(model)
    expected = oracle.encode(pixels)
    for block in model.image_encoder.blocks:
        block.attn.use_rel_pos = False
    try:
        assert relative_l2(model.image_encoder(pixels), expected) > 100 * EMBEDDING
    finally:
        for block in model.image_encoder.blocks:
            block.attn.use_rel_pos = True
