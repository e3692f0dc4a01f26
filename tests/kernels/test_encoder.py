"""The image encoder around ``rel_pos_attention``: every form against the official modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import assert_close_l2, assert_within_budget, relative_l2
from kernels.foundation import DTYPES
from models import TINY, random_model
from torch import Tensor

import sam
from fastsam_kernels.numerics import Budget
from sam.inference import fused_encoder
from sam.inference.fused_encoder import attend, encode, plan_blocks, run_block
from sam.modeling.image_encoder import Block, ImageEncoderViT


def small_encoder(**changes: Any) -> ImageEncoderViT:
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    sizes |= {"out_chans": 16, "use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,)}
    torch.manual_seed(0)
    encoder = ImageEncoderViT(**(sizes | changes)).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # those that start at zero too
    return encoder


def encoder_formula(encoder: ImageEncoderViT) -> Any:
    def formula(pixels: Tensor) -> Tensor:
        return encode(encoder.to(pixels.dtype), pixels, "reference")

    return formula


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder_within_budget(device: torch.device, dtype: torch.dtype, kernels: str) -> None:
    encoder = small_encoder().to(device, dtype)
    pixels = torch.randn(2, 3, 64, 64).to(device, dtype)
    out = encode(encoder, pixels, kernels)
    assert_within_budget(out, encoder_formula(encoder), (pixels,), f"encoder, {kernels}, {dtype}")


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"use_rel_pos": False}, {"use_abs_pos": False}], ids=str)
def test_encoder_without_a_part(changes: dict[str, Any]) -> None:
    encoder, pixels = small_encoder(**changes), torch.randn(1, 3, 64, 64)
    assert_close_l2(encode(encoder, pixels, "torch"), encode(encoder, pixels, "reference"), 1e-5, str(changes))


def test_tables_of_another_size_are_resized() -> None:
    block = Block(64, num_heads=2, use_rel_pos=True, input_size=(8, 8)).requires_grad_(False)
    block.attn.rel_pos_h.normal_()
    block.attn.rel_pos_w.normal_()
    x = torch.randn(1, 5, 11, 64)
    first = attend(block, x, "torch")
    assert_close_l2(first, block.attn(x), 1e-6, "resized tables")
    block.attn.rel_pos_h.mul_(2)
    assert relative_l2(attend(block, x, "torch"), first) > 1e-3


def test_gradients_flow_through_the_encoder() -> None:
    encoder, pixels = small_encoder().double().requires_grad_(True), torch.randn(1, 3, 64, 64).double()
    gradients = []
    for kernels in ("reference", "torch"):
        encoder.zero_grad()
        encode(encoder, pixels, kernels).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close_l2(gradients[1][name], expected, 1e-9, name)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_block_leaves_its_input_alone(contiguous: bool) -> None:
    """Hooks keep what passes between blocks."""
    encoder = small_encoder()
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 8, 8, 64) if contiguous else torch.randn(2, 64, 8, 8).permute(0, 2, 3, 1)
    before = x.clone()
    out = run_block(block, x, "torch", plan_blocks(encoder)[0])
    assert torch.equal(x, before)
    assert_close_l2(out, block(x), 1e-6, "block")


def test_autocast_reaches_the_projections() -> None:
    encoder, pixels = small_encoder(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = encode(encoder, pixels, "reference"), encode(encoder, pixels, "torch")
        assert torch.equal(encoder(pixels), encode(encoder, pixels, "auto"))
    assert out.dtype == expected.dtype
    truth = encode(encoder, pixels, "reference")
    assert relative_l2(out, truth) <= Budget(relative_l2(expected, truth), torch.bfloat16).limit


def test_the_model_s_kernels_reach_its_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY)
    seen: list[str] = []
    attention = fused_encoder.rel_pos_attention

    def spy(*tensors: Any, kernels: str, **options: Any) -> Tensor:
        seen.append(kernels)
        return attention(*tensors, kernels=kernels, **options)

    monkeypatch.setattr(fused_encoder, "rel_pos_attention", spy)
    image = torch.zeros(64, 48, 3, dtype=torch.uint8)
    predictor = sam.SamPredictor(model)

    def ways() -> Iterator[None]:
        yield model.encode(image.numpy())  # type: ignore[misc]
        yield predictor.set_image(image.numpy())
        yield model([{"image": torch.zeros(3, 128, 96), "original_size": (64, 48)}], False)  # type: ignore[misc]

    for kernels in ("reference", "torch"):
        model.kernels = kernels
        for _ in ways():
            assert seen == ([] if kernels == "reference" else [kernels] * TINY.encoder_depth)
            seen.clear()


class Adapter(torch.nn.Module):
    """What people put in place of a module: it takes what the official code gives it, and nothing else."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mix = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if y.shape == x.shape else 2 * y


