"""Checkpoints of SAM 2: both layouts and what training programs make of them, versions told apart, strangers named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import State, assert_same_weights
from models import randomise
from safetensors.torch import load_file, save_file

import sam
from sam import CheckpointError, HieraConfig, Sam2Config
from sam.checkpoint.families import SAM2, empty_state
from sam.checkpoint.into_model import load_into
from sam.checkpoint.sam2_layouts import infer_config, transformers_config
from sam.config import SAM2_VARIANTS

TRUNK = HieraConfig(16, 1, (1, 2, 3, 1), (4,), d_model=128)
TINY = Sam2Config("custom", TRUNK, image_size=64, memory_attention_layers=1, fuser_layers=1)
TINY_2_0 = replace(
    TINY,
    no_obj_embed_spatial=False,
    add_tpos_enc_to_obj_ptrs=False,
    proj_tpos_enc_in_obj_ptrs=False,
    use_signed_tpos_enc_to_obj_ptrs=False,
)


@pytest.fixture(scope="module")
def tiny2() -> sam.SAM2Base:
    model = sam.build_from_config(TINY)
    randomise(model)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def state(tiny2: sam.SAM2Base) -> State:
    return tiny2.state_dict()


@pytest.mark.parametrize(
    ("layout", "name"),
    [("official", "w.safetensors"), ("transformers", "w.safetensors"), ("transformers", "folder")],
)
@pytest.mark.parametrize("config", [TINY, TINY_2_0], ids=["2.1", "2.0"])
def test_round_trip_is_bit_equal(tmp_path: Path, layout: Any, name: str, config: Sam2Config) -> None:
    model = sam.build_from_config(config)
    sam.save_checkpoint(model, tmp_path / name, layout)
    loaded = sam.load_model(tmp_path / name, device="cpu")
    assert type(loaded) is sam.SAM2Base
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert loaded.config == config
    assert loaded.model_hash == model.model_hash


@pytest.mark.parametrize("variant", SAM2_VARIANTS)
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_variants_are_inferred(variant: str, layout: Any) -> None:
    config = SAM2_VARIANTS[variant]
    assert infer_config(SAM2.stored(empty_state(config), config, layout), layout) == config


@pytest.mark.parametrize("config", [TINY, TINY_2_0], ids=["2.1", "2.0"])
def test_transformers_names_and_shapes_are_those_of_transformers(config: Sam2Config) -> None:
    from transformers import Sam2VideoConfig, Sam2VideoModel

    described = transformers_config(config)
    with torch.device("meta"):
        theirs = Sam2VideoModel(Sam2VideoConfig(**{k: v for k, v in described.items() if k != "architectures"}))
    ours = SAM2.stored(empty_state(config), config, "transformers")
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in ours.items()}


def test_a_model_of_images_alone(tmp_path: Path, tiny2: sam.SAM2Base) -> None:
    """What transformers' ``Sam2Model`` saves: all but the memory."""
    images = sam.build_from_config(replace(TINY, has_memory=False))
    images.load_state_dict({name: value for name, value in tiny2.state_dict().items() if name in images.state_dict()})
    for layout, name in (("official", "w.safetensors"), ("transformers", "folder")):
        sam.save_checkpoint(images, tmp_path / name, layout)  # type: ignore[arg-type]
        loaded = sam.load_model(tmp_path / name, device="cpu")
        assert_same_weights(loaded.state_dict(), images.state_dict())
        assert loaded.config == images.config
        assert not hasattr(loaded, "memory_attention")
        with pytest.raises(CheckpointError, match=r"weights of images alone, as transformers' Sam2Model has them"):
            load_into(sam.build_from_config(TINY), tmp_path / name)
    picture = np.zeros((20, 30, 3), np.uint8)
    answers = [m.predict(m.encode(picture), [sam.Prompt([(4, 5)], [1])]) for m in (tiny2, images)]
    assert torch.equal(answers[0].low_res_logits, answers[1].low_res_logits)


def test_names_of_images_alone_are_those_of_transformers() -> None:
    from transformers import Sam2Config as TheirConfig
    from transformers import Sam2Model

    config = replace(TINY, has_memory=False)
    described = {k: v for k, v in transformers_config(config).items() if k.endswith("_config")}
    with torch.device("meta"):
        theirs = Sam2Model(TheirConfig(**described)).state_dict()
    ours = SAM2.stored(empty_state(config), config, "transformers")
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}


def test_a_torch_file_is_as_official_ones_are(tmp_path: Path) -> None:
    config = SAM2_VARIANTS["sam2.1_tiny"]
    weights = {name: torch.zeros(shape.shape) for name, shape in empty_state(config).items()}
    sam.checkpoint.write_checkpoint(weights, config, tmp_path / "w.pt")
    stored = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(stored) == ["model"]
    assert stored["model"].keys() == weights.keys()
    model = sam.load_model(tmp_path / "w.pt", device="cpu", image_size=256, dtype=torch.bfloat16)
    assert model.config == config.with_image_size(256)
    assert (model.image_size, model.dtype) == (256, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"weights of sam2.1_tiny \(96 channels, 12 blocks\), not of vit_b \(768"):
        sam.load_model(tmp_path / "w.pt", "vit_b")
    with pytest.raises(CheckpointError, match=r"weights of sam2.1_tiny .*, not of sam2_tiny"):
        sam.load_model(tmp_path / "w.pt", "sam2_tiny")


