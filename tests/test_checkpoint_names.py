"""A model in what training programs save: containers, wrappers and prefixes around its names, and what is beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import State, assert_same_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, random_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import sam
from sam import CheckpointError, Sam
from sam.checkpoint import read_checkpoint
from sam.checkpoint.families import SAM, Form, expected_shapes
from sam.checkpoint.layouts import transformers_names
from sam.checkpoint.names import find_weights
from sam.checkpoint.read import official_state

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


def test_a_tensor_under_two_names(tmp_path: Path, nano_state: State) -> None:
    """As in the file of a module that keeps a part of its model as an attribute as well."""
    torch.save({f"model.{name}": tensor for name, tensor in nano_state.items()} | nano_state, tmp_path / "tied.pth")
    assert_same_weights(read_checkpoint(tmp_path / "tied.pth").state_dict, nano_state)


def test_keys_that_become_one(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    """Neither overwrites the other."""
    name = "image_encoder.pos_embed"
    torch.save({f"module.{key}": t for key, t in nano_state.items()} | {name: torch.zeros(1)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=rf"two.pth: pairs of keys .* differ: module.{name} and {name};"):
        read_checkpoint(tmp_path / "two.pth")
    sam.save_checkpoint(nano, tmp_path / "t.pth", "transformers")
    torch.save(torch.load(tmp_path / "t.pth") | {name: torch.zeros(1)}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=rf"differ: vision_encoder.pos_embed and {name}$"):
        read_checkpoint(tmp_path / "t.pth")


def test_a_transformers_file_with_one_positional_embedding(tmp_path: Path, nano: Sam, nano_state: State) -> None:
    """Tied tensors are stored once."""
    sam.save_checkpoint(nano, tmp_path / "t.safetensors", "transformers")
    state = load_file(tmp_path / "t.safetensors")
    del state["prompt_encoder.shared_embedding.positional_embedding"]
    save_file(state, tmp_path / "t.safetensors")
    assert_same_weights(read_checkpoint(tmp_path / "t.safetensors").state_dict, nano_state)


# Containers and prefixes ----------------------------------------------------------------------------------


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def within(state: State, start: str, segment: str) -> State:
    """``segment`` after ``start``, as a module that wraps what has that name puts it."""
    return {name.replace(start, f"{start}{segment}.", 1): tensor for name, tensor in state.items()}


def nested(state: State) -> dict[str, Any]:
    """A mapping a module."""
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *modules, last = name.split(".")
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[last] = tensor
    return tree


WRAPPED: dict[str, Callable[[State], Any]] = {
    **{
        prefix: lambda state, prefix=prefix: prefixed(state, prefix)  # type: ignore[misc]
        for prefix in (
            *("_orig_mod.", "model._orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "net."),
            *("network.", "student.", "base_model.model.", "module._orig_mod.module.", "0.", "sam_adapter.backbone."),
        )
    },
    "compiled encoder": lambda state: within(state, "image_encoder.", "_orig_mod"),
    "encoder on several devices": lambda state: within(state, "image_encoder.", "module"),
    "checkpointed blocks": lambda state: {
        re.sub(r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): tensor for name, tensor in state.items()
    },
    "two wrappers around a block": lambda state: within(
        state, "image_encoder.blocks.1.", "_fsdp_wrapped_module._orig_mod"
    ),
    "a wrapper of a user's own around a linear layer": lambda state: within(
        prefixed(state, "learner."), "mask_decoder.iou_prediction_head.layers.0.", "inner"
    ),
    "an encoder inside another's name": lambda state: within(state, "", "image_encoder"),
    "lightning": lambda state: {
        "state_dict": prefixed(state, "model.module."),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.zeros(())}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    },
    "an optimiser that names parameters": lambda state: {
        "model": state,
        "optimizer": {"state": {name: {"exp_avg": tensor, "step": torch.zeros(())} for name, tensor in state.items()}},
    },
    "containers of no fixed name": lambda state: {
        "run": {"generator": {"params": prefixed(state, "sam.")}},
        "epoch": 1,
    },
    "a loss beside the container": lambda state: {"loss": torch.zeros(()), "weights": state},
    "a mapping a module": nested,
    "a mapping a part, in a container": lambda state: {
        "parts": {
            part: {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            for part in sorted({name.split(".")[0] for name in state})
        }
    },
    "parts under prefixes of their own": lambda state: {
        ("a." if name.startswith("image_encoder.") else "b.c.") + name: tensor for name, tensor in state.items()
    },
    "one mapping under two names": lambda state: {"model": state, "best": state},
    **{
        name: lambda state, beside=beside, prefix=prefix: prefixed(state, prefix) | beside  # type: ignore[misc]
        for name, prefix, beside in (
            ("AveragedModel", "module.", {"n_averaged": torch.tensor(3)}),
            ("AveragedModel without its prefix", "", {"n_averaged": torch.tensor(3)}),
            ("ema-pytorch", "ema_model.", {"initted": torch.tensor(True), "step": torch.tensor(9)}),
            ("ema-pytorch, older", "ema_model.", {"initted": torch.ones(1), "step": torch.zeros(1)}),
            ("a metric beside the model", "model.", {"iou.count": torch.tensor(3), "iou.sums": torch.zeros(2, 5)}),
            ("a histogram beside the model", "model.", {"levels": torch.zeros(8, dtype=torch.int64), "epoch": 3}),
            ("a sparse target beside the model", "model.", {"target": torch.zeros(3).to_sparse()}),
        )
    },
    "AveragedModel in a container": lambda state: {
        "model": {"n_averaged": torch.tensor(3), **prefixed(state, "module.model.")}
    },
    "lightning with a metric": lambda state: {
        "state_dict": {"val_iou.total": torch.tensor(7), **prefixed(state, "model._orig_mod.")}
    },
    "an average that equals the model": lambda state: {
        "model": state,
        "ema": {name: tensor.clone() for name, tensor in state.items()},
    },
}


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_wrappers_of_any_kind_and_order(tiny: Sam, wrapping: str, layout: str) -> None:
    state = tiny.state_dict()
    if layout == "transformers":
        state = {theirs: tensor for ours, tensor in state.items() for theirs in transformers_names(ours, TINY)}
    result, of = find_weights(WRAPPED[wrapping](state))
    assert of == Form(SAM, layout)  # type: ignore[arg-type]
    assert_same_weights(official_state(result, of, TINY), tiny.state_dict())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wrappers_anywhere(data: st.DataObject) -> None:
    """Around any modules, under any names that are not the model's own; each tensor is found, and is the right one."""
    state = {name: torch.tensor([float(index)]) for index, name in enumerate(expected_shapes(TINY))}
    modules = sorted({".".join(name.split(".")[:end]) + "." for name in state for end in range(1, name.count(".") + 1)})
    segment = st.from_regex(r"[a-z]{2,6}_x|_orig_mod|module|net", fullmatch=True)
    wrapped = state
    for start in sorted(data.draw(st.lists(st.sampled_from(modules), max_size=4, unique=True)), key=len, reverse=True):
        wrapped = within(wrapped, start, data.draw(segment))
    for prefix in data.draw(st.lists(segment, max_size=3)):
        wrapped = prefixed(wrapped, f"{prefix}.")
    result, form = find_weights(nested(wrapped) if data.draw(st.booleans()) else wrapped)
    assert form == Form(SAM, "official")
    assert result == state


