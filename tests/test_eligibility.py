"""Whether a part runs fused is decided in one place, told in a sentence, and decided anew when the part changes."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TINY, Int8Weight, quantized, random_image, random_model
from torch import nn

import sam
from sam import Prompt, Sam
from sam.inference.eligibility import look, why_not_fused
from sam.modeling import transformer, weight_cache
from sam.modeling.common import MLPBlock

PROBE = """
import torch
from torch.nn.modules import module
from torch.optim import optimizer

def hooks():
    return (
        len(optimizer._global_optimizer_pre_hooks),
        len(optimizer._global_optimizer_post_hooks),
        len(module._global_forward_hooks),
        len(module._global_forward_pre_hooks),
        len(module._global_backward_hooks),
    )

before = hooks()
import numpy, sam, sam.engine, sam.inference
model = sam.load_model(device="cpu")
print(before == hooks())
model.predict(model.encode(numpy.zeros((9, 9, 3), numpy.uint8)), [sam.Prompt([(3, 3)], [1])])
print([after - once for once, after in zip(before, hooks())])
"""


def test_an_import_registers_no_hook_and_the_first_packing_one() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["True", "[0, 1, 0, 0, 0]"]


def set_attribute(path: str, value: Callable[[Any], Any]) -> Callable[[Sam], None]:
    parent, _, name = path.rpartition(".")

    def change(model: Sam) -> None:
        owner = model.get_submodule(parent)
        setattr(owner, name, value(getattr(owner, name)))

    return change


class Halved(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.inner(*inputs, **named)


class OwnMLP(MLPBlock):
    pass


BLOCK = "mask_decoder.transformer.layers.1"
REASONS: dict[str, tuple[Callable[[Sam], Any], str]] = {
    "hook": (
        lambda m: m.get_submodule(f"{BLOCK}.norm2").register_forward_hook(lambda *_: None),
        f"{BLOCK}.norm2 has a forward hook",
    ),
    "hook before": (
        lambda m: m.prompt_encoder.pe_layer.register_forward_pre_hook(lambda *_: None),
        "prompt_encoder.pe_layer has a forward hook",
    ),
    "patched forward": (
        set_attribute(f"{BLOCK}.mlp.forward", lambda forward: lambda x: forward(x)),
        f"{BLOCK}.mlp has a forward of its own, set on the instance",
    ),
    "patched method": (
        set_attribute("mask_decoder.predict_masks", lambda method: method),
        "mask_decoder has a predict_masks of its own, set on the instance",
    ),
    "subclass": (
        lambda m: setattr(m.get_submodule(f"{BLOCK}.mlp"), "__class__", OwnMLP),
        f"{BLOCK}.mlp is an OwnMLP, a subclass",
    ),
    "module in place of a block": (set_attribute(BLOCK, Halved), f"{BLOCK} is a Halved, not a TwoWayAttentionBlock"),
    "module in place of the decoder": (
        set_attribute("mask_decoder", Halved),
        "mask_decoder is a Halved, not a MaskDecoder or a Sam2MaskDecoder of this package",
    ),
    "int8": (
        set_attribute("mask_decoder.mask_tokens.weight", lambda w: nn.Parameter(Int8Weight(w), False)),
        "mask_decoder.mask_tokens.weight is an Int8Weight, no plain tensor",
    ),
    "dynamically quantised": (
        lambda m: setattr(m, "mask_decoder", quantized(m.mask_decoder)),
        "mask_decoder.output_hypernetworks_mlps.0.layers.0 is a torch.ao.nn.quantized.dynamic.modules.linear.Linear, "
        "not a torch.nn.modules.linear.Linear",
    ),
    "a sigmoid": (
        set_attribute("mask_decoder.output_hypernetworks_mlps.2.sigmoid_output", lambda _: True),
        "mask_decoder.output_hypernetworks_mlps.2 ends in a sigmoid",
    ),
}


def reason(model: Sam) -> str | None:
    return why_not_fused(prompt_encoder=model.prompt_encoder, mask_decoder=model.mask_decoder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_a_sentence_that_names_the_module(name: str) -> None:
    model = random_model(TINY)
    assert reason(model) is None  # also: what was decided before the change does not stay
    change, expected = REASONS[name]
    change(model)
    assert reason(model) == expected
    assert not model.uses_fused_decoder


@pytest.mark.parametrize(
    ("kind", "method"), [(transformer.Attention, "forward"), (MLPBlock, "forward"), (nn.Linear, "forward")]
)
def test_a_method_patched_on_a_class_is_seen_and_put_back(
    kind: type[nn.Module], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(TINY)
    assert reason(model) is None
    written = getattr(kind, method)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, lambda self, *inputs: written(self, *inputs))
        result = reason(model)
        assert result is not None
        assert result.startswith(f"{method} of {kind.__name__}, the class of mask_decoder")
    assert reason(model) is None


def test_hooks_count_while_they_are_registered() -> None:
    model, seen = random_model(TINY), []
    embedding, prompts = model.encode(random_image(40, 60)), [Prompt([(4, 4)], [1])]
    fused = model.predict(embedding, prompts).low_res_logits
    for register in (
        model.mask_decoder.transformer.layers[0].self_attn.register_forward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: seen.append(1))
        assert reason(model) is not None
        model.predict(embedding, prompts)
        handle.remove()
        assert seen
        seen.clear()
        assert torch.equal(model.predict(embedding, prompts).low_res_logits, fused)
        assert not seen


CHANGES: dict[str, Callable[[Sam], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.mask_decoder.eval(),
    "a move": lambda m: m.to("cpu"),
    "loaded": lambda m: m.load_state_dict(m.state_dict()),
    "told": lambda m: m.weights_changed(),
    "in place": lambda m: m.mask_decoder.transformer.norm_final_attn.weight.mul_(2),
    "another weight": set_attribute(f"{BLOCK}.norm1.weight", lambda w: nn.Parameter(w.clone(), False)),
    "other memory": lambda m: setattr(m.get_submodule(f"{BLOCK}.norm1").weight, "data", torch.ones(64)),
    "another module": set_attribute(f"{BLOCK}.norm1", lambda n: nn.LayerNorm(64)),
    "a constant": set_attribute(f"{BLOCK}.norm1.eps", lambda _: 1e-3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_starts_a_generation(name: str) -> None:
    model = random_model(TINY)
    before = look(model.mask_decoder).generation
    assert look(model.mask_decoder).generation == before
    with torch.no_grad():
        CHANGES[name](model)
    after = look(model.mask_decoder).generation
    assert after != before
    assert look(model.mask_decoder).generation == after


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimiser_step_starts_a_generation_of_its_parameters_only(fused: bool) -> None:
    stepped, other = random_model(TINY).requires_grad_(True), random_model(TINY)
    image, prompts = random_image(40, 60), [Prompt([(4, 4)], [1])]
    for model in (stepped, other):
        model.predict(model.encode(image), prompts)
    before = [look(model.mask_decoder).generation for model in (stepped, other)]
    optimiser = torch.optim.AdamW(stepped.mask_decoder.parameters(), lr=1e-2, fused=fused)
    for parameter in stepped.mask_decoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()
    after = [look(model.mask_decoder).generation for model in (stepped, other)]
    assert after[0] != before[0]
    assert after[1] == before[1]
    unused = sam.build_from_config(TINY)
    unused.load_state_dict(stepped.state_dict())
    result, expected = (model.predict(model.encode(image), prompts).low_res_logits for model in (stepped, unused))
    assert torch.equal(result, expected)


def test_a_model_that_is_dropped_is_freed_at_once() -> None:
    model = random_model(TINY)
    model.predict(model.encode(random_image(9, 9)), [Prompt([(4, 4)], [1])])
    parts = [weakref.ref(part) for part in model.children()]
    gc.disable()
    try:
        del model
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


def test_parts_that_are_gone_are_not_kept() -> None:
    def followed() -> int:
        gc.collect()
        return len(weight_cache._followers)

    before = followed()
    model = random_model(TINY)
    model.predict(model.encode(random_image(9, 9)), [Prompt([(4, 4)], [1])])
    assert followed() > before
    del model
    assert followed() == before
