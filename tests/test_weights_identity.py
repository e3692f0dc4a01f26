"""Weights are known by their values, not by what wraps them; those that are no plain tensors are used as they are."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import TINY, Int8Weight, quantise_weights, quantized, random_image, random_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import sam
from sam import Prompt, Sam
from sam.inference import Runtime

PROMPTS = [Prompt([(40, 40)], [1]), Prompt([(9, 9), (30, 50)], [0, 1], box=(2, 3, 60, 70)), Prompt(box=(4, 4, 99, 50))]


def compiled(module: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def replace(parent: torch.nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(parent, name, wrap(getattr(parent, name)))


WRAPPINGS: dict[str, Callable[[Sam], Any]] = {
    "compiled encoder": lambda m: replace(m, "image_encoder", compiled),
    "compiled decoder": lambda m: replace(m, "mask_decoder", compiled),
    "compiled neck on several devices": lambda m: replace(
        m.image_encoder, "neck", lambda neck: torch.nn.DataParallel(compiled(neck))
    ),
    "compiled layer": lambda m: setattr(
        m.image_encoder.blocks[0].mlp, "lin1", compiled(m.image_encoder.blocks[0].mlp.lin1)
    ),
    "checkpointed block": lambda m: m.image_encoder.blocks.__setitem__(
        1, checkpoint_wrapper(m.image_encoder.blocks[1])
    ),
    "a neck on several devices": lambda m: setattr(
        m.image_encoder, "neck", torch.nn.DataParallel(m.image_encoder.neck)
    ),
    "the whole model compiled": compiled,
}


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_change_no_hash(tiny: Sam, wrapping: str, by_hand: bool) -> None:
    if by_hand:
        tiny = Sam(tiny.image_encoder, tiny.prompt_encoder, tiny.mask_decoder).eval()
    plain = tiny.model_hash
    embedding = tiny.encode(random_image(90, 128))
    result = WRAPPINGS[wrapping](tiny)
    model = result if isinstance(result, torch.nn.Module) else tiny
    tiny.weights_changed()  # nothing is kept of before
    assert model.model_hash == plain is not None
    assert tiny.predict(embedding, PROMPTS[:1]).masks.shape == (1, 3, 90, 128)
    with torch.no_grad():
        next(tiny.image_encoder.parameters()).add_(1)
    assert tiny.model_hash != plain


def test_a_module_of_a_users_own_changes_the_hash(tiny: Sam) -> None:
    """What it computes is not known."""
    plain = tiny.model_hash
    tiny.image_encoder.neck = torch.nn.Sequential(tiny.image_encoder.neck)
    tiny.weights_changed()
    assert tiny.model_hash not in (plain, None)


SPELLINGS: dict[str, dict[str, Any]] = {
    "another name": {"variant": "tuned"},
    "a whole ratio": {"mlp_ratio": 4},
    "a list": {"global_attn_indexes": [1]},
    "an index twice": {"global_attn_indexes": (1, 1)},
    "whole means": {"pixel_mean": [123.675, 116.28, 103.53]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spelling_of_a_config_changes_no_hash(tiny: Sam, spelling: str) -> None:
    config = dataclasses.replace(TINY, **SPELLINGS[spelling])
    other = sam.build_from_config(config)
    other.load_state_dict(tiny.state_dict())
    assert other.model_hash == tiny.model_hash
    assert other.predict(tiny.encode(random_image(90, 128)), PROMPTS[:1]).masks.shape == (1, 3, 90, 128)
    assert dataclasses.replace(config, variant="custom") == TINY
    assert sam.SamConfig.from_json(config.to_json()) == config


def test_configs_of_one_model_are_equal() -> None:
    ascending, descending = (sam.SamConfig("custom", 64, 6, 2, indexes) for indexes in ((2, 5), [5, 2]))
    assert ascending == descending
    assert ascending.to_json() == descending.to_json()
    whole = sam.SamConfig("custom", 64, 6, 2, (2,), mlp_ratio=4, pixel_mean=(1, 2, 3), pixel_std=(1, 1, 1))
    assert whole.to_json() == sam.SamConfig.from_json(whole.to_json()).to_json()
    assert [type(value) for value in (whole.mlp_ratio, *whole.pixel_mean, *whole.pixel_std)] == [float] * 7


def test_numbers_of_numpy_in_a_config() -> None:
    config = sam.SamConfig("c", np.int64(64), 3, 2, np.array([2, 1]), mlp_ratio=np.float32(4), pixel_std=np.ones(3))
    assert config == sam.SamConfig("c", 64, 3, 2, (1, 2), pixel_std=(1.0, 1.0, 1.0))
    assert sam.SamConfig.from_json(config.to_json()) == config
    for name in ("mlp_ratio", "patch_size"):
        with pytest.raises(ValueError, match=rf"{name} must be .*got True"):
            sam.SamConfig("c", 64, 3, 2, (1,), **{name: True})  # type: ignore[arg-type]


def test_a_model_put_together_by_hand_has_the_same_hash(tiny: Sam) -> None:
    by_hand = Sam(tiny.image_encoder, tiny.prompt_encoder, tiny.mask_decoder).eval()
    assert by_hand.model_hash == tiny.model_hash
    loaded = pickle.loads(pickle.dumps(tiny))
    loaded.config = None
    assert loaded.model_hash == tiny.model_hash
    assert Sam(*tiny.children(), pixel_mean=(0, 0, 0)).eval().model_hash != tiny.model_hash


def gained(module: torch.nn.Module) -> torch.nn.Module:
    wrapper = torch.nn.DataParallel(module)
    wrapper.register_buffer("gain", torch.ones(()))
    return wrapper


CHANGES: dict[str, Callable[[Sam], Any]] = {
    "a window": lambda m: setattr(m.image_encoder.blocks[0], "window_size", 4),
    "heads of the encoder": lambda m: setattr(m.image_encoder.blocks[0].attn, "num_heads", 4),
    "a scale": lambda m: setattr(m.image_encoder.blocks[0].attn, "scale", 1.0),
    "heads of the decoder": lambda m: setattr(m.mask_decoder.transformer.layers[0].self_attn, "num_heads", 2),
    "an epsilon": lambda m: setattr(m.image_encoder.blocks[0].norm1, "eps", 1e-3),
    "an epsilon of the neck": lambda m: setattr(m.image_encoder.neck[1], "eps", 1e-3),
    "an activation": lambda m: setattr(m.image_encoder.blocks[0].mlp, "act", torch.nn.ReLU()),
    "a kind of GELU": lambda m: setattr(m.image_encoder.blocks[0].mlp.act, "approximate", "tanh"),
    "positions of the first layer": lambda m: setattr(m.mask_decoder.transformer.layers[0], "skip_first_layer_pe", 0),
    "a sigmoid": lambda m: setattr(m.mask_decoder.iou_prediction_head, "sigmoid_output", True),
    "the size of the input": lambda m: setattr(m.prompt_encoder, "input_image_size", (64, 64)),
    "what a wrapper computes with": lambda m: setattr(m.image_encoder, "neck", gained(m.image_encoder.neck)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_results_changes_the_hash(tiny: Sam, change: str) -> None:
    plain = tiny.model_hash
    CHANGES[change](tiny)
    tiny.weights_changed()
    assert tiny.model_hash not in (plain, None)


# Weights that are no plain tensors ------------------------------------------------------------------------


def int8_weights(model: Sam) -> Sam:
    quantise_weights(model)
    return model


UNUSUAL: dict[str, Callable[[Sam], Any]] = {
    "all linear layers": int8_weights,
    "encoder alone": lambda model: quantise_weights(model.image_encoder),
    "decoder alone": lambda model: quantise_weights(model.mask_decoder),
    "one embedding": lambda model: replace(
        model.mask_decoder.mask_tokens, "weight", lambda weight: torch.nn.Parameter(Int8Weight(weight), False)
    ),
    "torch's dynamic quantisation": quantized,
    "torch's dynamic quantisation of the decoder": lambda model: setattr(
        model, "mask_decoder", quantized(model.mask_decoder)
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("change", UNUSUAL)
def test_handles_of_weights_that_are_no_plain_tensors_have_no_hash(change: str, kernels: str) -> None:
    model, image = random_model(TINY), random_image(90, 128)
    foreign = model.encode(image)
    expected = model.predict(foreign, PROMPTS).low_res_logits
    result = UNUSUAL[change](model)
    model = result if isinstance(result, Sam) else model
    model.kernels = kernels

    embedding = model.encode(image)
    assert model.model_hash is None
    assert embedding.model_hash is None
    logits = model.predict(embedding, PROMPTS).low_res_logits
    assert_close_l2(logits, expected, 0.2, "int8 against fp32")  # int8 moves random weights' logits by some per cent
    with pytest.raises(ValueError, match=r"not by this model, custom of weights that are no plain tensors; encode"):
        model.predict(foreign, PROMPTS)


def test_weights_quantised_after_a_click_leave_nothing_of_before(tiny: Sam) -> None:
    """Neither their hash nor what was derived of them."""
    image = random_image(90, 128)
    tiny.predict(tiny.encode(image), PROMPTS)
    quantise_weights(tiny)
    other = random_model(TINY)
    quantise_weights(other)
    result, expected = (model.predict(model.encode(image), PROMPTS).low_res_logits for model in (tiny, other))
    assert torch.equal(result, expected)


def test_a_runtime_is_told_of_weights_quantised_later(tiny: Sam) -> None:
    image, other = random_image(90, 128), random_model(TINY)
    tiny.runtime = Runtime(tiny, compile_encoder=False)
    for model in (tiny, other):
        quantise_weights(model)
    tiny.runtime.reset()
    result, expected = (model.predict(model.encode(image), PROMPTS).low_res_logits for model in (tiny, other))
    assert torch.equal(result, expected)
    assert tiny.runtime.buckets == {}


# Copies and files of Python objects -----------------------------------------------------------------------


def saved_size(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return len(buffer.getvalue())


SIZES: dict[str, Callable[[Any], int]] = {
    "pickle": lambda value: len(pickle.dumps(value)),
    "torch.save": saved_size,
    "deepcopy": lambda value: len(pickle.dumps(copy.deepcopy(value))),
}


@pytest.mark.parametrize("way", SIZES)
def test_nothing_that_is_kept_for_speed_travels(tiny: Sam, way: str) -> None:
    size, image = SIZES[way], random_image(90, 128)
    embedding, predictor = tiny.encode(image), sam.SamPredictor(tiny)
    predictor.set_image(image)
    subjects = {"model": tiny, "embedding": embedding, "predictor": predictor}
    before = {name: size(value) for name, value in subjects.items()}
    for multimask in (True, False):
        tiny.predict(embedding, PROMPTS, multimask)
        predictor.predict([[40, 40]], [1], multimask_output=multimask)
    sam.SamAutomaticMaskGenerator(tiny, points_per_side=2).generate(image)
    # A few flags and names may come; a tensor that is kept is thousands of bytes.
    assert {name: size(value) - before[name] < 1000 for name, value in subjects.items()} == dict.fromkeys(
        subjects, True
    )
    assert embedding.nbytes > before["embedding"]  # there was something kept


@pytest.mark.parametrize("way", SIZES)
def test_rows_travel_without_the_others(tiny: Sam, way: str) -> None:
    """Images are embedded and asked in batches; the handle and the masks of one take no other's along."""
    size = SIZES[way]
    images = [random_image(90, 128, seed) for seed in range(8)]
    alone = tiny.encode(images[0])
    many = tiny.encode(images, batch_size=8)
    assert abs(size(many[0]) - size(alone)) < 1000
    one = tiny.predict(alone, PROMPTS)
    several = tiny.predict(many, [PROMPTS] * 8)
    assert abs(size(several[0]) - size(one)) < 1000
