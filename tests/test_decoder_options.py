"""The options that SAM 2's mask decoder has beside SAM's: each against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close_l2
from models import TINY, random_image, random_model, randomise
from torch import Tensor

from sam import Prompt
from sam.inference.eligibility import why_not_fused
from sam.modeling.mask_decoder import MaskDecoder
from sam.modeling.transformer import TwoWayTransformer

C, GRID, PROMPTS = 64, 8, 3
ALL = {
    "use_high_res_features": True,
    "iou_prediction_use_sigmoid": True,
    "dynamic_multimask_via_stability": True,
    "pred_obj_scores": True,
    "pred_obj_scores_mlp": True,
    "use_multimask_token_for_obj_ptr": True,
}


def decoder_with(**options: Any) -> MaskDecoder:
    transformer = TwoWayTransformer(depth=2, embedding_dim=C, num_heads=8, mlp_dim=96)
    decoder = MaskDecoder(transformer_dim=C, transformer=transformer, iou_head_hidden_dim=48, **options)
    randomise(decoder)
    return decoder.eval()


def like(decoder: MaskDecoder, **options: Any) -> MaskDecoder:
    """A decoder of other options, with the weights of ``decoder`` where both have them."""
    other = decoder_with(**options)
    other.load_state_dict(decoder.state_dict(), strict=False)
    return other


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    """An image embedding, its positions, two tokens for each of three prompts, and a dense embedding."""
    image = (1, C, GRID, GRID)
    return drawn(*image), drawn(*image, seed=1), drawn(PROMPTS, 2, C, seed=2), drawn(*image, seed=3)


def high_res() -> list[Tensor]:
    return [drawn(1, C // 8, 4 * GRID, 4 * GRID, seed=4), drawn(1, C // 4, 2 * GRID, 2 * GRID, seed=5)]


def test_defaults_have_the_weights_of_sam_only() -> None:
    extra = {
        name.partition(".")[0] for name in set(decoder_with(**ALL).state_dict()) - set(decoder_with().state_dict())
    }
    assert extra == {"obj_score_token", "pred_obj_score_head", "conv_s0", "conv_s1"}


@torch.no_grad()
def test_predicted_iou_through_a_sigmoid(inputs: tuple[Tensor, ...]) -> None:
    plain = decoder_with()
    masks, iou = plain(*inputs, True)
    squashed_masks, squashed = like(plain, iou_prediction_use_sigmoid=True)(*inputs, True)
    assert torch.equal(masks, squashed_masks)
    assert torch.equal(squashed, iou.sigmoid())


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@torch.no_grad()
def test_an_object_score_token_is_one_more_token_before_the_prompts(kernels: str, inputs: tuple[Tensor, ...]) -> None:
    """Attention does not know the order of tokens: masks are those of a SAM decoder that is given it as a prompt."""
    decoder = decoder_with(pred_obj_scores=True)
    decoder.kernels = kernels
    assert why_not_fused(mask_decoder=decoder) is None
    image, pe, sparse, dense = inputs
    token = decoder.obj_score_token.weight.expand(PROMPTS, 1, C)
    plain = like(decoder)
    plain.kernels = "reference"
    for multimask_output in (True, False):
        expected = plain(image, pe, torch.cat([token, sparse], dim=1), dense, multimask_output)
        for ours, other in zip(decoder(*inputs, multimask_output), expected, strict=True):
            assert_close_l2(ours, other, 1e-5, "masks or IoU")


@pytest.mark.parametrize("mlp", [False, True])
@torch.no_grad()
def test_object_scores_and_tokens(mlp: bool, inputs: tuple[Tensor, ...]) -> None:
    decoder = decoder_with(pred_obj_scores=True, pred_obj_scores_mlp=mlp)
    assert isinstance(decoder.pred_obj_score_head, torch.nn.Linear) is not mlp
    image, pe, sparse, dense = inputs
    weights = [decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight]
    tokens = torch.cat([torch.cat(weights).expand(PROMPTS, -1, -1), sparse], dim=1)
    each = (PROMPTS, -1, -1, -1)
    tokens, _ = decoder.transformer((image + dense).expand(each), pe.expand(each), tokens)
    outputs = decoder.predict_all(*inputs)
    assert outputs.object_scores is not None
    assert_close_l2(outputs.object_scores, decoder.pred_obj_score_head(tokens[:, 0]), 1e-6, "object scores")
    assert_close_l2(outputs.iou, decoder.iou_prediction_head(tokens[:, 1]), 1e-6, "IoU")
    assert_close_l2(outputs.mask_tokens, tokens[:, 2:6], 1e-6, "mask tokens")
    assert decoder_with().predict_all(*inputs).object_scores is None


@pytest.mark.parametrize(
    ("option", "multimask_output", "rows"),
    [
        (True, True, slice(1, None)),
        (True, False, slice(0, 1)),
        (False, True, slice(0, 1)),
        (False, False, slice(0, 1)),
    ],
)
def test_the_tokens_of_the_object(option: bool, multimask_output: bool, rows: slice) -> None:
    decoder, tokens = decoder_with(use_multimask_token_for_obj_ptr=option), drawn(PROMPTS, 4, C)
    assert torch.equal(decoder.object_tokens(tokens, multimask_output), tokens[:, rows])


@torch.no_grad()
def test_upscaling_adds_the_finer_features(inputs: tuple[Tensor, ...]) -> None:
    decoder = decoder_with(use_high_res_features=True)
    fine, coarse = high_res()
    up1, norm, _, up2, _ = decoder.output_upscaling
    seen = []
    decoder.transformer.register_forward_hook(lambda module, args, result: seen.append(result))
    masks, _ = decoder.predict_masks(*inputs, high_res_features=[fine, coarse])
    tokens, keys = seen[0]
    x = keys.transpose(1, 2).unflatten(2, (GRID, GRID))
    x = F.conv_transpose2d(x, up1.weight, up1.bias, stride=2) + coarse
    x = F.layer_norm(x.permute(0, 2, 3, 1), (C // 4,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    x = F.gelu(F.conv_transpose2d(F.gelu(x), up2.weight, up2.bias, stride=2) + fine)
    hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    assert_close_l2(masks, torch.einsum("pmc,pchw->pmhw", hyper, x), 1e-5, "masks")


@torch.no_grad()
def test_finer_features_and_the_option_go_together(inputs: tuple[Tensor, ...]) -> None:
    decoder, plain = decoder_with(use_high_res_features=True), decoder_with()
    assert why_not_fused(mask_decoder=decoder) is None
    expected = [x[:, 1:] for x in decoder.predict_masks(*inputs, high_res_features=high_res())]
    for ours, other in zip(decoder(*inputs, True, high_res_features=high_res()), expected, strict=True):
        assert_close_l2(ours, other, 1e-5, "fused")
    decoder.kernels = "reference"
    for ours, other in zip(decoder(*inputs, True, high_res_features=high_res()), expected, strict=True):
        assert torch.equal(ours, other)
    with pytest.raises(ValueError, match="takes two high_res_features, got 0"):
        decoder(*inputs, True)
    with pytest.raises(ValueError, match="takes no high_res_features, got 2"):
        plain(*inputs, True, high_res_features=high_res())


def test_an_unstable_single_mask_gives_way_to_the_best_alternative() -> None:
    decoder = decoder_with(dynamic_multimask_via_stability=True, dynamic_multimask_stability_thresh=0.6)
    masks, iou = drawn(3, 4, 2, 2), drawn(3, 4, seed=1)
    masks[0, 0] = torch.tensor([[1.0, 1.0], [0.01, -1.0]])  # 2 of 3 pixels at +-0.05: stable
    masks[1, 0] = torch.tensor([[1.0, 0.01], [0.01, -1.0]])  # 1 of 3: not
    masks[2, 0] = -1.0  # empty: stable
    chosen, chosen_iou = decoder.choose_masks(masks, iou, multimask_output=False)
    best = 1 + int(iou[1, 1:].argmax())
    assert torch.equal(chosen[:, 0], torch.stack([masks[0, 0], masks[1, best], masks[2, 0]]))
    assert torch.equal(chosen_iou[:, 0], torch.stack([iou[0, 0], iou[1, best], iou[2, 0]]))
    assert torch.equal(decoder.choose_masks(masks, iou, True)[0], masks[:, 1:])
    assert torch.equal(decoder.train().choose_masks(masks, iou, False)[0], masks[:, :1])


@torch.no_grad()
def test_an_option_set_later_is_heeded() -> None:
    model = random_model(TINY)
    embedding, prompts = model.encode(random_image(48, 60)), [Prompt([(20 + 9 * i, 25)], [1]) for i in range(4)]
    before = model.predict(embedding, prompts, multimask_output=False)
    everything = model.predict(embedding, prompts, multimask_output=True)
    decoder = model.mask_decoder
    decoder.dynamic_multimask_via_stability, decoder.dynamic_multimask_stability_thresh = True, 1.1  # never stable
    after = model.predict(embedding, prompts, multimask_output=False)
    best, row = everything.iou_predictions.argmax(dim=1), torch.arange(4)
    assert not torch.allclose(before.low_res_logits, after.low_res_logits)
    assert_close_l2(after.low_res_logits[:, 0], everything.low_res_logits[row, best], 1e-5, "masks")
    assert_close_l2(after.iou_predictions[:, 0], everything.iou_predictions[row, best], 1e-5, "IoU")
    assert model.uses_fused_decoder


@torch.no_grad()
def test_a_decoder_pickled_without_options_is_sam(inputs: tuple[Tensor, ...]) -> None:
    decoder = decoder_with()
    state = {name: value for name, value in decoder.__getstate__().items() if name not in MaskDecoder.OPTIONS}
    old = MaskDecoder.__new__(MaskDecoder)
    old.__setstate__(state)
    for ours, other in zip(old(*inputs, False), decoder(*inputs, False), strict=True):
        assert torch.equal(ours, other)


def test_options_tell_models_apart() -> None:
    model = random_model(TINY)
    plain = model.model_hash
    model.mask_decoder.dynamic_multimask_via_stability = True
    model.weights_changed()
    assert model.model_hash != plain
    model.mask_decoder.dynamic_multimask_via_stability = False
    model.weights_changed()
    assert model.model_hash == plain
