"""What the writer writes the reader reads, or the writer says which keys it cannot write."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_same_weights
from models import TINY, quantise_weights, quantized, random_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import sam
from sam import Sam
from sam.checkpoint import read_checkpoint, write_checkpoint


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
    with pytest.raises(TypeError, match=r"the model must be a sam.Sam, or a module around one, got Linear"):
        sam.save_checkpoint(torch.nn.Linear(1, 1), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, got torch.int8"):
        sam.save_checkpoint(tiny, tmp_path / "a.safetensors", dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype like torch.float16, got 'half'"):
        sam.save_checkpoint(tiny, tmp_path / "a.safetensors", dtype="half")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metadata must map strings to strings, got 'epoch': 3"):
        sam.save_checkpoint(tiny, tmp_path / "a.safetensors", metadata={"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"metadata must not name 'sam_config', which says what the weights are of"):
        sam.save_checkpoint(tiny, tmp_path / "a.safetensors", metadata={"sam_config": "{}"})
    assert not any(tmp_path.iterdir())


def test_errors_name_the_file_asked_for(tmp_path: Path, tiny: Sam) -> None:
    """None of the writer's own."""
    with pytest.raises(FileNotFoundError, match=r"^cannot write .*nowhere/a.safetensors: no such folder: .*nowhere$"):
        sam.save_checkpoint(tiny, tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(OSError, match=r"File name too long: '.*/a{250}\.safetensors'$"):
        sam.save_checkpoint(tiny, tmp_path / f"{'a' * 250}.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"Is a directory: '[^']*folder\.safetensors'$"):
        sam.save_checkpoint(tiny, tmp_path / "folder.safetensors")
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_a_torch_file_has_no_place_for_a_configuration(tmp_path: Path, tiny: Sam) -> None:
    """A reader would take the model for another, or for none."""
    other_mean = replace(sam.VARIANTS["nano"], pixel_mean=(1.0, 2.0, 3.0))
    for model, name in ((tiny, "custom"), (sam.build_from_config(other_mean), "nano")):
        for suffix in (".pth", ".pt"):
            says = rf"a {suffix} file has no place for the configuration of this {name} model, .*; use .safetensors"
            with pytest.raises(ValueError, match=says):
                sam.save_checkpoint(model, tmp_path / f"a{suffix}")
    assert not any(tmp_path.iterdir())


# Models that are not as they were built -------------------------------------------------------------------


def compile_in_place(parent: torch.nn.Module, name: str) -> None:
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


def checkpoint_blocks(model: Sam) -> None:
    for index, block in enumerate(model.image_encoder.blocks):
        model.image_encoder.blocks[index] = checkpoint_wrapper(block)


def adapt(layer: torch.nn.Linear) -> torch.nn.Module:
    """As peft does."""
    adapted = torch.nn.Module()
    adapted.base_layer = layer
    adapted.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(layer.in_features, 2, bias=False)})
    return adapted


WRAPPINGS: dict[str, Callable[[Sam], Any]] = {
    "compiled encoder": lambda model: compile_in_place(model, "image_encoder"),
    "compiled parts of parts": lambda model: [
        compile_in_place(model.mask_decoder, "transformer"),
        compile_in_place(model.image_encoder.blocks[1], "mlp"),
        compile_in_place(model.prompt_encoder, "pe_layer"),
    ],
    "encoder on several devices": lambda model: setattr(
        model, "image_encoder", torch.nn.DataParallel(model.image_encoder)
    ),
    "checkpointed blocks": checkpoint_blocks,
    "whole model compiled": lambda model: torch.compile(model, backend="eager"),
    "whole model on several devices, compiled": lambda model: torch.nn.DataParallel(
        torch.compile(model, backend="eager")
    ),
}


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_is_written_as_the_plain_one(tmp_path: Path, tiny: Sam, wrapping: str, layout: Any) -> None:
    plain = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    wrapped = WRAPPINGS[wrapping](tiny)
    model = wrapped if isinstance(wrapped, torch.nn.Module) else tiny
    path = tmp_path / ("w.safetensors" if layout == "official" else "folder")
    sam.save_checkpoint(model, path, layout)
    stored = read_checkpoint(path)
    assert stored.config == TINY
    assert_same_weights(stored.state_dict, plain)


