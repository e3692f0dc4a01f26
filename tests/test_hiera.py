"""SAM 2's image encoder: the fused form against its modules, and what keeps a block from running fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomise
from torch import Tensor, nn

from fastsam_kernels.numerics import relative_error
from sam.config import HieraConfig
from sam.inference import fused_hiera
from sam.inference.eligibility import why_not_fused
from sam.modeling import hiera
from sam.modeling.build import build_hiera_encoder
from sam.modeling.feature_pyramid import ImageEncoder

# Every irregularity: windows that are cut at one edge or both, a global block, three blocks that pool.
SMALL = HieraConfig(16, 1, (1, 2, 4, 2), (5,), d_model=32)


@pytest.fixture
def encoder() -> ImageEncoder:
    result = build_hiera_encoder(SMALL).eval().requires_grad_(False)
    randomise(result)
    return result


@pytest.fixture
def finer() -> list[nn.Conv2d]:
    result = [nn.Conv2d(32, 4, 1).requires_grad_(False), nn.Conv2d(32, 8, 1).requires_grad_(False)]
    for conv in result:
        randomise(conv)
    return result


def reference(encoder: ImageEncoder, pixels: Tensor) -> list[Tensor]:
    encoder.kernels = "reference"
    maps: Any = encoder(pixels)["backbone_fpn"]
    encoder.kernels = "auto"
    return maps


def fused(encoder: ImageEncoder, finer: list[nn.Conv2d], pixels: Tensor, kernels: str = "torch") -> list[Tensor]:
    made = fused_hiera.image_features(encoder, finer, pixels, kernels)
    assert made is not None
    return [*made[1], made[0]]


def in_grid_order(made: Any, pixels: Tensor, run: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    return run(pixels)


@pytest.mark.parametrize("size", [(256, 256), (96, 352), (32, 64)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ["windows", "grid"])
def test_equals_the_modules(
    encoder: ImageEncoder,
    finer: list[nn.Conv2d],
    size: tuple[int, int],
    batch: int,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if order == "grid":  # as on a GPU; a single image in the order of windows on a CPU
        batch += 1
        monkeypatch.setattr(fused_hiera, "_per_image", in_grid_order)
    encoder, finer = encoder.double(), [conv.double() for conv in finer]
    pixels = torch.randn(batch, 3, *size, dtype=torch.float64)
    maps = reference(encoder, pixels)
    for ours, official in zip(encoder(pixels)["backbone_fpn"], maps, strict=True):
        assert ours.shape == official.shape
        assert relative_error(ours, official) < 1e-12
    official = [finer[0](maps[0]), finer[1](maps[1]), maps[2]]
    for ours, truth in zip(fused(encoder, finer, pixels), official, strict=True):
        assert ours.shape == truth.shape
        assert relative_error(ours, truth) < 1e-12


def test_positions_are_the_modules(encoder: ImageEncoder) -> None:
    pixels = torch.randn(2, 3, 64, 96)
    ours: Any = encoder(pixels)
    encoder.kernels = "reference"
    official: Any = encoder(pixels)
    assert list(ours) == list(official) == ["vision_features", "vision_pos_enc", "backbone_fpn"]
    for a, b in zip(ours["vision_pos_enc"], official["vision_pos_enc"], strict=True):
        assert torch.equal(a, b)
    assert ours["vision_features"] is ours["backbone_fpn"][-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["model", "autocast"])
def test_narrow_numbers(encoder: ImageEncoder, finer: list[nn.Conv2d], dtype: torch.dtype, how: str) -> None:
    pixels = torch.randn(1, 3, 96, 128)
    maps = reference(encoder, pixels)
    truth = [finer[0](maps[0]), finer[1](maps[1]), maps[2]]
    if how == "model":
        pixels, encoder, finer = pixels.to(dtype), encoder.to(dtype), [conv.to(dtype) for conv in finer]
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        official = reference(encoder, pixels)
        official = [finer[0](official[0]), finer[1](official[1]), official[2]]
        ours = fused(encoder, finer, pixels)
    for a, b, exact in zip(ours, official, truth, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, exact) < 2 * relative_error(b, exact) + torch.finfo(dtype).eps


def test_weights_that_change_count(encoder: ImageEncoder, finer: list[nn.Conv2d]) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    before = fused(encoder, finer, pixels)
    with torch.no_grad():
        finer[0].weight.mul_(2)
        encoder.trunk.pos_embed.mul_(2)
    after, maps = fused(encoder, finer, pixels), reference(encoder, pixels)
    assert relative_error(after[0], finer[0](maps[0])) < 1e-5
    assert relative_error(before[2], after[2]) > 1e-3


def test_a_side_that_is_no_multiple_of_32(encoder: ImageEncoder) -> None:
    for kernels in ("reference", "auto"):
        encoder.kernels = kernels
        with pytest.raises(ValueError, match="multiples of 32 px, got 48 x 64"):
            encoder(torch.randn(1, 3, 48, 64))


def counting(call: Callable[..., Any], called: list[nn.Module]) -> Callable[..., Any]:
    def counted(block: nn.Module, level: Any) -> Any:
        called.append(block)
        return call(block, level)

    return counted


def test_a_hook_in_a_block_sees_windows_and_the_others_stay_fused(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randn(1, 3, 256, 256)
    expected = encoder(pixels)["backbone_fpn"]
    shapes: list[tuple[int, ...]] = []
    encoder.trunk.blocks[6].attn.register_forward_hook(lambda m, inputs, output: shapes.append(tuple(inputs[0].shape)))
    called: list[nn.Module] = []
    monkeypatch.setattr(fused_hiera, "_call_block", counting(fused_hiera._call_block, called))
    result = encoder(pixels)["backbone_fpn"]
    assert shapes == [(4, 14, 14, 64)]  # 16 tokens make two windows of 14 each way
    assert called == [encoder.trunk.blocks[6]]
    for a, b in zip(result, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_hook_sees_all_images_of_a_batch(encoder: ImageEncoder) -> None:
    seen: dict[str, list[torch.Size]] = {"auto": [], "reference": []}
    encoder.trunk.blocks[4].register_forward_hook(lambda m, inputs, output: seen[encoder.kernels].append(output.shape))
    for encoder.kernels in seen:
        encoder(torch.randn(3, 3, 64, 64))
    assert seen["auto"] == seen["reference"]
    assert seen["auto"][0][0] == 3


@pytest.mark.parametrize("order", ["windows", "grid"])
def test_what_a_hook_keeps_stays_as_it_was(encoder: ImageEncoder, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if order == "grid":
        monkeypatch.setattr(fused_hiera, "_per_image", in_grid_order)
    kept: dict[str, list[Tensor]] = {}
    for block in (0, 4, 5):
        encoder.trunk.blocks[block].register_forward_hook(lambda m, inputs, output: values.extend([*inputs, output]))
    pixels = torch.randn(1 if order == "windows" else 2, 3, 64, 64)
    for kernels in ("auto", "reference"):
        encoder.kernels, values = kernels, kept.setdefault(kernels, [])
        encoder(pixels)
    assert len(kept["auto"]) == len(kept["reference"]) == 6
    for ours, official in zip(kept["auto"], kept["reference"], strict=True):
        assert relative_error(ours, official) < 1e-5


def test_a_stand_in_for_qkv_acts(encoder: ImageEncoder) -> None:
    class Lora(nn.Module):
        def __init__(self, qkv: nn.Linear) -> None:
            super().__init__()
            self.qkv = qkv

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(x)
            qkv[:, :, :, :4] += 1  # in place on four dimensions, as such adapters do
            return qkv

    pixels = torch.randn(1, 3, 64, 64)
    encoder.trunk.blocks[0].attn.qkv = Lora(encoder.trunk.blocks[0].attn.qkv)  # type: ignore[arg-type]
    ours = encoder(pixels)["backbone_fpn"]
    for a, b in zip(ours, reference(encoder, pixels), strict=True):
        assert relative_error(a, b) < 1e-5
    assert why_not_fused(image_encoder=encoder) is None


def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
    return [2 * x for x in output] if isinstance(output, list) else 2 * output


def patch_trunk(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = encoder.trunk
    monkeypatch.setattr(trunk, "forward", lambda x: doubled(trunk, (x,), hiera.Hiera.forward(trunk, x)))


def patch_class_of_blocks(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = hiera.MultiScaleBlock.forward
    monkeypatch.setattr(hiera.MultiScaleBlock, "forward", lambda block, x: 2 * forward(block, x))


def patch_pooling(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiera, "do_pool", lambda x, pool, norm=None: x if pool is None else x[:, ::2, ::2])


def patch_positions(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hiera.Hiera, "_get_pos_embed", lambda trunk, hw: 1.0)


CHANGES: dict[str, Callable[[ImageEncoder, pytest.MonkeyPatch], Any]] = {
    "a hook on the trunk": lambda encoder, _: encoder.trunk.register_forward_hook(doubled),
    "a hook on the patches": lambda encoder, _: encoder.trunk.patch_embed.register_forward_hook(doubled),
    "a hook on a norm": lambda encoder, _: encoder.trunk.blocks[4].norm2.register_forward_hook(doubled),
    "a hook on the neck": lambda encoder, _: encoder.neck.convs[3].register_forward_hook(doubled),
    "a forward of the trunk": patch_trunk,
    "a patched class of blocks": patch_class_of_blocks,
    "a patched pooling": patch_pooling,
    "patched positions": patch_positions,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_patched_acts_as_officially(
    encoder: ImageEncoder, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    before = encoder(pixels)["backbone_fpn"]
    CHANGES[change](encoder, monkeypatch)
    after = encoder(pixels)["backbone_fpn"]
    for a, b in zip(after, reference(encoder, pixels), strict=True):
        assert relative_error(a, b) < 1e-5
    assert max(relative_error(a, b) for a, b in zip(after, before, strict=True)) > 1e-2


def test_gradients_are_official(encoder: ImageEncoder) -> None:
    encoder.requires_grad_(True)
    pixels = torch.randn(1, 3, 64, 64)
    gradients = {}
    for kernels in ("auto", "reference"):
        encoder.kernels = kernels
        encoder.zero_grad()
        sum(x.square().sum() for x in encoder(pixels)["backbone_fpn"]).backward()  # type: ignore[union-attr]
        gradients[kernels] = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    assert len(gradients["auto"]) == len(list(encoder.parameters()))
    for a, b in zip(gradients["auto"], gradients["reference"], strict=True):
        assert torch.equal(a, b)
