"""``sam.quantize``: what is quantised, scales that move exactly, files, and what a quantised model refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from comparison import relative_l2
from models import SMALL_2, TINY, random_image, random_model
from torch import Tensor, nn
from waiting import SECONDS

import sam
from benchmarks.quantization import plant_outliers
from sam import Prompt
from sam.engine import Engine
from sam.inference import Runtime, fused_encoder, fused_hiera
from sam.inference.token_order import Level
from sam.modeling import quantization
from sam.modeling.quantized_linear import QuantizedLinear
from sam.verify import verify

IMAGE = random_image(90, 128)
CONFIGS: dict[str, Any] = {"SAM": TINY, "SAM 2": SMALL_2}
LAYERS = {
    "SAM": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "SAM 2": ("attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1"),
}
both = pytest.mark.parametrize("family", CONFIGS)
one = pytest.mark.parametrize("family", ["SAM", pytest.param("SAM 2", marks=pytest.mark.slow)])


def model_of(family: str, **options: Any) -> Any:
    return random_model(CONFIGS[family], **options)


def features(model: Any) -> Tensor:
    return model.encode(IMAGE).features.float()


def planted(model: Any) -> Any:
    """The same function with channels of outliers: one in eight 64 times as large where it is quantised."""
    return plant_outliers(model, 0.125, 64.0)


@both
def test_four_layers_of_each_block_are_quantised(family: str) -> None:
    model = model_of(family)
    result = sam.quantize(model, "int8")
    layers = {name: layer for name, layer in result.named_modules() if isinstance(layer, QuantizedLinear)}
    trunk = result.image_encoder if family == "SAM" else result.image_encoder.trunk
    expected = {f"blocks.{index}.{name}" for index in range(len(trunk.blocks)) for name in LAYERS[family]}
    assert {name[name.index("blocks") :] for name in layers} == expected
    assert model.quantization is None
    assert result.quantization == "int8"
    assert result.name == "custom-int8"
    assert result.model_hash != model.model_hash
    others = {name: weight for name, weight in model.named_parameters() if "blocks" not in name}
    assert others
    assert all(torch.equal(weight, result.get_parameter(name)) for name, weight in others.items())


@both
@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_int8_computes_nearly_what_the_model_does(family: str, kernels: str) -> None:
    model = model_of(family)
    model.kernels = kernels
    truth = features(model)
    noise = relative_l2(features(copy.deepcopy(model).to(torch.bfloat16)), truth)
    error = relative_l2(features(sam.quantize(model, "int8")), truth)
    assert noise / 100 < error < 3 * noise


@torch.no_grad()
def run_block(model: Any, index: int, x: Tensor) -> Tensor:
    encoder = model.image_encoder
    if isinstance(model, sam.Sam):
        return fused_encoder.run_block(encoder.blocks[index], x, "auto", fused_encoder.plan_blocks(encoder)[index])
    block = encoder.trunk.blocks[index]
    level = Level.of(x, block.window_size or x.shape[1])
    return fused_hiera.run_block(block, level, "auto", keeps_input=True).grid()


@both
def test_a_fused_block_computes_what_its_modules_do(family: str) -> None:
    """The same up to the few codes that fall to the other side where fp32 rounds otherwise."""
    plain = model_of(family)
    model = sam.quantize(plain, "int8", smooth=False)
    trunk = model.image_encoder if family == "SAM" else model.image_encoder.trunk
    plan = (
        fused_encoder.plan_blocks(model.image_encoder)
        if family == "SAM"
        else fused_hiera.plan(model.image_encoder).blocks
    )
    assert all(block.quantized if family == "SAM" else block for block in plan)
    for index, block in enumerate(trunk.blocks):
        x = torch.randn(1, 12, 12, block.norm1.weight.numel(), generator=torch.Generator().manual_seed(index))
        fused = run_block(model, index, x.clone())
        model.kernels = "reference"
        by_modules = block(x)
        model.kernels = "auto"
        assert relative_l2(fused, by_modules) < 0.5 * relative_l2(by_modules, run_block(plain, index, x.clone())), index


@one
def test_hooks_see_what_modules_do(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    fused, seen = features(model), []
    trunk = model.image_encoder if family == "SAM" else model.image_encoder.trunk
    trunk.blocks[1].mlp.register_forward_hook(lambda *call: seen.append(call))
    assert relative_l2(features(model), fused) < 3e-2
    assert len(seen) == 1


@one
def test_fp8_by_its_formula(family: str) -> None:
    model = model_of(family)
    model.kernels = "reference"
    truth = features(model)
    int8, fp8 = (relative_l2(features(sam.quantize(model, scheme)), truth) for scheme in ("int8", "fp8"))
    assert int8 < fp8 < 10 * int8


@both
@pytest.mark.parametrize(
    ("calibration", "kernels"), [(None, "auto"), ([IMAGE], "reference")], ids=["from weights", "from images"]
)
def test_moved_scales_change_no_bit(family: str, calibration: Any, kernels: str) -> None:
    model = planted(model_of(family))
    model.kernels = kernels
    moved = copy.deepcopy(model)
    maxima = (
        quantization.estimated_maxima(moved)
        if calibration is None
        else quantization.measured_maxima(moved, calibration)
    )
    quantization.move_scales(moved, maxima)
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, moved.get_parameter(name))]
    assert any("norm1" in name for name in changed)
    assert torch.equal(features(moved), features(model))


@both
def test_outliers_need_moved_scales(family: str) -> None:
    model = model_of(family)
    hard, truth = planted(model), features(model)
    assert torch.equal(features(hard), truth)
    plain = relative_l2(features(sam.quantize(model, "int8")), truth)
    for calibration in (None, [IMAGE]):
        assert relative_l2(features(sam.quantize(hard, "int8", calibration)), truth) < 1.5 * plain
    assert relative_l2(features(sam.quantize(hard, "int8", smooth=False)), truth) > 3 * plain


@one
def test_images_do_not_depend_on_their_batch(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    images = [random_image(100, 128, seed) for seed in range(3)]
    alone = [model.encode(image).features for image in images]
    together = model.encode(images, batch_size=3)
    for one, embedding in zip(alone, together, strict=True):
        assert relative_l2(embedding.features, one) < 5e-3  # attention sums in another order, and codes fall


@one
def test_codes_stay_codes_in_any_dtype(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    layer = next(layer for layer in model.modules() if isinstance(layer, QuantizedLinear))
    codes = layer.weight.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight, codes)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert model.encode(IMAGE).features.dtype == torch.bfloat16
    fp8 = QuantizedLinear.of(nn.Linear(4, 3), "fp8").double()
    assert (fp8.weight.dtype, fp8.bias.dtype) == (torch.float8_e4m3fn, torch.float64)


def test_dequantised_weights_are_those_of_the_codes() -> None:
    model = sam.quantize(model_of("SAM"), "int8")
    plain = quantization.dequantized(model)
    assert plain.quantization is None
    layer, linear = model.image_encoder.blocks[0].attn.qkv, plain.image_encoder.blocks[0].attn.qkv
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, layer.weight * layer.weight_scale[:, None])
    assert relative_l2(features(model), features(plain)) < 3e-2


# Ways to use it -----------------------------------------------------------------------------------------------


@both
def test_predictions_sessions_engine_and_compiled_models(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    embedding = model.encode(IMAGE)
    click = Prompt([(60, 40)], [1])
    expected = model.predict(embedding, [click])
    assert np.array_equal(sam.InteractiveSession(model, embedding).click(60, 40).mask().shape, IMAGE.shape[:2])
    with Engine(model) as engine:
        (answer,) = engine.segment(IMAGE, [click]).result(SECONDS)
    assert len(answer.rles) == 3
    model.runtime = Runtime(model)
    assert "is quantised to int8, whose products torch.compile does not take" in str(
        model.runtime.why_encoder_not_compiled
    )
    assert torch.equal(model.encode(IMAGE).features, embedding.features)
    model.runtime = None
    lines = model.explain().splitlines()
    assert lines[2].startswith("The linear layers of its blocks are int8, a scale per token and output channel")
    assert {"quantize_rows", "int8_linear"} < {line.partition(":")[0] for line in lines}
    assert torch.isfinite(expected.low_res_logits).all()


def test_embeddings_of_another_scheme_are_refused_by_name() -> None:
    model = model_of("SAM")
    embedding = model.encode(IMAGE)
    with pytest.raises(ValueError, match=r"made by model custom [0-9a-f]+, not by this model, custom-int8 [0-9a-f]+"):
        sam.quantize(model, "int8").predict(embedding, [Prompt([(1, 1)], [1])])


def test_verify_holds_it_against_its_weights_in_fp64() -> None:
    checks = list(verify(sam.quantize(model_of("SAM"), "int8"), IMAGE))
    assert {"encoder block", "image encoder", "image to masks"} < {check.operation for check in checks}
    assert [check for check in checks if not check.passed] == []
    whole = next(check for check in checks if check.operation == "image encoder")
    assert whole.noise > 1e-4, "plain PyTorch quantises too"
