"""Packed weights: made once, noticed when stale, and never kept where they do not hold."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comparison import assert_close_l2
from models import TINY, random_image, random_model

import sam
from sam import Prompt, Sam
from sam.modeling.prompt_encoder import PromptEncoder


def test_threads_derive_a_value_once() -> None:
    """Who holds the first one by its address, as a graph does, would lose it to the second."""
    model, made, meet = random_model(TINY), [], threading.Barrier(4)

    def slowly() -> object:
        made.append(object())
        time.sleep(0.05)
        return made[-1]

    def ask(_: int) -> object:
        meet.wait()
        return model.packed("slow", slowly, model.prompt_encoder.no_mask_embed.weight)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == set(made)
    assert len(made) == 1


def test_derived_values_are_kept_and_dropped() -> None:
    model = random_model(TINY)
    encoder, matrix = model.prompt_encoder, model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    cached = encoder.get_dense_pe()
    assert encoder.get_dense_pe() is cached
    known = model.model_hash
    assert model.model_hash is known

    matrix.mul_(2)  # written in place
    assert not torch.equal(encoder.get_dense_pe(), cached)
    assert model.model_hash != known

    other = random_model(TINY, seed=1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(encoder.get_dense_pe(), other.prompt_encoder.get_dense_pe())
    assert model.model_hash == other.model_hash

    model.double()
    assert encoder.get_dense_pe().dtype == torch.float64
    assert model.model_hash != other.model_hash
    model.float()
    assert model.model_hash == other.model_hash  # fp32 to fp64 and back loses nothing

    model.to(torch.bfloat16)
    rounded = model.model_hash
    model.float()
    assert model.model_hash not in (other.model_hash, rounded)

    third = random_model(TINY, seed=2)
    model.load_state_dict(third.state_dict(), assign=True)
    assert torch.equal(encoder.get_dense_pe(), third.prompt_encoder.get_dense_pe())
    assert model.model_hash == third.model_hash


def step_by(optimiser: torch.optim.Optimizer, model: Sam) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()


def step(model: Sam) -> None:
    step_by(torch.optim.SGD(model.parameters(), lr=1e-2), model)


def step_fused(model: Sam) -> None:
    """Such leave no trace on the tensors."""
    step_by(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), model)


def write_data(model: Sam) -> None:
    for parameter in model.mask_decoder.parameters():
        parameter.data.mul_(1.1)
    model.weights_changed()


def write_data_between_modes(model: Sam) -> None:
    model.train()
    for parameter in model.mask_decoder.parameters():
        parameter.data.mul_(1.1)
    model.eval()


def replace_again_and_again(model: Sam) -> None:
    """The third may get the address of the first."""
    layer = model.mask_decoder.output_upscaling[3]
    before = layer.weight.detach().clone()
    for scale in (1.3, 0.5, 1.7, 0.9):
        layer.weight = None
        layer.weight = torch.nn.Parameter(before * scale)
        model.predict(model.encode(random_image(9, 9)), [Prompt([(4, 4)], [1])])


@pytest.mark.parametrize("change", [step, step_fused, write_data, write_data_between_modes, replace_again_and_again])
def test_changed_weights_are_noticed(change: Callable[[Sam], None]) -> None:
    """A handle of unknown origin keeps the decoder's image side: it must follow the weights."""
    model = random_model(TINY).requires_grad_(True)
    image, prompts = random_image(128, 128), [Prompt([(40, 40)], [1])]
    embedding = sam.ImageEmbedding(model.encode(image).features, model.encode(image).geometry)
    before, known = model.predict(embedding, prompts).low_res_logits, model.model_hash
    change(model)
    after = model.predict(embedding, prompts).low_res_logits
    assert not torch.equal(before, after)
    fresh = sam.ImageEmbedding(embedding.features, embedding.geometry)
    unused = copy.deepcopy(model)
    assert torch.equal(after, unused.predict(fresh, prompts).low_res_logits)
    assert model.model_hash == unused.model_hash != known


def test_what_autocast_or_an_adapter_made_is_not_kept_for_others() -> None:
    model, prompts = random_model(TINY), [Prompt([(40, 40)], [1])]
    embedding = model.encode(random_image(128, 128))
    fresh = sam.ImageEmbedding(embedding.features, embedding.geometry)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model.predict(embedding, prompts).low_res_logits
    wide = model.predict(embedding, prompts).low_res_logits
    assert torch.equal(wide, copy.deepcopy(model).predict(fresh, prompts).low_res_logits)
    assert 0 < (wide - narrow).abs().max() < 0.1 * wide.abs().max()

    class Adapter(torch.nn.Module):
        scale = 1.5

        def __init__(self, adapted: torch.nn.Module) -> None:
            super().__init__()
            self.adapted = adapted

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.adapted(x)

    attention = model.mask_decoder.transformer.layers[0].cross_attn_token_to_image
    attention.k_proj = adapter = Adapter(attention.k_proj)
    adapted = model.predict(embedding, prompts).low_res_logits
    adapter.scale = 1.0
    assert_close_l2(model.predict(embedding, prompts).low_res_logits, wide, 1e-5, "the adapter turned off")
    assert not torch.allclose(adapted, wide, rtol=1e-3)


def test_nothing_is_kept_while_gradients_are_recorded() -> None:
    encoder = PromptEncoder(16, (2, 2), (32, 32), 4)
    encoder.pe_layer.positional_encoding_gaussian_matrix.requires_grad_(True)
    first = encoder.get_dense_pe()
    assert first.requires_grad
    assert encoder.get_dense_pe() is not first


def test_made_in_inference_mode_used_with_gradients(tiny: Sam) -> None:
    image, prompts = random_image(60, 60), [Prompt([(4, 4)], [1])]
    with torch.inference_mode():
        tiny.predict(tiny.encode(image), prompts)
    tiny.requires_grad_(True)
    sparse, dense = tiny.prompt_encoder((torch.ones(1, 1, 2), torch.ones(1, 1)), None, None)
    pe = tiny.prompt_encoder.get_dense_pe()
    logits, _ = tiny.mask_decoder(torch.randn(1, 64, 8, 8), pe, sparse, dense, True)
    logits.sum().backward()


def test_copies_and_pickles(tiny: Sam) -> None:
    image, prompts = random_image(60, 60), [Prompt([(4, 4)], [1])]
    expected = tiny.predict(tiny.encode(image), prompts).low_res_logits
    for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert torch.equal(other.predict(other.encode(image), prompts).low_res_logits, expected)
