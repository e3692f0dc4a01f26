"""Decoders with hooks, patches, subclasses and modules of a user's own: ``predict`` answers as their official calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close_l2
from models import TINY, random_image, random_model

import sam
from sam import Prompt, Sam
from sam.modeling.mask_decoder import MaskDecoder


def halved(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (0.5 * outputs[0], *outputs[1:])


def half(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return 0.5 * output


class Wrapped(torch.nn.Module):
    """A module as official code calls it, its first output halved."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: torch.Tensor, **named: torch.Tensor | bool) -> object:
        result = self.inner(*arguments, **named)
        return 0.5 * result if isinstance(result, torch.Tensor) else (0.5 * result[0], *result[1:])


class HalvedMasks(MaskDecoder):
    def predict_masks(self, *arguments: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masks, iou = super().predict_masks(*arguments, **named)
        return 0.5 * masks, iou


def patch_attention(model: Sam) -> None:
    attention = model.mask_decoder.transformer.layers[1].cross_attn_token_to_image
    official = attention.forward
    attention.forward = lambda q, k, v: 0.5 * official(q, k, v)  # type: ignore[method-assign]


# What users of the official package do to a decoder, and modules of the same effect on ours as officially called.
CHANGES: dict[str, Callable[[Sam], object]] = {
    "hooked decoder": lambda m: m.mask_decoder.register_forward_hook(halved),
    "hooked prompt encoder": lambda m: m.prompt_encoder.register_forward_hook(halved),
    "hooked transformer": lambda m: m.mask_decoder.transformer.register_forward_hook(halved),
    "hooked block": lambda m: m.mask_decoder.transformer.layers[0].register_forward_hook(halved),
    "hooked projection": lambda m: m.mask_decoder.transformer.layers[
        1
    ].cross_attn_token_to_image.v_proj.register_forward_hook(half),
    "hooked upscaling": lambda m: m.mask_decoder.output_upscaling.register_forward_hook(half),
    "patched attention": patch_attention,
    "subclassed decoder": lambda m: setattr(m.mask_decoder, "__class__", HalvedMasks),
    "wrapped decoder": lambda m: setattr(m, "mask_decoder", Wrapped(m.mask_decoder)),
    "wrapped block": lambda m: m.mask_decoder.transformer.layers.__setitem__(
        0, Wrapped(m.mask_decoder.transformer.layers[0])
    ),
    "wrapped MLP": lambda m: m.mask_decoder.output_hypernetworks_mlps.__setitem__(
        1, Wrapped(m.mask_decoder.output_hypernetworks_mlps[1])
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_user_put_into_the_decoder_is_reached(name: str) -> None:
    model = random_model(TINY)
    image = random_image(90, 128)
    embedding = model.encode(image)
    prompts = [
        Prompt([(40, 40)], [1]),
        Prompt([(9, 9), (30, 50)], [0, 1], box=(2, 3, 60, 70)),
        Prompt(box=(4, 4, 99, 50)),
    ]
    untouched = [model.predict(embedding, prompts, multimask).low_res_logits for multimask in (True, False)]
    CHANGES[name](model)
    assert not model.uses_fused_decoder
    for multimask, before in zip((True, False), untouched, strict=True):
        result = model.predict(embedding, prompts, multimask)
        assert not torch.allclose(result.low_res_logits, before, rtol=1e-3)
        points = [
            None if p.points is None else (torch.tensor(p.points)[None], torch.tensor(p.labels)[None]) for p in prompts
        ]
        for row, (prompt, clicks) in enumerate(zip(prompts, points, strict=True)):
            box = None if prompt.box is None else torch.tensor(prompt.box)[None]
            with torch.no_grad():
                sparse, dense = model.prompt_encoder(points=clicks, boxes=box, masks=None)
                masks, iou = model.mask_decoder(
                    image_embeddings=embedding.features,
                    image_pe=model.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=multimask,
                )
            assert_close_l2(result.low_res_logits[row], masks[0], 1e-5, f"{name}, prompt {row}")
            assert_close_l2(result.iou_predictions[row], iou[0], 1e-5, f"{name}, prompt {row}")
    records = sam.SamAutomaticMaskGenerator(
        model, points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0
    ).generate(image)
    assert len(records) > 0