def test_wrappers_in_files(tmp_path: Path, nano_state: State) -> None:
    """The whole way, in both kinds of file."""
    state = within(prefixed(nano_state, "net._orig_mod."), "image_encoder.", "module")
    torch.save({"ckpt": {"state_dict": state}, "epoch": 3}, tmp_path / "w.pth")
    assert_same_weights(read_checkpoint(tmp_path / "w.pth").state_dict, nano_state)
    save_file(state, tmp_path / "w.safetensors")
    assert_same_weights(read_checkpoint(tmp_path / "w.safetensors").state_dict, nano_state)


TWO: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "prefixes": (
        lambda one, other: prefixed(one, "student.") | prefixed(other, "teacher."),
        r"student\.(\S+) and teacher\.\1, .*models lie under the prefixes 'student.' and 'teacher.': save the one",
    ),
    "containers": (
        lambda one, other: {"model": one, "ema": {"shadow": other}},
        r"model\.(\S+) and ema\.shadow\.\1, .*under the prefixes 'model.' and 'ema.shadow.'",
    ),
    "with and without a prefix": (
        lambda one, other: one | prefixed(other, "ema."),
        r"models lie under the prefixes '' and 'ema.'",
    ),
    "a part of an average": (
        lambda one, other: {
            "model": one,
            "ema": {name: tensor for name, tensor in other.items() if name.startswith("mask_decoder.transformer.")},
        },
        r"models lie under the prefixes 'model.' and 'ema.'",
    ),
    "wrappers inside the names": (
        lambda one, other: within(one, "image_encoder.", "student") | within(other, "image_encoder.", "teacher"),
        r"image_encoder\.student\.(\S+) and image_encoder\.teacher\.\1",
    ),
}