REFUSED: dict[str, tuple[Callable[[Sam], Any], str]] = {
    "adapter": (
        lambda model: setattr(model.mask_decoder.transformer.layers[0].mlp, "lin1", adapt(torch.nn.Linear(64, 96))),
        r"keys of an adapter, .*mask_decoder.transformer.layers.0.mlp.lin1.base_layer.weight",
    ),
    "parametrisation": (
        lambda model: parametrizations.orthogonal(model.image_encoder.blocks[0].attn.proj),
        r"keys of a parametrisation, .*image_encoder.blocks.0.attn.proj.parametrizations.weight.original",
    ),
    "another module": (
        lambda model: model.prompt_encoder.add_module("text", torch.nn.Linear(2, 2)),
        r"unexpected keys: prompt_encoder.text.weight, prompt_encoder.text.bias",
    ),
    "another number of masks": (
        lambda model: setattr(model.mask_decoder, "mask_tokens", torch.nn.Embedding(5, 64)),
        r"keys of a wrong shape: mask_decoder.mask_tokens.weight \[5, 64\] instead of \[4, 64\]",
    ),
    "no biases": (
        lambda model: model.image_encoder.blocks[2].attn.qkv.register_parameter("bias", None),
        r"missing keys: image_encoder.blocks.2.attn.qkv.bias",
    ),
    "dynamic quantisation": (
        lambda model: setattr(model, "image_encoder", quantized(model.image_encoder)),
        r"keys that hold no tensor: image_encoder.blocks.0.attn.qkv._packed_params",
    ),
    "weights of another class": (
        lambda model: quantise_weights(model.mask_decoder),
        r"no dense .* values: mask_decoder.transformer.layers.0.self_attn.q_proj.weight \(of class Int8Weight\)",
    ),
    "integers": (
        lambda model: setattr(
            model.mask_decoder.iou_token,
            "weight",
            torch.nn.Parameter(torch.zeros(1, 64, dtype=torch.int8), requires_grad=False),
        ),
        r"no dense floating-point values: mask_decoder.iou_token.weight \(torch.int8\)",
    ),
    "meta": (
        lambda model: model.prompt_encoder.to("meta"),
        r"no dense floating-point values: prompt_encoder.pe_layer.\S+ \(no values, on the meta device\)",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("change", REFUSED)
def test_what_no_reader_could_read_is_not_written(tmp_path: Path, tiny: Sam, change: str, layout: Any) -> None:
    make, says = REFUSED[change]
    make(tiny)
    path = tmp_path / ("w.safetensors" if layout == "official" else "folder")
    with pytest.raises(ValueError, match=rf"cannot write {path}: .*{says}"):
        sam.save_checkpoint(tiny, path, layout)
    assert not any(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, tiny: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    sam.save_checkpoint(tiny, tmp_path, "transformers")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path: Path, text: str) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        sam.save_checkpoint(random_model(TINY, seed=1), tmp_path, "transformers")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_state_dict_of_any_layout_is_written(tmp_path: Path, tiny: Sam) -> None:
    """Under the names of the layout that is asked for."""
    sam.save_checkpoint(tiny, tmp_path / "theirs.safetensors", "transformers")
    theirs = {f"module.{name}": tensor for name, tensor in load_file(tmp_path / "theirs.safetensors").items()}
    write_checkpoint(theirs, TINY, tmp_path / "ours.safetensors")
    assert load_file(tmp_path / "ours.safetensors").keys() == tiny.state_dict().keys()
    assert_same_weights(read_checkpoint(tmp_path / "ours.safetensors").state_dict, tiny.state_dict())