TRAINED = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3, "steps": {"train": 9}, "time": 1.5}
WRAPPED: dict[str, Callable[[State], Any]] = {
    "official": lambda state: {"model": state},
    "bare": lambda state: state,
    "trainer": lambda state: {"model": state, **TRAINED},
    "module.": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled parts": lambda state: {
        name.replace("image_encoder.", "image_encoder._orig_mod.", 1).replace(
            "memory_attention.", "memory_attention._orig_mod.", 1
        ): value
        for name, value in state.items()
    },
    "lightning": lambda state: {"state_dict": {f"net.sam.{name}": value for name, value in state.items()}, "epoch": 1},
    "half": lambda state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_files_of_training_programs_load(tmp_path: Path, state: State, wrapping: str) -> None:
    torch.save(WRAPPED[wrapping](state), tmp_path / "tuned.pt")
    expected = {name: value.half().float() for name, value in state.items()} if wrapping == "half" else state
    model = sam.build_from_config(TINY)
    load_into(model, tmp_path / "tuned.pt")
    assert_same_weights(model.state_dict(), expected)


def test_changed_models_take_their_own_names(tmp_path: Path, tiny2: sam.SAM2Base) -> None:
    changed = sam.build_from_config(TINY)
    changed.image_encoder.trunk.blocks[0].extra = torch.nn.Linear(3, 3)
    torch.save({"model": changed.state_dict()}, tmp_path / "w.pt")
    other = sam.build_from_config(TINY)
    other.image_encoder.trunk.blocks[0].extra = torch.nn.Linear(3, 3)
    load_into(other, tmp_path / "w.pt")
    assert_same_weights(other.state_dict(), changed.state_dict())
    with pytest.raises(CheckpointError, match=r"w.pt: the weights do not fit custom .*unexpected keys: .*extra.weight"):
        load_into(sam.build_from_config(TINY), tmp_path / "w.pt")
    torch.save({"model": tiny2.state_dict()}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"plain.pt: .*Missing key\(s\).*extra.weight") as caught:
        load_into(other, tmp_path / "plain.pt")
    assert "\n" not in str(caught.value)


def test_versions_are_named_when_they_are_mixed_up(tmp_path: Path) -> None:
    for config, other, says in (
        (TINY, TINY_2_0, r"these are weights of SAM 2.1 \(.*\), but the config is of SAM 2.0"),
        (TINY_2_0, TINY, r"these are weights of SAM 2.0 \(.*\), but the config is of SAM 2.1"),
    ):
        trunk = SAM2_VARIANTS["sam2_tiny"].image_encoder
        weights = {
            name: torch.zeros(value.shape) for name, value in empty_state(replace(config, image_encoder=trunk)).items()
        }
        torch.save({"model": weights}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=rf"w.pt: {says}") as caught:
            load_into(sam.build_from_config(replace(other, image_encoder=trunk)), tmp_path / "w.pt")
        assert "\n" not in str(caught.value)


STRANGERS = {
    "SAM 3": (
        "detector.backbone.vision_backbone.trunk.pos_embed",
        r"this is a SAM 3 model \(key model\.detector\.backbone",
    ),
    "SAM 3 of transformers": ("vision_encoder.backbone.layers.0.x", r"this is a SAM 3 model"),
    "EfficientTAM": ("image_encoder.trunk.blocks.0.norm1.weight", r"another image encoder than Hiera, as EfficientTAM"),
    "EdgeTAM": ("spatial_perceiver.latents", r"this is an EdgeTAM model"),
    "SAM-HQ 2": ("sam_mask_decoder.hf_token.weight", r"this is a SAM-HQ model"),
    "LoRA": ("image_encoder.trunk.blocks.0.attn.qkv.lora_A.weight", r"an adapter, which must be merged"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_called_by_their_name(tmp_path: Path, state: State, stranger: str) -> None:
    key, says = STRANGERS[stranger]
    beside = state if stranger in ("LoRA", "SAM-HQ 2") else {}
    torch.save({"model": {**beside, key: torch.zeros(3)}}, tmp_path / "foreign.pt")
    for read in (sam.load_model, lambda path: load_into(sam.build_from_config(TINY), path)):
        with pytest.raises(CheckpointError, match=rf"foreign.pt: .*{says}") as caught:
            read(tmp_path / "foreign.pt")
        assert "\n" not in str(caught.value)


def test_sam_weights_for_a_sam2_model_and_the_other_way(tmp_path: Path, nano: sam.Sam, state: State) -> None:
    sam.save_checkpoint(nano, tmp_path / "nano.pth")
    with pytest.raises(
        CheckpointError, match=r"nano.pth: these are weights of a SAM model, not of custom \(16 channels"
    ):
        load_into(sam.build_from_config(TINY), tmp_path / "nano.pth")
    torch.save({"model": state}, tmp_path / "two.pt")
    with pytest.raises(
        CheckpointError, match=r"two.pt: .*16 channels and 7 blocks; the known variants are sam2.1_tiny 96"
    ):
        sam.sam_model_registry["vit_b"](checkpoint=tmp_path / "two.pt")


def test_truncated_and_missing_files(tmp_path: Path, state: State) -> None:
    torch.save({"model": state}, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    for read in (sam.load_model, lambda path: load_into(sam.build_from_config(TINY), path)):
        with pytest.raises(CheckpointError, match=r"cut.pt: damaged torch file"):
            read(tmp_path / "cut.pt")
        with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*nowhere.pt"):
            read(tmp_path / "nowhere.pt")


def test_a_folder_says_what_it_holds(tmp_path: Path, tiny2: sam.SAM2Base) -> None:
    sam.save_checkpoint(tiny2, tmp_path / "folder", "transformers")
    path = tmp_path / "folder" / "config.json"
    described = json.loads(path.read_text())
    assert described["model_type"] == "sam2_video"
    described["vision_config"]["backbone_config"]["blocks_per_stage"] = "many"
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    save_file(weights, tmp_path / "folder" / "model.safetensors")  # without our own description
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"damaged model configuration in config.json: stages"):
        sam.load_model(tmp_path / "folder")