@pytest.mark.parametrize("kind", TWO)
def test_two_models_in_one_file_are_refused_by_their_prefixes(tiny: Sam, kind: str) -> None:
    make, says = TWO[kind]
    with pytest.raises(CheckpointError, match=rf"pairs of keys are one tensor, but they differ: .*{says}"):
        find_weights(make(tiny.state_dict(), random_model(TINY, seed=1).state_dict()))


# Adapters -------------------------------------------------------------------------------------------------

QKV = "image_encoder.blocks.0.attn.qkv."
ADAPTERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    # new names of the layer's own weight, and what stands beside it
    "peft": ({"weight": "base_layer.weight"}, ("lora_A.default.weight", "lora_B.default.weight")),
    "DoRA": ({"weight": "base_layer.weight"}, ("lora_magnitude_vector.default.weight",)),
    "peft, its matrices left out": ({"weight": "base_layer.weight", "bias": "base_layer.bias"}, ()),
    "modules_to_save": ({"weight": "original_module.weight"}, ("modules_to_save.default.weight",)),
    "loralib": ({}, ("lora_A", "lora_B")),
    "SAMed": ({"weight": "qkv.weight", "bias": "qkv.bias"}, ("linear_a_q.weight", "linear_b_q.weight")),
    "LoKr": ({"weight": "base_layer.weight"}, ("lokr_w1.default", "lokr_w2.default")),
    "an adapter between layers": ({}, ("MLP_Adapter.D_fc1.weight",)),
}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_keys_of_adapters_are_refused_by_name(tiny: Sam, kind: str, prefix: str) -> None:
    moved, beside = ADAPTERS[kind]
    state = tiny.state_dict()
    for own, there in moved.items():
        state[QKV + there] = state.pop(QKV + own)
    state |= {QKV + name: torch.zeros(1) for name in beside}
    named = prefix + QKV + (beside[0] if beside else moved["weight"])
    with pytest.raises(CheckpointError, match=rf"keys of an adapter, which must be merged .*{re.escape(named)}"):
        find_weights(prefixed(state, prefix))


def test_an_adapter_in_a_container_of_its_own(tiny: Sam) -> None:
    stored = {"model": tiny.state_dict(), "tuned": {"layers.0.lora_A": torch.zeros(1)}}
    with pytest.raises(CheckpointError, match=r"keys of an adapter, .*: tuned.layers.0.lora_A$"):
        find_weights(stored)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "old weight_norm", "pruning"])
