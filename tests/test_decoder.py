"""The mask decoder: folded or not, ragged, asked for some masks only; against its modules in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from comparison import assert_close_l2, relative_l2
from models import TINY, random_image, random_model
from torch import Tensor

import sam
from fastsam_kernels import MAX_TOKENS, AbsorbedTokens, ImageTokens
from fastsam_kernels.numerics import Budget
from sam import ImageEmbedding, Prompt, Sam
from sam.inference import fused_decoder, fused_transformer
from sam.inference.packed_weights import pack_decoder
from sam.modeling.mask_decoder import MaskDecoder

SIDE = 4 * 8  # of TINY's low-resolution masks
OUTPUT_TOKENS = 5


def some_prompts(
    count: int, points: int, box: bool = False, mask: bool = False, seed: int = 0, side: int = SIDE
) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(
            points=rng.uniform(0, 60, (points, 2)) if points else None,
            labels=rng.integers(0, 2, points) if points else None,
            box=np.sort(rng.uniform(0, 60, (2, 2)), axis=0).reshape(4) if box else None,
            mask_input=rng.normal(0, 3, (1, side, side)) if mask else None,
        )
        for _ in range(count)
    ]


def outputs(model: Sam, embeddings: list[ImageEmbedding], prompts: list[list[Prompt]], multimask: bool) -> Tensor:
    result = model.predict(embeddings, prompts, multimask_output=multimask, return_logits=False)
    parts = [torch.cat([p.low_res_logits.flatten(), p.iou_predictions.flatten()]) for p in result]
    return torch.cat(parts).double()


def assert_decoder_within_budget(
    prompts: list[list[Prompt]],
    multimask: bool,
    kernels: str,
    dtype: torch.dtype = torch.float32,
    make: Callable[[], Sam] = lambda: random_model(TINY),
) -> None:
    """Hold the decoder to the budget; its baseline are the modules in the same dtype."""
    truth_model = make().double()
    truth_model.kernels = "reference"
    model = make().to(dtype=dtype)
    model.kernels = "reference"
    images = [random_image(48 + 4 * i, 60, seed=i) for i in range(len(prompts))]
    embeddings = [model.encode(image) for image in images]
    wide = [
        ImageEmbedding(e.features.double(), e.geometry, truth_model.model_hash, "custom", e.image_hash)
        for e in embeddings
    ]
    truth = outputs(truth_model, wide, prompts, multimask)
    baseline = relative_l2(outputs(model, embeddings, prompts, multimask), truth)
    model.kernels = kernels
    error = relative_l2(outputs(model, embeddings, prompts, multimask), truth)
    limit = Budget(baseline, dtype).limit
    assert error <= limit, f"{kernels}: {error:.2e} is over the budget of {limit:.2e} (modules {baseline:.2e})"


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 9, 64])
def test_numbers_of_prompts(count: int, multimask: bool) -> None:
    assert_decoder_within_budget([some_prompts(count, points=1)], multimask, "torch")


@pytest.mark.parametrize(("points", "box"), [(0, False), (1, True), (9, True), (10, False), (11, True), (64, True)])
@pytest.mark.parametrize("mask", [False, True])
def test_numbers_of_points_on_both_sides_of_folding(points: int, box: bool, mask: bool) -> None:
    assert_decoder_within_budget([some_prompts(2, points, box, mask)], True, "torch")


@pytest.mark.parametrize("images", [2, 3])
def test_ragged_images(images: int) -> None:
    prompts = [
        some_prompts(2, 1, seed=1) + some_prompts(1, 3, box=True, seed=2),
        some_prompts(1, 12, seed=3) + some_prompts(2, 1, mask=True, seed=4),
        [],
    ]
    assert_decoder_within_budget(prompts[:images], True, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    assert_decoder_within_budget([some_prompts(3, 2, box=True)], True, "torch", dtype)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_through_the_triton_forms(mask: bool, dtype: torch.dtype) -> None:
    assert_decoder_within_budget([some_prompts(2, 1, mask=mask), some_prompts(1, 3, box=True)], True, "triton", dtype)


def nano_of(grid: int) -> Callable[[], Sam]:
    """The embedded model on smaller pictures, so that the interpreter can follow."""
    return lambda: sam.load_model(device="cpu", image_size=16 * grid)


@pytest.mark.parametrize(
    ("grid", "dtype", "count"),
    [
        (8, torch.float32, 1),
        (8, torch.float16, 2),
        pytest.param(16, torch.float32, 2, marks=pytest.mark.slow),
        pytest.param(16, torch.float16, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nano_on_small_pictures(grid: int, dtype: torch.dtype, count: int) -> None:
    prompts = [some_prompts(count, 1), some_prompts(1, 3, box=True)]
    assert_decoder_within_budget(prompts, True, "triton", dtype, nano_of(grid))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("prompts", "multimask"),
    [
        *(([some_prompts(count, 1)], count % 2 == 1) for count in (1, 2, 7, 9, 64)),
        ([some_prompts(2, 1), some_prompts(1, 64, box=True), some_prompts(3, 9)], True),
        ([some_prompts(1, 2, mask=True), some_prompts(2, 0, box=True, mask=True)], False),
    ],
    ids=["1", "2", "7", "9", "64", "three images, up to 64 points and a box", "mask inputs"],
)
def test_nano_with_many_prompts(prompts: list[list[Prompt]], multimask: bool, kernels: str, dtype: torch.dtype) -> None:
    assert_decoder_within_budget(prompts, multimask, kernels, dtype, nano_of(8))


@pytest.mark.slow
def test_nano_through_the_triton_forms(nano: Sam, photo: np.ndarray) -> None:
    """The whole decoder of the embedded model in the interpreter, one click."""
    model = copy.deepcopy(nano)
    model.kernels = "reference"
    embedding, prompts = model.encode(photo), [Prompt([(200, 150)], [1])]
    expected = model.predict(embedding, prompts).low_res_logits
    model.kernels = "triton"
    assert_close_l2(model.predict(embedding, prompts).low_res_logits, expected, 1e-5, "nano")


def test_padding_is_exact() -> None:
    """A prompt decoded beside a longer one, and alone."""
    model = random_model(TINY)
    embedding = model.encode(random_image(48, 60))
    short, long = some_prompts(1, 1), some_prompts(1, 9, box=True)
    for longer in (long, some_prompts(1, 30)):  # folded, and beyond
        together = model.predict(embedding, short + longer).low_res_logits[0]
        assert_close_l2(together, model.predict(embedding, short).low_res_logits[0], 1e-5, "padded")


def test_masks_of_some_prompts_only() -> None:
    """The transformer and predicted IoU first; upscaling for the rows that are asked for, in their order."""
    model = random_model(TINY)
    packed, encoder = pack_decoder(model.mask_decoder), model.prompt_encoder
    features = model.encode(random_image(48, 60)).features
    coords, labels = torch.rand(6, 2, 2) * 60, torch.ones(6, 2, dtype=torch.int64)
    arguments = (
        features,
        encoder.get_dense_pe(),
        encoder.embed_tokens(coords, labels),
        encoder.no_mask_embed.weight.view(1, -1, 1, 1),
    )
    mask_slice, rows = MaskDecoder.mask_slice(True), torch.tensor([4, 1])
    for kernels in ("reference", "torch"):
        masks, iou = fused_decoder.decode(packed, *arguments, mask_slice=mask_slice, kernels=kernels)
        decoded = fused_decoder.decode_tokens(packed, *arguments, kernels=kernels)
        assert torch.equal(decoded.iou[:, mask_slice], iou)
        chunk = fused_decoder.decode_masks(decoded, mask_slice, rows, kernels)
        assert chunk.shape == (2, 3, SIDE, SIDE)
        assert_close_l2(chunk, masks[rows], 1e-5, kernels)
        assert fused_decoder.decode_masks(decoded, mask_slice, rows[:0], kernels).shape == (0, 3, SIDE, SIDE)


def test_folding_is_used_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the image is projected; what a user put in place of a projection is never folded."""
    calls: list[int] = []
    original = fused_transformer.two_way_attention

    def counted(image: ImageTokens, absorbed: AbsorbedTokens, *rest: object, **options: object) -> object:
        calls.append(absorbed.keys.shape[2])
        return original(image, absorbed, *rest, **options)

    monkeypatch.setattr(fused_transformer, "two_way_attention", counted)
    model = random_model(TINY)
    embedding = model.encode(random_image(48, 60))
    most = MAX_TOKENS - OUTPUT_TOKENS - 1  # a padding point goes with points
    model.predict(embedding, some_prompts(1, most))
    assert calls == [MAX_TOKENS] * 2  # one of each block
    calls.clear()
    model.predict(embedding, some_prompts(1, most + 1))
    assert calls == []
    final = model.mask_decoder.transformer.final_attn_token_to_image
    expected = model.predict(embedding, some_prompts(1, 1)).low_res_logits
    calls.clear()
    final.k_proj = torch.nn.Sequential(final.k_proj)
    assert_close_l2(model.predict(embedding, some_prompts(1, 1)).low_res_logits, expected, 1e-5, "k_proj replaced")
    assert calls == []


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("points", [1, 20])
def test_tokens_that_are_not_wanted_back_change_nothing(points: int, kernels: str) -> None:
    packed = pack_decoder(random_model(TINY).mask_decoder)
    draws = torch.Generator().manual_seed(0)
    keys, key_pe, tokens = (
        torch.randn(shape, generator=draws) for shape in ((2, 16, 64), (1, 16, 64), (2, OUTPUT_TOKENS + points, 64))
    )
    every, image = fused_transformer.run_transformer(packed, keys, key_pe, tokens, kernels=kernels)
    returned, same_image = fused_transformer.run_transformer(
        packed, keys, key_pe, tokens, num_output_tokens=OUTPUT_TOKENS, kernels=kernels
    )
    assert every.shape == tokens.shape
    assert torch.equal(same_image, image)
    torch.testing.assert_close(returned, every[:, :OUTPUT_TOKENS])


