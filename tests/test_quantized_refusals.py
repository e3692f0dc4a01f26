"""What a quantised model refuses: training, adapters, weights and devices that do not fit, by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL_2, TINY, random_image, random_model
from torch import Tensor, nn

import sam

IMAGE = random_image(90, 128)
CONFIGS: dict[str, Any] = {"SAM": TINY, "SAM 2": SMALL_2}
_LAYER = "image_encoder.blocks.0.attn.qkv"


def model_of(family: str, **options: Any) -> Any:
    return random_model(CONFIGS[family], **options)


def features(model: Any) -> Tensor:
    return model.encode(IMAGE).features.float()


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


@pytest.mark.parametrize("family", CONFIGS)
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
