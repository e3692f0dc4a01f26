"""Compiled execution: the same results, and no compilation after the warm-up."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import TINY, random_image, random_model
from torch._dynamo.utils import counters

import sam
from sam import Prompt, Sam
from sam.inference import Bucket, Runtime


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sam]:
    torch._dynamo.reset()
    path: Path = tmp_path_factory.mktemp("compiled") / "tiny.safetensors"
    sam.save_checkpoint(random_model(TINY), path)
    yield sam.load_model(path, device="cpu", compile=True)
    torch._dynamo.reset()


def clicks(count: int, points: int, mask: bool = False) -> list[Prompt]:
    rng = np.random.default_rng(points)
    return [
        Prompt(
            rng.uniform(0, 48, (points, 2)),
            rng.integers(0, 2, points),
            mask_input=rng.normal(0, 3, (1, 32, 32)) if mask else None,
        )
        for _ in range(count)
    ]


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def test_torchs_limit_of_graphs_is_raised_around_our_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has it for each thread: raised once for all, it would be torch's own in every other thread."""
    limits: list[int] = []

    def compile_nothing(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            limits.append(torch._dynamo.config.recompile_limit)
            return function(*arguments, **keywords)

        return run

    before = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = random_model(TINY)
    model.runtime = Runtime(model)
    for _ in range(2):
        thread = threading.Thread(target=lambda: model.predict(model.encode(random_image(48, 60)), clicks(1, 1)))
        thread.start()
        thread.join()
        model.predict(model.encode(random_image(48, 60)), clicks(1, 1))
    assert len(limits) == 4 * (len(model.image_encoder.blocks) + 1)
    assert set(limits) == {256}
    with torch._dynamo.config.patch(recompile_limit=1000):  # a program's own
        model.encode(random_image(48, 60))
    assert limits[-1] == 1000
    assert torch._dynamo.config.recompile_limit == before < 256


@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(compiled: Sam) -> None:
    assert compiled.runtime is not None
    warmed = compiled.runtime.warmup(multimask=(True,), mask_input=(False,))
    assert len([step for step in warmed if step.what.startswith("Bucket")]) == 3 * len(compiled.token_buckets)
    assert set(compiled.runtime.buckets) == {
        Bucket(1, prompts, tokens, True, False, torch.float32) for prompts in (1, 2, 4) for tokens in (2, 3, 6, 11)
    }
    assert all(step.seconds > 0 for step in warmed)
    assert compiled.runtime.warmup(multimask=(True,), mask_input=(False,))[1:] == []  # but for the encoder's run
    embedding, before = compiled.encode(random_image(48, 60)), compilations()
    eager = copy.deepcopy(compiled)
    assert eager.runtime is None
    assert before > 0
    for count in (1, 2, 3, 5, 17):
        for points in range(1, 10):
            result = compiled.predict(embedding, clicks(count, points))
            expected = eager.predict(embedding, clicks(count, points))
            assert_close_l2(result.low_res_logits, expected.low_res_logits, 1e-5, f"{count} prompts, {points} points")
            assert_close_l2(result.iou_predictions, expected.iou_predictions, 1e-5, f"{count} prompts, {points} points")
    compiled.encode([random_image(40, 64), random_image(64, 40)])
    assert compilations() == before


@pytest.mark.slow
def test_one_mask_and_mask_inputs(compiled: Sam) -> None:
    embedding, eager = compiled.encode(random_image(48, 60)), copy.deepcopy(compiled)
    for multimask, mask in ((False, False), (True, True)):
        result = compiled.predict(embedding, clicks(1, 1, mask), multimask_output=multimask)
        expected = eager.predict(embedding, clicks(1, 1, mask), multimask_output=multimask)
        assert_close_l2(result.low_res_logits, expected.low_res_logits, 1e-5, f"{multimask}, {mask}")


@pytest.mark.slow
def test_a_click_compiled(compiled: Sam) -> None:
    image, eager = random_image(48, 60), copy.deepcopy(compiled)
    embedding = compiled.encode(image)
    assert_close_l2(embedding.features, eager.encode(image).features, 1e-5, "features")
    result, expected = compiled.predict(embedding, clicks(1, 1)), eager.predict(embedding, clicks(1, 1))
    assert_close_l2(result.low_res_logits, expected.low_res_logits, 1e-5, "a click")
    assert_close_l2(result.iou_predictions, expected.iou_predictions, 1e-5, "a click")


def test_what_fits_no_bucket_runs_and_says_so_once(compiled: Sam, caplog: pytest.LogCaptureFixture) -> None:
    eager = copy.deepcopy(compiled)
    embedding = eager.encode(random_image(48, 60))
    with caplog.at_level(logging.WARNING, logger="sam"):
        for _ in range(2):
            result = compiled.predict(embedding, clicks(1, 20))
            compiled.predict([embedding, embedding], [clicks(1, 1), clicks(1, 1)])
    assert_close_l2(result.low_res_logits, eager.predict(embedding, clicks(1, 20)).low_res_logits, 1e-6, "20 points")
    assert sorted(record.message for record in caplog.records if record.name == "sam") == [
        "prompts of more than 11 tokens fit no shape made ready and run eagerly",
        "prompts on several images at once fit no shape made ready and run eagerly",
    ]


@pytest.mark.slow
def test_changed_weights_are_seen(compiled: Sam) -> None:
    model = copy.deepcopy(compiled)
    model.runtime = Runtime(model)
    embedding = model.encode(random_image(48, 60))
    before = model.predict(embedding, clicks(1, 1)).low_res_logits
    with torch.no_grad():
        model.mask_decoder.output_upscaling[3].weight *= 2
    embedding = model.encode(random_image(48, 60))
    after = model.predict(embedding, clicks(1, 1)).low_res_logits
    assert not torch.allclose(after, before)
    expected = copy.deepcopy(model).predict(embedding, clicks(1, 1)).low_res_logits
    assert_close_l2(after, expected, 1e-5, "changed")