@pytest.mark.parametrize(
    "place", ["blocks.0", "blocks.0.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp"]
)
def test_modules_in_place_of_ours(place: str) -> None:
    encoder, pixels = small_encoder(), torch.randn(1, 3, 64, 64)
    owner, name = encoder.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    setattr(owner, name, Adapter(owner.get_submodule(name)).requires_grad_(False))
    assert_close_l2(encode(encoder, pixels, "torch"), encode(encoder, pixels, "reference"), 1e-5, place)


def test_an_encoder_in_place_of_ours() -> None:
    """Other models with SAM's decoder put their own encoder there; ``torch.compile`` wraps it."""
    model, pixels = random_model(TINY), torch.randn(1, 3, 128, 128)
    image = torch.zeros(64, 48, 3, dtype=torch.uint8).numpy()
    model.kernels = "torch"
    expected, features = model.image_features(pixels).embedding, model.encode(image).features
    calls = []
    plain = ImageEncoderViT.forward

    class Foreign(torch.nn.Module):
        img_size = 128

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageEncoderViT, "forward", lambda self, x: calls.append(1) or plain(self, x))
        encoder = model.image_encoder
        model.image_encoder = torch.compile(encoder, backend="eager")  # type: ignore[assignment]
        assert_close_l2(model.image_features(pixels).embedding, expected, 1e-6, "compiled")
        model.image_encoder = Foreign(encoder)  # type: ignore[assignment]
        assert_close_l2(model.image_features(pixels).embedding, expected, 1e-5, "another encoder")
        assert_close_l2(model.encode(image).features, features, 1e-5, "another encoder, from an image")
    assert len(calls) == 3


@pytest.mark.parametrize("place", ["blocks.0", "blocks.0.attn", "blocks.0.norm2", "blocks.0.mlp", "blocks.0.mlp.lin1"])
def test_hooks_see_what_they_see_officially(place: str) -> None:
    """Features are read through hooks: once per image, of all tokens, not of a piece that stays in the cache."""
    encoder, pixels = small_encoder(), torch.randn(1, 3, 64, 64)
    seen: list[Tensor] = []
    encoder.get_submodule(place).register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    for kernels in ("torch", "reference"):
        encode(encoder, pixels, kernels)
    assert [x.shape[:3] for x in seen] == 2 * [(9, 3, 3) if place == "blocks.0.attn" else (1, 8, 8)]
    assert_close_l2(seen[0], seen[1], 1e-5, place)


def test_direct_calls_are_fused_while_nothing_wants_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pixels = small_encoder(), torch.randn(1, 3, 64, 64)
    official = encode(encoder, pixels, "reference")
    fused: list[Tensor] = []
    run = fused_encoder.encode
    monkeypatch.setattr(fused_encoder, "encode", lambda *given: fused.append(run(*given)) or fused[-1])
    assert_close_l2(encoder(pixels), official, 1e-5, "fused")
    assert len(fused) == 1
    encoder.kernels = "reference"
    assert torch.equal(encoder(pixels), official)
    encoder.kernels = "auto"
    assert torch.equal(encoder(pixels.clone().requires_grad_()).detach(), official)
    encoder.neck[0].weight.requires_grad_()
    assert encoder(pixels).requires_grad
    assert len(fused) == 1
    with torch.no_grad():
        encoder(pixels)
    assert len(fused) == 2


@pytest.mark.slow
def test_nano_s_encoder_through_the_triton_form(device: torch.device) -> None:
    encoder = sam.load_model(device=device).requires_grad_(False).image_encoder
    pixels = torch.randn(1, 3, 512, 512).to(device)
    assert_within_budget(encode(encoder, pixels, "triton"), encoder_formula(encoder), (pixels,), "nano's encoder")
