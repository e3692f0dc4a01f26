"""Checkpoints: every layout gives the same weights, nothing is guessed, nothing in a file is run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close_l2
from models import TINY, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import sam
from sam import CheckpointError, Sam
from sam.checkpoint import read_checkpoint
from sam.checkpoint.layouts import infer_config, transformers_names

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def nano_state(nano: Sam) -> State:
    return nano.state_dict()


def assert_same_weights(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_an_unknown_variant_in_a_torch_file(tmp_path: Path, tiny: Sam) -> None:
    """It has no place for a configuration."""
    sam.save_checkpoint(tiny, tmp_path / "weights.pth")
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


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "model_state": lambda state: {"model_state": state, "optimizer_state": {"lr": 1.0}},
    "nested": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "sam.": lambda state: {f"sam.{name}": tensor for name, tensor in state.items()},
    "sam_model.": lambda state: {f"sam_model.{name}": tensor for name, tensor in state.items()},
    "module.model. in model": lambda state: {"model": {f"module.model.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_and_prefixes_of_fine_tunes(tmp_path: Path, nano_state: State, wrapping: str) -> None:
    torch.save(WRAPPINGS[wrapping](nano_state), tmp_path / "tuned.pth")
    assert_same_weights(read_checkpoint(tmp_path / "tuned.pth").state_dict, nano_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_floating_point_weights_load(tmp_path: Path, nano_state: State, dtype: torch.dtype) -> None:
    """Whatever their strides."""
    stored = {name: tensor.t().to(dtype).contiguous().t() for name, tensor in nano_state.items() if tensor.ndim == 2}
    torch.save({name: stored.get(name, tensor.to(dtype)) for name, tensor in nano_state.items()}, tmp_path / "w.pth")
    expected = {name: tensor.to(dtype).float() for name, tensor in nano_state.items()}
    assert_same_weights(sam.load_model(tmp_path / "w.pth", device="cpu").state_dict(), expected)


def test_a_tensor_under_two_names(tmp_path: Path, nano_state: State) -> None:
    """As in the file of a module that keeps a part of its model as an attribute as well."""
    torch.save({f"model.{name}": tensor for name, tensor in nano_state.items()} | nano_state, tmp_path / "tied.pth")
    assert_same_weights(read_checkpoint(tmp_path / "tied.pth").state_dict, nano_state)


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


# Bad files ------------------------------------------------------------------------------------------------


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_missing_unexpected_and_misshaped_keys_are_listed(tmp_path: Path, nano_state: State) -> None:
    path = tmp_path / "bad.pth"
    bad = without(nano_state, "mask_decoder.iou_token.weight")
    bad["mask_decoder.extra"] = torch.zeros(1)
    bad["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 7)
    torch.save(bad, path)
    with pytest.raises(CheckpointError) as caught:
        sam.load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "missing keys: mask_decoder.iou_token.weight" in message
    assert "unexpected keys: mask_decoder.extra" in message
    assert "prompt_encoder.no_mask_embed.weight [1, 7] instead of [1, 256]" in message


def test_a_transformers_file_with_two_different_positional_embeddings(tmp_path: Path, nano: Sam) -> None:
    sam.save_checkpoint(nano, tmp_path / "t.safetensors", "transformers")
    state = load_file(tmp_path / "t.safetensors")
    state["shared_image_embedding.positional_embedding"] += 1
    save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match=r"are one tensor, but they differ"):
        read_checkpoint(tmp_path / "t.safetensors")


def test_keys_that_become_one(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    """Neither overwrites the other."""
    name = "image_encoder.pos_embed"
    torch.save({f"module.{key}": t for key, t in nano_state.items()} | {name: torch.zeros(1)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=rf"two.pth: pairs of keys .* differ: module.{name} and {name}$"):
        read_checkpoint(tmp_path / "two.pth")
    sam.save_checkpoint(nano, tmp_path / "t.pth", "transformers")
    torch.save(torch.load(tmp_path / "t.pth") | {name: torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=rf"differ: vision_encoder.pos_embed and {name}$"):
        read_checkpoint(tmp_path / "t.pth")


FLAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.int8": lambda tensor: tensor.to(torch.int8),
    "torch.bool": lambda tensor: tensor > 0,
    "torch.complex64": lambda tensor: tensor.to(torch.complex64),
    "torch.float4_e2m1fn_x2": lambda tensor: tensor.to(torch.uint8).view(torch.float4_e2m1fn_x2),
    "torch.sparse_coo": lambda tensor: tensor.to_sparse(),
    "no values, on the meta device": lambda tensor: tensor.to("meta"),
    "nested": lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
}


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_tensors_that_are_no_weights(tmp_path: Path, nano: Sam, flaw: str, layout: Any) -> None:
    sam.save_checkpoint(nano, tmp_path / "w.pth", layout)
    state = torch.load(tmp_path / "w.pth")
    name = next(name for name in state if "positional" in name)
    torch.save(state | {name: FLAWS[flaw](state[name])}, tmp_path / "w.pth")
    says = rf"w.pth: keys that hold no dense floating-point values: {name} \({flaw}\)$"
    with pytest.raises(CheckpointError, match=says):
        sam.load_model(tmp_path / "w.pth")


def test_wrappers_without_end(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle["model"] = cycle
    torch.save(cycle, tmp_path / "cycle.pth")
    with pytest.raises(CheckpointError, match=r"cycle.pth: no state dict within 8 wrappers \(model, state_dict, "):
        read_checkpoint(tmp_path / "cycle.pth")


def test_a_transformers_file_with_one_positional_embedding(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    """Tied tensors are stored once."""
    sam.save_checkpoint(nano, tmp_path / "t.safetensors", "transformers")
    state = load_file(tmp_path / "t.safetensors")
    del state["prompt_encoder.shared_embedding.positional_embedding"]
    save_file(state, tmp_path / "t.safetensors")
    assert_same_weights(read_checkpoint(tmp_path / "t.safetensors").state_dict, nano_state)


def test_another_variant_than_asked_for(tmp_path: Path, nano: Sam) -> None:
    sam.save_checkpoint(nano, tmp_path / "nano.pth")
    with pytest.raises(CheckpointError, match=r"weights of nano \(192 channels, 6 blocks\), not of vit_b \(768"):
        sam.sam_model_registry["vit_b"](checkpoint=tmp_path / "nano.pth")
    with pytest.raises(ValueError, match=r"unknown variant 'vit_g'; known: vit_b, vit_l, vit_h, nano"):
        sam.load_model(variant="vit_g")
    with pytest.raises(ValueError, match=r"only nano is embedded; vit_h needs checkpoint="):
        sam.load_model(variant="vit_h")
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, got torch.int8"):
        sam.load_model(dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype like torch.bfloat16, got 'bfloat16'"):
        sam.load_model(dtype="bfloat16")  # type: ignore[arg-type]


RELATIVES = {
    "a SAM 2 model": {"model": {"image_encoder.trunk.pos_embed": torch.zeros(1), "memory_attention.x": torch.zeros(1)}},
    "a SAM-HQ model": {"image_encoder.pos_embed": torch.zeros(1), "mask_decoder.hf_token.weight": torch.zeros(1)},
    "a MobileSAM model": {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)},
    "a SAMed LoRA adapter": {"w_a_000": torch.zeros(1), "w_b_000": torch.zeros(1)},
    "no SAM weights: no image_encoder": {"layer1.0.conv1.weight": torch.zeros(1)},
    "no state dict: the keys are epoch": {"epoch": 3},
    "no state dict but a list": [1, 2],
    "keys that hold no tensor: extra": {"image_encoder.pos_embed": torch.zeros(1), "extra": 5},
    "missing keys: image_encoder.patch_embed.proj.weight": {"image_encoder.pos_embed": torch.zeros(1)},
    "image_encoder.pos_embed is .*image_size must be a whole number from 1 to 65536, got 0": {
        "image_encoder.patch_embed.proj.weight": torch.zeros(192, 3, 16, 16),
        "image_encoder.pos_embed": torch.zeros(1, 0, 0, 192),
        **{f"image_encoder.blocks.{index}.norm1.bias": torch.zeros(192) for index in range(6)},
    },
}


@pytest.mark.parametrize("says", RELATIVES)
def test_foreign_files_are_called_by_their_name(tmp_path: Path, says: str) -> None:
    torch.save(RELATIVES[says], tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=f"foreign.pth: .*{says}"):
        sam.load_model(tmp_path / "foreign.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_files(tmp_path: Path, nano: Sam, suffix: str, keep: int) -> None:
    path = tmp_path / f"cut.{suffix}"
    sam.save_checkpoint(nano, path)
    path.write_bytes(path.read_bytes()[:keep])
    says = r"damaged (safetensors|torch) file|neither a safetensors file nor one written by torch.save"
    with pytest.raises(CheckpointError, match=says):
        sam.load_model(path)


def test_not_a_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes.txt: neither a safetensors file nor one written by torch.save"):
        sam.load_model(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"the folder has neither model.safetensors nor"):
        sam.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*nowhere.pth"):
        sam.load_model(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*nowhere.pth"):
        sam.build_sam_vit_b(str(tmp_path / "nowhere.pth"))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, legacy: bool) -> None:
    crater = tmp_path / "crater"
    payload = {"model": {"image_encoder.pos_embed": torch.zeros(1)}, "bomb": Bomb(crater)}
    path = tmp_path / "bomb.pth"
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"holds more than tensors, and other objects are never loaded"):
        sam.load_model(path)
    assert not crater.exists()
    torch.load(path, weights_only=False)  # it is a live one
    assert crater.exists()


def test_a_bare_pickle_does_not_go_off(tmp_path: Path) -> None:
    crater = tmp_path / "crater"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    with pytest.raises(CheckpointError, match=r"bare.pth"):
        sam.load_model(tmp_path / "bare.pth")
    assert not crater.exists()


def test_damaged_configuration(tmp_path: Path, tiny: Sam) -> None:
    sam.save_checkpoint(tiny, tmp_path / "c.safetensors")
    save_file(load_file(tmp_path / "c.safetensors"), tmp_path / "c.safetensors", {"sam_config": '{"variant": "x"}'})
    with pytest.raises(CheckpointError, match=r"damaged model configuration in sam_config: incomplete SamConfig"):
        read_checkpoint(tmp_path / "c.safetensors")
    save_file(load_file(tmp_path / "c.safetensors"), tmp_path / "c.safetensors", {"sam_config": '{"colour": 1}'})
    with pytest.raises(CheckpointError, match=r"unknown SamConfig fields \['colour'\]"):
        read_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("encoder_depth", 10**6, "must be a whole number from 1 to 256, got 1000000"),
        ("decoder_depth", 10**6, "must be a whole number from 1 to 256, got 1000000"),
        ("iou_head_depth", 10**6, "must be a whole number from 1 to 256, got 1000000"),
        ("num_multimask_outputs", 10**6, "must be a whole number from 1 to 256, got 1000000"),
        ("encoder_embed_dim", 10**12, "must be a whole number from 1 to 65536, got 1000000000000"),
        ("encoder_embed_dim", -64, "must be a whole number from 1 to 65536, got -64"),
        ("encoder_num_heads", 0, "must be a whole number from 1 to 65536, got 0"),
        ("decoder_num_heads", 7, "=7 must divide prompt_embed_dim=64"),
        ("decoder_mlp_dim", True, "must be a whole number from 1 to 65536, got True"),
        ("patch_size", 0, "must be a whole number from 1 to 65536, got 0"),
        ("window_size", -1, "must be a whole number from 0 to 65536, got -1"),
        ("image_size", 128.0, "must be a whole number from 1 to 65536, got 128.0"),
        ("mlp_ratio", float("nan"), "must be above 0 and at most 256, got nan"),
        ("mlp_ratio", float("inf"), "must be above 0 and at most 256, got inf"),
        ("mlp_ratio", "x", "must be above 0 and at most 256, got 'x'"),
        ("global_attn_indexes", 5, "must be a list, got 5"),
        ("global_attn_indexes", ["a"], r"\['a'\] lie outside 0..2"),
        ("pixel_mean", [1, 2], r"must be three numbers from -65536 to 65536, got \[1, 2\]"),
        ("pixel_std", "abc", r"must be three numbers from 0 to 65536, got \['a', 'b', 'c'\]"),
        ("pixel_std", [1, 0, 1], r"must not be 0, got \[1, 0, 1\]"),
        ("variant", None, "must be a name, got None"),
    ],
)
def test_impossible_numbers(tmp_path: Path, tiny: Sam, name: str, value: Any, says: str) -> None:
    text = json.dumps(asdict(TINY) | {name: value})
    save_file(tiny.state_dict(), tmp_path / "c.safetensors", {"sam_config": text})
    with pytest.raises(CheckpointError, match=rf"c.safetensors: damaged .* in sam_config: .*{name}.*{says}"):
        read_checkpoint(tmp_path / "c.safetensors")


def vision(**values: Any) -> bytes:
    return json.dumps({"model_type": "sam", "vision_config": values}).encode()


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xe9", "'utf-8' codec can't decode byte 0xe9"),
        (NESTED, ".* while decoding a JSON array"),
        (b'{"model_type": "sam", "vision_config": [1]}', "vision_config must be an object, got list"),
        (vision(hidden_size=0), "encoder_embed_dim must be a whole number from 1 to 65536, got 0"),
        (vision(num_attention_heads=0), "encoder_num_heads must be a whole number from 1 to 65536, got 0"),
        (vision(patch_size=0), "patch_size must be a whole number from 1 to 65536, got 0"),
        (vision(mlp_dim=10**400), "mlp_dim must be a whole number from 1 to 65536, got 1000"),
        (vision(mlp_ratio=float("inf")), "mlp_ratio must be above 0 and at most 256, got inf"),
        (vision(global_attn_indexes=None), "global_attn_indexes must be a list, got None"),
    ],
)
def test_damaged_config_json(tmp_path: Path, tiny: Sam, content: bytes, says: str) -> None:
    sam.save_checkpoint(tiny, tmp_path, "transformers")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: damaged .* in config.json: {says}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xe9", "'utf-8' codec can't decode byte 0xe9"),
        (NESTED, ".* while decoding a JSON array"),
        *(
            (json.dumps(index).encode(), "it has no weight_map from the names of weights to those of files")
            for index in (
                [1],
                {},
                *({"weight_map": bad} for bad in (["a"], {"a": 1}, {"a": ["b"]}, {"a": "b", "c": 1})),
            )
        ),
    ],
)
def test_damaged_index_of_shards(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: damaged model.safetensors.index.json: {says}"):
        read_checkpoint(tmp_path)


def test_writing_replaces_whole_or_not_at_all(tmp_path: Path, tiny: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    sam.save_checkpoint(tiny, path)
    before = path.read_bytes()

    def fail(state: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        sam.save_checkpoint(tiny, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_writing_errors(tmp_path: Path, tiny: Sam) -> None:
    with pytest.raises(ValueError, match=r"layout must be one of official, transformers, got 'onnx'"):
        sam.save_checkpoint(tiny, tmp_path / "a.pth", "onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"suffix must be .safetensors, .pth or .pt"):
        sam.save_checkpoint(tiny, tmp_path / "a.onnx")
    by_hand = Sam(tiny.image_encoder, tiny.prompt_encoder, tiny.mask_decoder)
    with pytest.raises(ValueError, match=r"the model has no config"):
        sam.save_checkpoint(by_hand, tmp_path / "a.pth")


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