def test_weights_that_change_are_seen() -> None:
    """Nothing folded outlives the weights it was made of."""
    model = random_model(TINY)
    prompts = some_prompts(2, 1)
    embedding = model.encode(random_image(48, 60))
    before = model.predict(embedding, prompts).low_res_logits
    with torch.no_grad():
        model.mask_decoder.transformer.layers[1].cross_attn_token_to_image.v_proj.weight *= 1.5
    after = model.predict(embedding, prompts).low_res_logits
    assert relative_l2(after, before) > 1e-4
    model.kernels = "reference"
    assert_close_l2(after, model.predict(embedding, prompts).low_res_logits, 1e-5, "changed weights")


def test_gradients_reach_every_weight() -> None:
    model = random_model(TINY).requires_grad_(True)
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    for kernels in ("reference", "torch"):
        model.zero_grad()
        masks, iou = fused_decoder.decode(
            pack_decoder(decoder),
            torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(1)),
            encoder.get_dense_pe(),
            encoder.embed_tokens(torch.full((2, 2, 2), 20.0), torch.ones(2, 2, dtype=torch.int64)),
            encoder.no_mask_embed.weight.view(1, -1, 1, 1),
            mask_slice=slice(None),
            kernels=kernels,
        )
        (masks.square().mean() + iou.sum()).backward()
        grads = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
        if kernels == "reference":
            expected = grads
    # The bias of k adds the same to all scores of a query: its gradient is zero, and folding leaves it out.
    folded = {name for name in expected if name.endswith("token_to_image.k_proj.bias")}
    assert grads.keys() == expected.keys() - folded
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in grads.items():
        if name.endswith("k_proj.bias"):
            assert float(grad.abs().max()) <= 1e-5 * largest, name
        else:
            assert_close_l2(grad, expected[name], 1e-3, name)
