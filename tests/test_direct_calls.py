"""Modules that a program calls itself: fused where nothing speaks against it, and then what the modules make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_close_l2
from models import TINY, Int8Weight, random_model
from torch import Tensor, nn

from sam import Sam
from sam.inference import direct_calls
from sam.modeling.mask_decoder import MaskDecoder


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: Sam, images: int, sparse: int, dense: int, pe: int = 1, tokens: int = 2) -> dict[str, Tensor]:
    return {
        "image_embeddings": draw(images, 64, 8, 8),
        "image_pe": model.prompt_encoder.get_dense_pe().expand(pe, -1, -1, -1),
        "sparse_prompt_embeddings": draw(sparse, tokens, 64, seed=1),
        "dense_prompt_embeddings": draw(dense, 64, 8, 8, seed=2),
    }


def official(decoder: MaskDecoder, multimask_output: bool, **given: Tensor) -> tuple[Tensor, Tensor]:
    masks, iou = decoder.predict_masks(**given)
    outputs = MaskDecoder.mask_slice(multimask_output)
    return masks[:, outputs], iou[:, outputs]


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompts of each fused call."""
    calls: list[int] = []
    decode = direct_calls._decode

    def counted(packed: Any, image: Tensor, pe: Tensor, sparse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(len(sparse))
        return decode(packed, image, pe, sparse, *rest)

    monkeypatch.setattr(direct_calls, "_decode", counted)
    return calls


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize(
    ("images", "sparse", "dense", "pe", "tokens"),
    [
        (1, 1, 1, 1, 2),
        (1, 9, 1, 1, 2),
        (1, 6, 6, 6, 3),
        (5, 5, 5, 1, 2),
        (5, 1, 1, 5, 2),
        (1, 3, 1, 1, 20),
        (1, 2, 1, 1, 0),
    ],
)
def test_the_mask_decoder_is_fused(
    fused_calls: list[int], images: int, sparse: int, dense: int, pe: int, tokens: int, multimask_output: bool
) -> None:
    """One image or several, masks as inputs or none, more tokens than are absorbed."""
    model = random_model(TINY)
    given = inputs(model, images, sparse, dense, pe, tokens)
    masks, iou = model.mask_decoder(**given, multimask_output=multimask_output)
    assert fused_calls == [sparse]
    expected_masks, expected_iou = official(model.mask_decoder, multimask_output, **given)
    assert masks.shape == expected_masks.shape
    assert masks.dtype == expected_masks.dtype
    assert_close_l2(masks, expected_masks, 1e-5, "masks")
    assert_close_l2(iou, expected_iou, 1e-5, "predicted IoU")


def test_it_follows_the_weights(fused_calls: list[int]) -> None:
    model = random_model(TINY)
    given = inputs(model, 1, 2, 1)
    for _ in range(2):
        masks, _ = model.mask_decoder(**given, multimask_output=True)
        assert_close_l2(masks, official(model.mask_decoder, True, **given)[0], 1e-5, "masks")
        with torch.no_grad():
            for parameter in model.mask_decoder.parameters():
                parameter.mul_(1.1)
    assert len(fused_calls) == 2


def test_half_precision_stays_half(fused_calls: list[int]) -> None:
    model = random_model(TINY).to(torch.bfloat16)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in inputs(model, 1, 2, 1).items()}
    masks, iou = model.mask_decoder(**given, multimask_output=True)
    assert len(fused_calls) == 1
    assert masks.dtype == iou.dtype == torch.bfloat16
    assert_close_l2(masks.float(), official(model.mask_decoder, True, **given)[0].float(), 0.05, "masks")


def quantised(model: Sam) -> None:
    model.mask_decoder.mask_tokens.weight = nn.Parameter(Int8Weight(model.mask_decoder.mask_tokens.weight), False)


OFFICIAL: dict[str, Callable[[Sam], Any]] = {
    "kernels": lambda m: setattr(m, "kernels", "reference"),
    "hook": lambda m: m.mask_decoder.transformer.layers[0].register_forward_hook(lambda *_: None),
    "patch": lambda m: setattr(m.mask_decoder, "predict_masks", m.mask_decoder.predict_masks),
    "subclass": lambda m: setattr(m.mask_decoder, "__class__", type("Own", (MaskDecoder,), {})),
    "quantised": quantised,
    "gradients of weights": lambda m: m.requires_grad_(True),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_wants_the_official_modules_gets_them(fused_calls: list[int], name: str) -> None:
    model = random_model(TINY)
    given = inputs(model, 1, 2, 1)
    before, _ = model.mask_decoder(**given, multimask_output=True)
    assert len(fused_calls) == 1
    OFFICIAL[name](model)
    masks, _ = model.mask_decoder(**given, multimask_output=True)
    assert len(fused_calls) == 1
    assert torch.equal(masks, official(model.mask_decoder, True, **given)[0])
    assert masks.requires_grad == (name == "gradients of weights")
    assert_close_l2(masks.detach(), before, 0.05, name)


def test_calls_of_other_kinds_get_the_official_modules(fused_calls: list[int]) -> None:
    model = random_model(TINY)
    decoder, given = model.mask_decoder, inputs(model, 1, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        decoder(**given, multimask_output=True)
    several_positions = given["image_pe"].repeat(2, 1, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None, None]
    decoder(**{**given, "image_pe": several_positions}, multimask_output=True)
    decoder(**{**given, "image_embeddings": given["image_embeddings"].requires_grad_()}, multimask_output=True)
    with pytest.raises(ValueError, match="one row of an input or as many as of the others"):
        decoder(**{**given, "image_embeddings": draw(3, 64, 8, 8)}, multimask_output=True)
    empty = decoder(**inputs(model, 1, 0, 1), multimask_output=True)[0]
    assert empty.shape == (0, 3, 32, 32)
    assert fused_calls == []
    with torch.no_grad():  # nobody asks for the gradient
        decoder(**given, multimask_output=True)
    assert fused_calls == [2]


def test_gradients_of_a_direct_call(fused_calls: list[int]) -> None:
    model = random_model(TINY).requires_grad_(True)
    masks, iou = model.mask_decoder(**inputs(model, 1, 2, 1), multimask_output=True)
    (masks.square().mean() + iou.sum()).backward()
    assert model.mask_decoder.transformer.layers[0].self_attn.q_proj.weight.grad is not None
    assert fused_calls == []
