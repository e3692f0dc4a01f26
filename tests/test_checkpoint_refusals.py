"""Files that are no checkpoints, or damaged ones: refused by a message that says why, and nothing in them is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from comparison import State
from models import TINY, Unheard
from safetensors.torch import load_file, save_file
from torch import Tensor

import sam
from sam import CheckpointError, Sam
from sam.checkpoint import read_checkpoint
from sam.checkpoint.read import _plain_line


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


def test_mappings_without_end(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle.update({"model": cycle, "best": cycle})
    torch.save(cycle, tmp_path / "cycle.pth")
    with pytest.raises(CheckpointError, match=r"cycle.pth: no state dict: the keys are model, best$"):
        read_checkpoint(tmp_path / "cycle.pth")
    deep: dict[str, Any] = {"image_encoder.pos_embed": torch.zeros(1)}
    for _ in range(200):
        deep = {"model": deep}
    torch.save(deep, tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match=r"deep.pth: no state dict: the keys are model$"):
        read_checkpoint(tmp_path / "deep.pth")


def test_another_variant_than_asked_for(tmp_path: Path, nano: Sam) -> None:
    sam.save_checkpoint(nano, tmp_path / "nano.pth")
    with pytest.raises(CheckpointError, match=r"weights of nano \(192 channels, 6 blocks\), not of vit_b \(768"):
        sam.sam_model_registry["vit_b"](checkpoint=tmp_path / "nano.pth")
    with pytest.raises(ValueError, match=r"unknown variant 'vit_g'; known: vit_b, vit_l, vit_h, nano, sam2_tiny"):
        sam.load_model(variant="vit_g")
    with pytest.raises(ValueError, match=r"only nano is embedded; vit_h needs checkpoint="):
        sam.load_model(variant="vit_h")
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, got torch.int8"):
        sam.load_model(dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype like torch.bfloat16, got 'bfloat16'"):
        sam.load_model(dtype="bfloat16")  # type: ignore[arg-type]


RELATIVES = {
    "a model like SAM 2 with another image encoder than Hiera, as EfficientTAM has": {
        "model": {"image_encoder.trunk.pos_embed": torch.zeros(1), "memory_attention.x": torch.zeros(1)}
    },
    "a SAM 3 model": {"detector.backbone.vision_backbone.trunk.pos_embed": torch.zeros(1)},
    "an EdgeTAM model": {"image_encoder.trunk.body.x": torch.zeros(1), "spatial_perceiver.latents": torch.zeros(1)},
    "a SAM-HQ model": {"image_encoder.pos_embed": torch.zeros(1), "mask_decoder.hf_token.weight": torch.zeros(1)},
    "a MobileSAM model": {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)},
    "a SAMed LoRA adapter": {"w_a_000": torch.zeros(1), "w_b_000": torch.zeros(1)},
    "no SAM weights: no parameter of an image_encoder or a vision_encoder": {"layer1.0.conv1.weight": torch.zeros(1)},
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


def test_names_that_are_none(tiny: Sam) -> None:
    """An empty one is not the working directory, and a URL is shown as it was given."""
    for read in (sam.load_model, sam.build_sam_vit_b, sam.build_sam_nano):
        with pytest.raises(ValueError, match=r"^checkpoint must name a file or folder, got an empty name$"):
            read("")
        with pytest.raises(ValueError, match=r"got the URL https://a\.b/c\.pth: download it first$"):
            read("https://a.b/c.pth")
    for layout in ("official", "transformers"):
        with pytest.raises(ValueError, match=r"^path must name a file or folder, got an empty name$"):
            sam.save_checkpoint(tiny, "", layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^path must name a file or folder, got an empty name$"):
        sam.ImageEmbedding.load("")


def test_files_without_weights(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    torch.save({}, tmp_path / "empty.pth")
    np.savez(tmp_path / "numbers.npz", a=np.zeros(3))
    for name, member in (("plain.zip", "a.npy.txt"), ("none.zip", None)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            if member is not None:
                archive.writestr(member, "text")
    for name, says in (
        ("empty.safetensors", "it is empty: there is not a single tensor in it"),
        ("empty.pth", "it is empty: there is not a single tensor in it"),
        ("numbers.npz", "it is a NumPy archive, not a file written by torch.save or safetensors"),
        ("plain.zip", "it is a zip archive, not a file written by torch.save or safetensors"),
        ("none.zip", "it is a zip archive, not a file written by torch.save or safetensors"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {says}$"):
            sam.load_model(tmp_path / name)


def test_the_places_in_torch_are_left_out_of_messages() -> None:
    assert _plain_line("[enforce fail at inline_container.cc:337] . file not found\nstack") == "file not found"


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
    with pytest.raises(CheckpointError, match=r"holds more than tensors: [a-z]+.mkdir, and other objects are never"):
        sam.load_model(path)
    assert not crater.exists()
    torch.load(path, weights_only=False)  # it is a live one
    assert crater.exists()


OBJECTS: dict[str, Callable[[], Any]] = {
    r"numpy\._core\.multiarray\.scalar": lambda: np.float64(0.25),
    r"numpy\._core\.multiarray\._reconstruct": lambda: np.zeros(3),
    r"argparse\.Namespace": lambda: argparse.Namespace(lr=1e-4),
    r"pathlib\.PosixPath": lambda: PosixPath("runs"),
    r"torch\.nn\.modules\.linear\.Linear": lambda: torch.nn.Linear(1, 1),
    r"models\.Unheard": Unheard,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_refusal_names_the_object(tmp_path: Path, name: str, legacy: bool) -> None:
    """And ends on a way out, in one line without escape codes."""
    stored = {"model": {"image_encoder.pos_embed": torch.zeros(1)}, "extra": OBJECTS[name]()}
    torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf"w.pth: it holds more than tensors: {name}, and other") as caught:
        read_checkpoint(tmp_path / "w.pth")
    message = str(caught.value)
    assert message.endswith('and save only its state dict, like ["model"]')
    assert message.isprintable()
    assert "do those steps" not in message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_pickle_protocols(tmp_path: Path, protocol: int, legacy: bool) -> None:
    """Tensors only: either they load, or the refusal says what torch's reader does not know."""
    state = {"image_encoder.pos_embed": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    says = (
        r"w.pth: missing keys: image_encoder.patch_embed"
        if protocol == 3
        else (r"w.pth: it uses FRAME of pickle protocol 4, which torch's reader of tensors alone does not know .* 2$")
    )
    with pytest.warns(UserWarning, match=f"pickle protocol {protocol}"), pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "w.pth")


def test_a_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"script.pt: it is a TorchScript archive, which holds a program"):
        read_checkpoint(tmp_path / "script.pt")


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
