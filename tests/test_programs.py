"""Calls that programs make of Meta's package answer as there: ``tests/official_calls.json`` holds its answers.

``python -m benchmarks.official_calls --segment-anything PATH`` wrote them down, by the functions that run here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close_l2
from torch import Tensor

import sam
from benchmarks import official_calls
from benchmarks.official_calls import decoder_calls, encoder_calls, predictor_calls, summary
from sam import Sam
from sam.inference.fused_encoder import encode

OFFICIAL: dict[str, Any] = json.loads((Path(__file__).parent / "official_calls.json").read_text())


def assert_official(answers: dict[str, dict[str, Tensor]]) -> None:
    """Hold every answer against the written one, to the rounding of fp32 sums and of six digits."""
    for call, result in answers.items():
        expected = OFFICIAL["calls"][call]
        assert result.keys() == expected.keys(), call
        for name, answer in result.items():
            ours, theirs = summary(answer), expected[name]
            what = f"{call}, {name}"
            assert ours["shape"] == theirs["shape"], what
            assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4), what
            largest = max(map(abs, theirs["samples"]))
            assert ours["samples"] == pytest.approx(theirs["samples"], rel=1e-3, abs=1e-4 * largest), what


def encoded(encoder: Any, pixels: Tensor, kernels: str | None) -> Tensor:
    """Call an encoder as a program does, or with ``kernels``."""
    return encoder(pixels) if kernels is None else encode(encoder, pixels, kernels)


def test_of_these_weights_and_calls(nano: Sam) -> None:
    assert OFFICIAL["model_hash"] == nano.model_hash, "run python -m benchmarks.official_calls again"
    assert len(OFFICIAL["calls"]) > 20


@pytest.mark.parametrize("kernels", [None, "torch", "reference"], ids=["called", "fused", "official modules"])
def test_stand_ins_and_sizes_of_the_image_encoder(kernels: str | None) -> None:
    """LoRA and its kind in place of any linear, in inference and training, and inputs of other sizes."""
    assert_official(encoder_calls(sam.modeling, lambda encoder, pixels: encoded(encoder, pixels, kernels)))


def test_numbers_of_rows_of_the_mask_decoder(nano: Sam) -> None:
    """Several images with one or no prompt, one image with several, and what lies between, with a gradient."""
    assert_official(decoder_calls(nano))


def test_images_squares_and_sizes_of_the_predictor(nano: Sam) -> None:
    """Images of other dtypes and layouts, a square that is padded already, and an input larger than the model's."""
    assert_official(predictor_calls(sam, nano))


def test_a_model_made_smaller_by_its_attributes(nano: Sam) -> None:
    """What was kept for its first size must not answer for the second."""
    assert_official({"smaller by hand": official_calls.smaller_by_hand(sam, nano)})


def test_a_stand_in_is_called_as_officially() -> None:
    """Once a pass, with the windows and their padding: hooks, counters and caches of its user see nothing else."""
    encoder = official_calls.small_encoder(sam.modeling)
    official_calls.put(encoder, "SAMed")
    seen: list[tuple[int, ...]] = []
    for block in encoder.blocks:
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    for kernels in (None, "torch", "reference"):
        seen.clear()
        encoded(encoder, torch.zeros(1, 3, 64, 64), kernels)
        assert seen == [(9, 3, 3, 96), (1, 8, 8, 96), (9, 3, 3, 96)]


def test_rows_that_do_not_fit_together(nano: Sam) -> None:
    pe = nano.prompt_encoder.get_dense_pe()
    sparse, dense = nano.prompt_encoder(None, torch.zeros(3, 4), None)
    with pytest.raises(ValueError, match=r"one row .*or as many.*'image_embeddings': 2, 'image_pe': 1, 'sparse\w+': 3"):
        nano.mask_decoder(torch.zeros(2, 256, 32, 32), pe, sparse, dense, multimask_output=True)
    none = nano.mask_decoder(torch.zeros(1, 256, 32, 32), pe, sparse[:0], dense[:0], multimask_output=True)
    assert [x.shape for x in none] == [(0, 3, 128, 128), (0, 3)]


def test_rows_beyond_the_official(nano: Sam) -> None:
    """An image with its own prompt each is refused officially; it is here what it is for each alone."""
    pe, features = nano.prompt_encoder.get_dense_pe(), official_calls.numbers(2, 256, 32, 32, scale=0.3)
    sparse, dense = nano.prompt_encoder(None, torch.tensor([[0.0, 0, 99, 99], [9, 9, 200, 300]]), None)
    together = nano.mask_decoder(features, pe, sparse, dense, multimask_output=True)
    for row in range(2):
        part = slice(row, row + 1)
        alone = nano.mask_decoder(features[part], pe, sparse[part], dense[part], multimask_output=True)
        for ours, expected in zip(together, alone, strict=True):
            assert_close_l2(ours[part], expected, 1e-5, f"image {row}")