def test_keys_of_parametrisations_are_refused_by_name(tiny: Sam, kind: str) -> None:
    layer = tiny.image_encoder.blocks[1].mlp.lin1
    {
        "spectral_norm": parametrizations.spectral_norm,
        "weight_norm": parametrizations.weight_norm,
        "old weight_norm": torch.nn.utils.weight_norm,
        "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    }[kind](layer)
    with pytest.raises(CheckpointError, match=r"keys of a parametrisation, .*image_encoder.blocks.1.mlp.lin1\."):
        find_weights(tiny.state_dict())


AVERAGED = ("image_encoder", "mask_decoder.transformer", "image_encoder.blocks.1.mlp")


@pytest.mark.parametrize("part", AVERAGED)
def test_a_part_that_is_averaged(tiny: Sam, tmp_path: Path, part: str) -> None:
    """Its counter is passed over in files and is no part of what is saved, nor of the hash."""
    plain, state = tiny.model_hash, {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    parent, _, name = part.rpartition(".")
    setattr(tiny.get_submodule(parent), name, AveragedModel(tiny.get_submodule(part)))
    assert f"{part}.n_averaged" in tiny.state_dict()
    sam.save_checkpoint(tiny, tmp_path / "w.safetensors")
    assert_same_weights(read_checkpoint(tmp_path / "w.safetensors").state_dict, state)
    tiny.weights_changed()
    assert tiny.model_hash == plain


def test_an_averaged_model_in_a_file(tmp_path: Path, nano: Sam) -> None:
    averaged = AveragedModel(nano)
    averaged.update_parameters(nano)
    for name, stored in (("a", averaged.state_dict()), ("b", {"model": averaged.state_dict(), "epoch": 3})):
        torch.save(stored, tmp_path / f"{name}.pth")
        assert sam.load_model(tmp_path / f"{name}.pth", device="cpu").model_hash == nano.model_hash


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("image_encoder.steps", torch.tensor(3), "no dense floating-point values: image_encoder.steps "),
        ("image_encoder.blocks.0.steps", torch.tensor(3), "no dense floating-point values: image_encoder.blocks.0."),
        ("image_encoder.blocks.steps", torch.tensor(3), "no dense floating-point values: image_encoder.blocks.steps "),
        (
            "model.image_encoder.steps",
            torch.zeros(3, dtype=torch.int64),
            "no dense floating-point values: model.image_enc",
        ),
        ("table", torch.zeros(3, dtype=torch.int64), r"no dense floating-point values: table \(torch.int64\)$"),
    ],
)
def test_integers_among_the_weights_are_refused(tiny: Sam, key: str, value: torch.Tensor, says: str) -> None:
    prefix = "model." if key.startswith("model.") else ""
    with pytest.raises(CheckpointError, match=f"keys that hold {says}"):
        find_weights(prefixed(tiny.state_dict(), prefix) | {key: value})


def test_what_a_wrapper_computes_with_is_unexpected(tiny: Sam) -> None:
    """Beside what it wraps, floating-point numbers take part in the result."""
    start = "mask_decoder.iou_prediction_head."
    state, layout = find_weights(within(tiny.state_dict(), start, "inner") | {f"{start}gain": torch.zeros(())})
    with pytest.raises(CheckpointError, match=f"unexpected keys: {start}gain$"):
        official_state(state, layout, TINY)


def test_a_module_beside_the_model_is_unexpected(tiny: Sam) -> None:
    """In the same state dict; nothing is left out without a word."""
    for extra in ("head.weight", "mask_decoder.refine.weight", "image_encoder.blocks.0.gate.norm.weight"):
        state, layout = find_weights(prefixed({**tiny.state_dict(), extra: torch.zeros(1)}, "model."))
        with pytest.raises(CheckpointError, match=rf"unexpected keys: (model\.)?{extra}$"):
            official_state(state, layout, TINY)
