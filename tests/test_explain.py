"""``model.explain()`` and the log: what runs, and why not fused where it is not."""

from __future__ import annotations

import logging

import pytest
import torch
from models import TINY, TINY_2, random_image, random_model

from sam import Prompt
from sam.inference import Runtime
from sam.inference.decode import _log_once


def test_a_stock_model_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines = random_model(TINY).explain().splitlines()
    assert lines[:5] == [
        "The model is float32 on cpu, kernels='auto'.",
        "The image encoder runs fused.",
        "The mask decoder runs fused.",
        "The image's projections are absorbed into the tokens of prompts of up to 11 tokens.",
        "Nothing is compiled and no CUDA graph is replayed.",
    ]
    assert lines[5:] == [
        f"{operation}: torch."
        for operation in (
            *("preprocess_image", "rel_pos_attention", "token_to_image_attention", "two_way_attention"),
            *("hypernetwork_masks", "mask_postprocess", "nms", "connected_components"),
        )
    ]


def test_a_stock_model_of_sam_2_runs_fused() -> None:
    lines = random_model(TINY_2).explain().splitlines()
    assert lines[1:4] == [
        "The image encoder runs fused.",
        "The mask decoder runs fused.",
        "The image's projections are absorbed into the tokens of prompts of up to 10 tokens.",
    ]
    operations = {line.partition(":")[0] for line in lines[5:]}
    assert {"window_attention", "hypernetwork_masks", "memory_attention"} < operations
    assert lines[-2:] == ["The memory attention runs fused.", "The memory encoder runs fused."]
    assert "rel_pos_attention" not in operations


def test_what_a_program_changed_is_named() -> None:
    model = random_model(TINY)
    model.runtime = Runtime(model, compile_encoder=False)
    block = model.mask_decoder.transformer.layers[0]
    block.self_attn.q_proj = torch.nn.Sequential(block.self_attn.q_proj)
    block.cross_attn_token_to_image.k_proj = torch.nn.Sequential(block.cross_attn_token_to_image.k_proj)
    model.mask_decoder.output_upscaling[2] = torch.nn.ReLU()
    lines = model.explain().splitlines()
    assert lines[2] == "The mask decoder runs fused."
    assert lines[3].startswith("The image is projected for every prompt: a projection or norm")
    assert lines[4].startswith("The masks are upscaled by mask_decoder.output_upscaling")
    assert lines[5] == (
        "Prompts of 0 shapes are compiled so far; the encoder's blocks are not compiled: compile_encoder is False."
    )
    model.image_encoder.blocks[1].attn.register_forward_hook(lambda *_: None)
    block.mlp.register_forward_hook(lambda *_: None)
    lines = model.explain().splitlines()
    assert lines[1:3] == [
        "The image encoder calls its modules as officially: image_encoder.blocks.1.attn has a forward hook.",
        "The mask decoder calls its modules as officially: mask_decoder.transformer.layers.0.mlp has a forward hook.",
    ]
    other = random_model(TINY)
    other.kernels = "reference"
    assert "The mask decoder computes the paper's formulas: kernels='reference' asks for them." in other.explain()


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    model = random_model(TINY)
    embedding, prompts = model.encode(random_image(20, 30)), [Prompt([(3, 4)], [1])]
    with caplog.at_level(logging.INFO, logger="sam"):
        model.predict(embedding, prompts)
        assert not [record for record in caplog.records if record.name == "sam"]
        model.mask_decoder.transformer.register_forward_hook(lambda *_: None)
        for _ in range(2):
            model.predict(embedding, prompts)
    assert [record.message for record in caplog.records if record.name == "sam"] == [
        "prompts are decoded by the official calls of the modules: mask_decoder.transformer has a forward hook"
    ]
