"""Checkpoints: every layout gives the same weights, nothing is guessed, nothing in a file is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import State, assert_close_l2, assert_same_weights
from models import TINY, random_model
from safetensors.torch import load_file, save_file

import sam
from sam import CheckpointError, Sam
from sam.checkpoint import read_checkpoint
from sam.checkpoint.layouts import infer_config, transformers_names


def test_an_unknown_variant_in_a_torch_file(tmp_path: Path, tiny: Sam) -> None:
    """It has no place for a configuration."""
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"64 channels and 3 blocks; the known variants are vit_b 768 x 12"):
        sam.load_model(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("layout", "name"),
    [("official", "w.safetensors"), ("transformers", "w.safetensors"), ("transformers", "folder")],
)
def test_round_trip_is_bit_equal(tmp_path: Path, tiny: Sam, layout: Any, name: str) -> None:
    sam.save_checkpoint(tiny, tmp_path / name, layout)
    loaded = sam.load_model(tmp_path / name, device="cpu")
    assert_same_weights(loaded.state_dict(), tiny.state_dict())
    assert loaded.config == tiny.config
    assert loaded.model_hash == tiny.model_hash
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_both_layouts_of_the_same_weights_load_bit_equal(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    for layout in sam.checkpoint.LAYOUTS:
        for name in (f"{layout}.safetensors", f"{layout}.pth"):
            sam.save_checkpoint(nano, tmp_path / name, layout)
            stored = read_checkpoint(tmp_path / name)
            assert stored.layout == layout
            assert stored.config == sam.VARIANTS["nano"]
            assert_same_weights(stored.state_dict, nano_state)


def test_the_official_pth_reads_back_in_plain_torch(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    sam.save_checkpoint(nano, tmp_path / "sam.pth")
    assert_same_weights(torch.load(tmp_path / "sam.pth", weights_only=True), nano_state)


def test_dtype_of_the_file(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    """The embedded file is fp16: writing it as fp16 again loses nothing."""
    sam.save_checkpoint(nano, tmp_path / "half.safetensors", dtype=torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "half.safetensors").values())
    assert_same_weights(sam.load_model(tmp_path / "half.safetensors", device="cpu").state_dict(), nano_state)


def test_transformers_names_are_those_of_transformers(tiny: Sam) -> None:
    from transformers import SamConfig as TheirConfig
    from transformers import SamModel

    described = sam.checkpoint.layouts.transformers_config(TINY)
    theirs = SamModel(TheirConfig(**{k: v for k, v in described.items() if k.endswith("_config")})).state_dict()
    ours = [name for official in tiny.state_dict() for name in transformers_names(official, TINY)]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h", "nano"])
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_variant_and_image_size_are_inferred(variant: str, layout: Any) -> None:
    config = sam.VARIANTS[variant].with_image_size(256)
    state = sam.modeling.build.build_empty(config).state_dict()
    if layout == "transformers":
        state = {name: tensor for ours, tensor in state.items() for name in transformers_names(ours, config)}
    assert infer_config(state, layout) == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_floating_point_weights_load(tmp_path: Path, nano_state: State, dtype: torch.dtype) -> None:
    """Whatever their strides."""
    stored = {name: tensor.t().to(dtype).contiguous().t() for name, tensor in nano_state.items() if tensor.ndim == 2}
    torch.save({name: stored.get(name, tensor.to(dtype)) for name, tensor in nano_state.items()}, tmp_path / "w.pth")
    expected = {name: tensor.to(dtype).float() for name, tensor in nano_state.items()}
    assert_same_weights(sam.load_model(tmp_path / "w.pth", device="cpu").state_dict(), expected)


def test_a_sharded_folder(tmp_path: Path, tiny: Sam) -> None:
    sam.save_checkpoint(tiny, tmp_path / "folder", "transformers")
    whole = tmp_path / "folder" / "model.safetensors"
    items = list(load_file(whole).items())
    whole.unlink()
    weight_map = {}
    for index, part in enumerate((items[::2], items[1::2])):
        shard = f"model-0000{index + 1}-of-00002.safetensors"
        save_file(dict(part), tmp_path / "folder" / shard)
        weight_map.update({name: shard for name, _ in part})
    index_file = tmp_path / "folder" / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    loaded = sam.load_model(tmp_path / "folder", device="cpu")
    assert loaded.config == TINY
    assert_same_weights(loaded.state_dict(), tiny.state_dict())
    index_file.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match=r"names files that are not in the folder: ../../etc/passwd"):
        read_checkpoint(tmp_path / "folder")


def test_another_image_size(nano: Sam) -> None:
    """Tables are resized; a resize there and back changes nothing that was not interpolated."""
    larger = sam.load_model(device="cpu", image_size=768)
    assert larger.config == sam.VARIANTS["nano"].with_image_size(768)
    assert larger.image_encoder.pos_embed.shape == (1, 48, 48, 192)
    assert larger.image_encoder.blocks[2].attn.rel_pos_h.shape == (95, 64)
    assert torch.equal(larger.image_encoder.blocks[0].attn.rel_pos_h, nano.image_encoder.blocks[0].attn.rel_pos_h)
    expected = torch.nn.functional.interpolate(
        nano.image_encoder.pos_embed.permute(0, 3, 1, 2), (48, 48), mode="bicubic", align_corners=False
    )
    assert_close_l2(larger.image_encoder.pos_embed.detach(), expected.permute(0, 2, 3, 1), 1e-5, "position table")
    image = torch.zeros(100, 200, 3, dtype=torch.uint8).numpy()
    prediction = larger.predict(larger.encode(image), [sam.Prompt([(5, 5)], [1])])
    assert prediction.low_res_logits.shape == (1, 3, 192, 192)
    assert prediction.masks.shape == (1, 3, 100, 200)
    with pytest.raises(ValueError, match=r"image_size must be a positive multiple of patch_size=16, got 500"):
        sam.load_model(image_size=500)


def test_overwriting_a_file_does_not_touch_a_loaded_model(tmp_path: Path, tiny: Sam) -> None:
    path = tmp_path / "weights.safetensors"
    sam.save_checkpoint(tiny, path)
    loaded = sam.load_model(path, device="cpu")
    with path.open("r+b") as file:
        file.truncate(1000)
    assert_same_weights(loaded.state_dict(), tiny.state_dict())


def test_random_model_is_not_what_nano_is(nano: Sam) -> None:
    """The registry's ``nano`` comes with its weights, the others do not."""
    assert sam.sam_model_registry["nano"]().model_hash == nano.model_hash
    assert random_model(sam.VARIANTS["nano"]).model_hash != nano.model_hash
