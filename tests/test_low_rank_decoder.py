"""Clicks of one image whose image tokens are not made: the answers of the decoder that makes them."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close_l2
from models import SMALL_2, TINY, random_model
from torch import Tensor

import sam
from fastsam_kernels.numerics import relative_error
from sam.embedding import ImageEmbedding
from sam.images.geometry import ImageGeometry
from sam.inference.decode import shared_image
from sam.masks.results import DecodedMasks
from sam.modeling.promptable import PromptableModel
from sam.prompts.batch import PromptBatch

CLICKS = 5


@pytest.fixture(scope="module")
def model() -> sam.SAM2Base:
    return random_model(SMALL_2).double()


def embedding_of(model: PromptableModel) -> ImageEmbedding:
    """Return random features as the decoder of ``model`` takes them."""
    generator, side = torch.Generator().manual_seed(1), model.image_size // 16
    sizes = [(64, side), (8, 4 * side), (16, 2 * side)] if isinstance(model, sam.SAM2Base) else [(64, side)]
    maps = [torch.randn(1, width, size, size, generator=generator).to(model.dtype) for width, size in sizes]
    geometry = ImageGeometry.stretched(model.image_size, model.image_size, model.image_size)
    return ImageEmbedding(maps[0], geometry, high_res=tuple(maps[1:]))


def clicks(model: PromptableModel) -> PromptBatch:
    coords = model.image_size * torch.rand(CLICKS, 1, 2, generator=torch.Generator().manual_seed(0))
    points = coords, torch.ones(CLICKS, 1, dtype=torch.int64)
    return PromptBatch.from_tensors(points, None, None, model.device, model.prompt_layout)


@torch.no_grad()
def answers(model: PromptableModel, multimask_output: bool) -> tuple[DecodedMasks, DecodedMasks]:
    """Return the masks of some of the clicks with image tokens, and without."""
    embedding, batch, rows = embedding_of(model), clicks(model), torch.tensor([0, 2, 3])
    shared = shared_image(model, embedding)
    assert shared is not None
    made, not_made = model.decode_tokens([embedding], batch), model.decode_tokens([embedding], batch, shared)
    assert not isinstance(not_made.keys, Tensor)
    assert_close_l2(not_made.iou, made.iou, 1e-5, "predicted IoU")
    return model.decode_masks(made, multimask_output, rows), model.decode_masks(not_made, multimask_output, rows)


@pytest.mark.parametrize("multimask_output", [True, False])
def test_answers_are_those_of_image_tokens_that_are_made(model: sam.SAM2Base, multimask_output: bool) -> None:
    for made, not_made in zip(*answers(model, multimask_output), strict=True):
        assert not_made.shape == made.shape
        assert relative_error(not_made, made) < 1e-12


def test_errors_in_fp32_are_those_of_rounding(model: sam.SAM2Base) -> None:
    exact = answers(model, True)[0].logits
    made, not_made = (relative_error(masks.logits, exact) for masks in answers(copy.deepcopy(model).float(), True))
    assert not_made < max(2 * made, 1e-6)


def test_one_block_and_three(model: sam.SAM2Base) -> None:
    """The vectors of a prompt grow with each block; the official transformer has two."""
    for depth in (1, 3):
        changed = copy.deepcopy(model)
        layers = changed.sam_mask_decoder.transformer.layers
        while len(layers) > depth:
            del layers[-1]
        while len(layers) < depth:
            layers.append(copy.deepcopy(layers[-1]))
        changed.sam_mask_decoder.transformer.depth = depth
        for made, not_made in zip(*answers(changed, True), strict=True):
            assert relative_error(not_made, made) < 1e-12


def test_what_decodes_with_image_tokens(model: sam.SAM2Base) -> None:
    """SAM, whose answers stay as they were, the official formulas, few bits, gradients, and a changed decoder."""
    first = random_model(TINY)
    assert shared_image(first, embedding_of(first)) is None
    embedding = embedding_of(model)
    for kernels in ("reference", {"hypernetwork_masks": "reference"}, {"two_way_attention": "reference"}):
        changed = copy.deepcopy(model)
        changed.kernels = kernels
        assert shared_image(changed, embedding) is None
    half = copy.deepcopy(model).bfloat16()
    assert shared_image(half, embedding_of(half)) is None
    assert shared_image(copy.deepcopy(model).requires_grad_(True), embedding) is None
    hooked = copy.deepcopy(model)
    hooked.sam_mask_decoder.register_forward_hook(lambda *_: None)
    assert shared_image(hooked, embedding) is None
