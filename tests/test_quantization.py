"""``sam.quantize``: what is quantised, scales that move exactly, files, and what a quantised model refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import relative_l2
from models import SMALL_2, TINY, random_image, random_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from waiting import SECONDS

import sam
from sam import CheckpointError, Prompt, SamConfig
from sam.checkpoint import read_checkpoint
from sam.checkpoint.into_model import load_into
from sam.engine import Engine
from sam.inference import Runtime, fused_encoder, fused_hiera
from sam.inference.token_order import Level
from sam.modeling import quantization
from sam.modeling.quantized_linear import QuantizedLinear

IMAGE = random_image(90, 128)
CONFIGS: dict[str, Any] = {"SAM": TINY, "SAM 2": SMALL_2}
LAYERS = {
    "SAM": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "SAM 2": ("attn.qkv", "attn.proj", "mlp.layers.0", "mlp.layers.1"),
}
both = pytest.mark.parametrize("family", CONFIGS)


def model_of(family: str, **options: Any) -> Any:
    return random_model(CONFIGS[family], **options)


def features(model: Any) -> Tensor:
    return model.encode(IMAGE).features.float()


def planted(model: Any) -> Any:
    """The same function with channels of outliers: one in eight 64 times as large where it is quantised."""
    hard, draw = copy.deepcopy(model), torch.Generator().manual_seed(0)
    generator = pytest.MonkeyPatch()
    generator.setattr(
        quantization,
        "power_of_two",
        lambda activations, weight: torch.where(torch.rand(activations.shape, generator=draw) < 0.125, 1 / 64, 1.0),
    )
    quantization.move_scales(hard, quantization.estimated_maxima(hard))
    generator.undo()
    return hard


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
@pytest.mark.parametrize("kernels", ["auto", "reference"])
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


@both
def test_hooks_see_what_modules_do(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    fused, seen = features(model), []
    trunk = model.image_encoder if family == "SAM" else model.image_encoder.trunk
    trunk.blocks[1].mlp.register_forward_hook(lambda *call: seen.append(call))
    assert relative_l2(features(model), fused) < 3e-2
    assert len(seen) == 1


@both
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


@both
def test_images_do_not_depend_on_their_batch(family: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    images = [random_image(100, 128, seed) for seed in range(3)]
    alone = [model.encode(image).features for image in images]
    together = model.encode(images, batch_size=3)
    for one, embedding in zip(alone, together, strict=True):
        assert relative_l2(embedding.features, one) < 5e-3  # attention sums in another order, and codes fall


@both
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


# Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "scheme"), [("SAM", "int8"), ("SAM", "fp8"), ("SAM 2", "int8")])
def test_a_file_holds_codes_and_says_their_scheme(family: str, scheme: str, tmp_path: Path) -> None:
    plain = model_of(family)
    plain.kernels = "reference"
    model, path = sam.quantize(plain, scheme), tmp_path / "model.safetensors"
    sam.save_checkpoint(model, path, metadata={"by": "me"})
    sam.save_checkpoint(plain, tmp_path / "plain.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sam_quantization"] == scheme
    stored = read_checkpoint(path)
    assert (stored.quantization, stored.metadata) == (scheme, {"by": "me"})
    loaded = sam.load_model(path, kernels="reference")
    assert loaded.quantization == scheme
    assert loaded.model_hash == model.model_hash
    assert torch.equal(features(loaded), features(model))
    directly = sam.load_model(tmp_path / "plain.safetensors", quantize=scheme, kernels="reference")
    assert directly.model_hash == model.model_hash
    assert sam.load_model(path, quantize=scheme, kernels="reference").model_hash == model.model_hash


@pytest.fixture(scope="module")
def quantised_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "int8.safetensors"
    sam.save_checkpoint(sam.quantize(model_of("SAM"), "int8"), path)
    return path


def change(source: Path, target: Path, edit: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    with safe_open(source, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in read_checkpoint(source).state_dict}, file.metadata()
    edit(state, metadata)
    save_file(state, target, metadata)
    return target


_LAYER = "image_encoder.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, m: m.pop("sam_quantization"), "quantised, but no entry sam_quantization says by which scheme"),
        (lambda s, m: m.update(sam_quantization="int4"), "quantised by the scheme 'int4'; known: int8, fp8"),
        (lambda s, m: m.update(sam_quantization="fp8"), "no fp8 codes with their scales: .*int8 instead of"),
        (lambda s, m: m.pop("sam_config"), "quantised, but no entry sam_config says of which model"),
        (lambda s, m: s.pop(f"{_LAYER}.weight_scale"), f"keys that hold no dense.*{_LAYER}.weight .torch.int8"),
        (lambda s, m: s.pop(f"{_LAYER}.weight"), f"missing keys: {_LAYER}.weight"),
        (lambda s, m: s[f"{_LAYER}.weight_scale"].zero_(), f"{_LAYER}.weight_scale with scales that are no positive"),
        (lambda s, m: s[f"{_LAYER}.weight"].fill_(-128), f"{_LAYER}.weight with codes below -127"),
    ],
    ids=["no scheme", "unknown scheme", "another scheme", "no config", "no scale", "no codes", "zero scale", "-128"],
)
def test_damaged_files_are_named(quantised_file: Path, tmp_path: Path, edit: Any, message: str) -> None:
    path = change(quantised_file, tmp_path / "damaged.safetensors", edit)
    with pytest.raises(CheckpointError, match=f"damaged.safetensors: .*{message}"):
        sam.load_model(path)


def test_other_layouts_do_not_take_quantised_weights(quantised_file: Path, tmp_path: Path) -> None:
    model = sam.load_model(quantised_file)
    for path, layout in (("model.pth", "official"), ("model.safetensors", "transformers"), ("folder", "transformers")):
        with pytest.raises(ValueError, match="weights quantised to int8 are written as"):
            sam.save_checkpoint(model, tmp_path / path, layout)
    with pytest.raises(CheckpointError, match="its weights are quantised to int8, which only"):
        load_into(model_of("SAM"), quantised_file)
    with pytest.raises(ValueError, match="is quantised to int8: it cannot be quantised to fp8"):
        sam.load_model(quantised_file, quantize="fp8", kernels="reference")
    sam.save_checkpoint(model, tmp_path / "half.safetensors", dtype=torch.float16)
    half = read_checkpoint(tmp_path / "half.safetensors").state_dict
    assert half[f"{_LAYER}.weight"].dtype == torch.int8
    assert half[f"{_LAYER}.weight_scale"].dtype == torch.float32
    assert half[f"{_LAYER}.bias"].dtype == torch.float16


# Refusals -----------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A linear layer with something small beside it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.small = linear, nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.small(x)


def test_a_quantised_model_is_not_trained() -> None:
    model = sam.quantize(model_of("SAM"), "int8")
    assert not any(weight.requires_grad for weight in model.parameters())
    for module in (model, model.image_encoder):
        with pytest.raises(ValueError, match="the model is quantised to int8, whose codes take no"):
            module.train()
    assert not any(module.training for module in model.modules())
    model.mask_decoder.train().eval()
    with pytest.raises(ValueError, match="has no backward"):
        model.image_encoder(torch.zeros(1, 3, 128, 128, requires_grad=True))


@both
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_adapters_go_on_before(family: str, kernels: str) -> None:
    model = sam.quantize(model_of(family), "int8")
    model.kernels = kernels
    features(model)
    holder, path = (
        (model.image_encoder, "blocks.1") if family == "SAM" else (model.image_encoder.trunk, "trunk.blocks.1")
    )
    holder.blocks[1].attn.qkv = LoRA(holder.blocks[1].attn.qkv)
    with pytest.raises(
        ValueError, match=f"image_encoder.{path}.attn.qkv is a LoRA, but the model is quantised to int8"
    ):
        features(model)


def test_what_is_not_plain_is_not_quantised() -> None:
    model = model_of("SAM")
    block = model.image_encoder.blocks[1]
    block.attn.qkv = LoRA(block.attn.qkv)
    with pytest.raises(ValueError, match=r"image_encoder.blocks.1.attn.qkv is a LoRA, not a torch.nn.Linear: merge"):
        sam.quantize(model, "int8")
    block.attn.qkv = block.attn.qkv.linear
    hook = block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"image_encoder.blocks.1 has a forward hook"):
        sam.quantize(model, "int8")
    hook.remove()
    result = sam.quantize(model, "int8")
    with pytest.raises(ValueError, match="the model is quantised to int8 already"):
        sam.quantize(result, "int8")
    with pytest.raises(TypeError, match=r"model must be a sam.Sam or a sam.SAM2Base, got Linear"):
        sam.quantize(nn.Linear(1, 1), "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="calibration needs at least one image, got none"):
        sam.quantize(model, "int8", [])


def test_state_dicts_of_other_weights_are_refused() -> None:
    model = model_of("SAM")
    result = sam.quantize(model, "int8")
    state = result.state_dict()
    state[f"{_LAYER}.weight"] = model.state_dict()[f"{_LAYER}.weight"]
    with pytest.raises(
        ValueError, match=f"{_LAYER}.weight is quantised to int8 and takes torch.int8, got torch.float32"
    ):
        result.load_state_dict(state)
    before = features(result)
    other = sam.quantize(model_of("SAM", seed=1), "int8")
    result.load_state_dict(other.state_dict())
    assert torch.equal(features(result), features(other))
    assert not torch.equal(features(result), before)


def test_schemes_that_a_device_lacks(tmp_path: Path) -> None:
    needed = "fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, got cpu"
    model = model_of("SAM")
    with pytest.raises(ValueError, match=needed):
        sam.quantize(model, "fp8")
    with pytest.raises(ValueError, match=needed):
        sam.load_model(quantize="fp8", device="cpu")
    with pytest.raises(ValueError, match="scheme must be one of int8, fp8, got 'int4'"):
        sam.load_model(quantize="int4", device="cpu")
    model.kernels = "reference"
    result = sam.quantize(model, "fp8")
    assert "cannot run" not in result.explain()
    result.kernels = "auto"
    with pytest.raises(ValueError, match=needed):
        features(result)
    assert "fp8, a scale per token and output channel, which cannot run: fp8 needs" in result.explain()


def test_position_tables_of_a_quantised_file_are_resized(quantised_file: Path) -> None:
    model = sam.load_model(quantised_file, image_size=160)
    assert model.quantization == "int8"
    assert model.encode(IMAGE).features.shape[-1] == 10


def test_configs_are_of_the_plain_model(quantised_file: Path) -> None:
    with safe_open(quantised_file, framework="pt") as file:
        assert SamConfig.from_json(file.metadata()["sam_config"]) == TINY
        assert "quant" not in json.dumps(file.metadata()["sam_config"])
