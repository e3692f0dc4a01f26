"""Files of quantised weights: what they hold, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL_2, TINY, random_image, random_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import sam
from sam import CheckpointError, SamConfig
from sam.checkpoint import read_checkpoint
from sam.checkpoint.into_model import load_into

IMAGE = random_image(90, 128)
CONFIGS: dict[str, Any] = {"SAM": TINY, "SAM 2": SMALL_2}
_LAYER = "image_encoder.blocks.0.attn.qkv"


def model_of(family: str, **options: Any) -> Any:
    return random_model(CONFIGS[family], **options)


def features(model: Any) -> Tensor:
    return model.encode(IMAGE).features.float()


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
    with pytest.raises(ValueError, match="are quantised to int8: they cannot be quantised to fp8"):
        sam.load_model(quantised_file, quantize="fp8", kernels="reference")
    sam.save_checkpoint(model, tmp_path / "half.safetensors", dtype=torch.float16)
    half = read_checkpoint(tmp_path / "half.safetensors").state_dict
    assert half[f"{_LAYER}.weight"].dtype == torch.int8
    assert half[f"{_LAYER}.weight_scale"].dtype == torch.float32
    assert half[f"{_LAYER}.bias"].dtype == torch.float16


def test_position_tables_of_a_quantised_file_are_resized(quantised_file: Path) -> None:
    model = sam.load_model(quantised_file, image_size=160)
    assert model.quantization == "int8"
    assert model.encode(IMAGE).features.shape[-1] == 10


def test_configs_are_of_the_plain_model(quantised_file: Path) -> None:
    with safe_open(quantised_file, framework="pt") as file:
        assert SamConfig.from_json(file.metadata()["sam_config"]) == TINY
        assert "quant" not in json.dumps(file.metadata()["sam_config"])
