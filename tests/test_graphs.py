"""CUDA graphs of the decoder, with a stand-in that runs again what a graph would replay; GPUs: tests/test_gpu.py."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from asking import (
    CLICKS,
    Rerun,
    agree,
    ask_at_random,
    assert_same,
    by_prediction,
    random_prompt,
    run_into_poisoned_outputs,
)
from models import TINY, random_image, random_model
from torch import Tensor

from sam import Prompt, Sam, load_model
from sam.inference import Bucket, Graphs, Runtime, StackedInput
from sam.sessions.interactive import InteractiveSession


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[Sam, Sam]:
    """One that replays, its buffers for results NaN before each run, and one that runs eagerly."""
    monkeypatch.setattr(Rerun, "recorded", 0)
    eager = random_model(TINY)
    replaying = copy.deepcopy(eager)
    replaying.runtime = Runtime(replaying, compile_encoder=False, recorder=Rerun)
    monkeypatch.setattr(Graphs, "run", run_into_poisoned_outputs)
    return replaying, eager


def test_replays_are_what_runs_eagerly(models: tuple[Sam, Sam]) -> None:
    ask_at_random(*models, requests=40, seed=0)


@pytest.mark.slow
def test_a_thousand_replays(models: tuple[Sam, Sam]) -> None:
    ask_at_random(*models, requests=1000, seed=1)


def test_a_bucket_is_recorded_once_and_listed(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    runtime = replaying.runtime
    assert runtime is not None
    embedding = eager.encode(random_image(48, 60))
    for count in (1, 3, 4):
        for points in (1, 2, 3, 4):
            replaying.predict(embedding, [Prompt(np.ones((points, 2)), np.ones(points))] * count)
    expected = {Bucket(1, p, t, True, False, torch.float32) for p in (1, 4) for t in (2, 3, 6)}
    assert set(runtime.buckets) == expected
    assert Rerun.recorded == len(expected)
    lines = runtime.table().splitlines()
    assert len(lines) == 1 + len(expected)
    assert lines[1].split()[:6] == ["1", "1", "2", "3", "no", "float32"]


def test_warm_up_records_and_reports(models: tuple[Sam, Sam]) -> None:
    replaying, _ = models
    runtime = replaying.runtime
    assert runtime is not None
    warmed = runtime.warmup(prompts=(1, 2), tokens=(2,), images=(1, 2), mask_input=(False, True))
    assert len(warmed) == 1 + len(runtime.buckets) == 1 + 2 * 2 * 2 * 2
    assert {step.what for step in warmed[1:]} == {str(bucket) for bucket in runtime.buckets}
    before = Rerun.recorded
    embeddings = replaying.encode([random_image(48, 60, seed=i) for i in range(2)])
    replaying.predict(embeddings[0], [Prompt([[3, 4]], [1])])
    replaying.predict(embeddings, [[Prompt([[3, 4]], [1])], [Prompt([[9, 4]], [0])]])
    assert Rerun.recorded == before


@pytest.mark.parametrize("change", ["in place", "loaded", "assigned"])
def test_changed_weights_are_recorded_anew(models: tuple[Sam, Sam], change: str) -> None:
    replaying, eager = models
    embedding, prompt = eager.encode(random_image(48, 60)), [Prompt([[3, 4]], [1])]
    before = replaying.predict(embedding, prompt)
    state = {name: 1.1 * value for name, value in eager.mask_decoder.state_dict().items()}
    for model in models:
        if change == "in place":
            with torch.no_grad():
                for name, value in model.mask_decoder.named_parameters():
                    value.copy_(state[name])
        else:
            model.mask_decoder.load_state_dict(state, assign=change == "assigned")
    result = replaying.predict(embedding, prompt)
    assert not torch.allclose(result.low_res_logits, before.low_res_logits, rtol=1e-3)
    assert_same(result, eager.predict(embedding, prompt), change)


def test_a_model_that_moves_is_recorded_anew(models: tuple[Sam, Sam]) -> None:
    replaying, eager = (model.double() for model in models)
    embedding, prompt = eager.encode(random_image(48, 60)), [Prompt([[3, 4]], [1])]
    assert_same(replaying.predict(embedding, prompt), eager.predict(embedding, prompt), "fp64")
    assert {bucket.dtype for bucket in replaying.runtime.buckets} == {torch.float64}  # type: ignore[union-attr]


def test_inside_inference_mode(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    embedding, prompt = eager.encode(random_image(48, 60)), [Prompt([[3, 4]], [1])]
    expected = eager.predict(embedding, prompt)
    for _ in range(2):
        with torch.inference_mode():
            inside = replaying.predict(replaying.encode(random_image(48, 60)), prompt)
        assert_same(inside, expected, "inside")
        assert_same(replaying.predict(embedding, prompt), expected, "outside")


def test_threads(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    embeddings = [eager.encode(random_image(48, 60, seed=i)) for i in range(2)]
    rng = np.random.default_rng(3)
    requests = [(embeddings[i % 2], [random_prompt(rng, False) for _ in range(1 + i % 3)]) for i in range(32)]
    expected = [eager.predict(*request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(lambda request: replaying.predict(*request), requests))
    for index, (one, other) in enumerate(zip(result, expected, strict=True)):
        assert_same(one, other, f"request {index}")


def test_what_fits_no_bucket_runs_and_says_so_once(models: tuple[Sam, Sam], caplog: pytest.LogCaptureFixture) -> None:
    replaying, eager = models
    embedding = eager.encode(random_image(48, 60))
    long = [Prompt(np.ones((12, 2)), np.ones(12))]
    few = [[Prompt([[3, 4]], [1])]] * 2
    with caplog.at_level(logging.WARNING, logger="sam"):
        for _ in range(2):
            assert_same(replaying.predict(embedding, long), eager.predict(embedding, long), "12 points")
            with torch.no_grad():
                on_seventeen = replaying.decode([embedding] * 17, _batch_on(range(4)), True)
            replaying.predict([embedding] * 2, few)
    assert torch.isfinite(on_seventeen[0]).all()
    assert sorted(record.message for record in caplog.records if record.name == "sam") == [
        "prompts of more than 11 tokens fit no shape made ready and run eagerly",
        "prompts on more than 16 images at once fit no shape made ready and run eagerly",
    ]
    replaying.mask_decoder.requires_grad_(True)
    with torch.enable_grad():  # a graph records no gradient
        logits = replaying.decode([embedding], _batch_on([0]), True).logits
    assert logits.requires_grad


def test_an_image_is_copied_once_and_again_when_it_changed() -> None:
    graphs = Graphs(torch.device("cpu"), Rerun)
    image, other = torch.ones(1, 3), torch.full((1, 3), 5.0)

    def run(*tensors: Tensor) -> Tensor:
        rows = [StackedInput(tensors, (2, 3))]
        with graphs.run("key", lambda x: (x + 0,), rows) as (outputs, _):
            return outputs[0].clone()

    run(image)
    held = graphs._buffers[("input", 0), (2, 3), torch.float32, torch.contiguous_format].tensor
    held[0, 0] = 9
    assert run(image)[0, 0] == 9  # was not copied
    image += 1
    assert run(image)[0].tolist() == [2, 2, 2]
    assert run(image, other)[1].tolist() == [5, 5, 5]
    assert run(other)[0].tolist() == [5, 5, 5]


def test_results_that_are_fed_back_are_copied_each_time() -> None:
    graphs, value, result = Graphs(torch.device("cpu"), Rerun), torch.ones(1), []
    for _ in range(4):
        with graphs.run("key", lambda x: (2 * x,), [StackedInput.of(value)]) as (outputs, _):
            result.append(float(outputs[0]))
            value = outputs[0]
    assert result == [2, 4, 8, 16]


def _batch_on(images: range | list[int]) -> object:
    from sam.prompts.batch import PromptBatch

    count = len(images)
    return PromptBatch(torch.ones(count, 2, 2), torch.ones(count, 2, dtype=torch.int64), None, torch.tensor(images))


# The interactive loop -------------------------------------------------------------------------------------


def test_a_session_of_clicks() -> None:
    """Twelve: the last two have more tokens than any bucket."""
    model = load_model(device="cpu")
    embedding = model.encode(random_image(45, 70))
    session = InteractiveSession(model, embedding)
    for click, mask in zip(CLICKS, by_prediction(model, embedding, CLICKS), strict=True):
        answer = session.click(*click)
        assert agree(answer, mask)
        assert answer.size == (45, 70)
    memory = answer.packed.ctypes.data
    session.reset()
    again = session.click(*CLICKS[0])
    assert again.packed.ctypes.data == memory  # recycled
    assert agree(again, by_prediction(model, embedding, CLICKS[:1])[0])


def test_a_session_by_a_box() -> None:
    model = load_model(device="cpu")
    embedding = model.encode(random_image(45, 70))
    session, box = InteractiveSession(model, embedding), (10.0, 12.0, 40.0, 30.0)
    result = model.predict(embedding, [Prompt(box=box)], multimask_output=False)
    answer = session.box(*box)
    assert agree(answer, result.masks[0, 0].numpy())
    assert answer.predicted_iou == pytest.approx(float(result.iou_predictions[0, 0]), abs=1e-5)
    refined = model.predict(embedding, [Prompt([(20, 20)], [0], box, result.low_res_logits[0])], multimask_output=False)
    assert agree(session.click(20, 20, 0), refined.masks[0, 0].numpy())


def test_a_bad_click_changes_nothing() -> None:
    model = load_model(device="cpu")
    embedding = model.encode(random_image(45, 70))
    session = InteractiveSession(model, embedding)
    session.click(*CLICKS[0])
    with pytest.raises(ValueError, match=r"label must be 1 \(object\) or 0 \(background\), got 7"):
        session.click(3, 4, 7)
    with pytest.raises(ValueError, match=r"label must be 1 .* got -1"):
        session.click(3, 4, -1)
    with pytest.raises(ValueError, match="points must be finite"):
        session.click(float("nan"), 4)
    with pytest.raises(ValueError, match=r"points must lie within 1e\+30 px of 0, got 1e\+300"):
        session.click(1e300, 4)
    with pytest.raises(ValueError, match=r"box must lie within 1e\+30 px of 0, got 3e\+38"):
        session.box(0, 0, 3e38, 3)
    assert agree(session.click(*CLICKS[1]), by_prediction(model, embedding, CLICKS[:2])[1])


def test_sessions_of_one_model_do_not_mix(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    embeddings = [eager.encode(random_image(48, 60, seed=i)) for i in range(2)]
    sessions = [InteractiveSession(replaying, embedding) for embedding in embeddings]
    expected = [by_prediction(eager, embedding, CLICKS[:5]) for embedding in embeddings]
    for turn in range(5):
        for session, masks in zip(sessions, expected, strict=True):
            assert agree(session.click(*CLICKS[turn]), masks[turn])


def test_sessions_on_images_of_any_size_share_what_is_recorded(models: tuple[Sam, Sam]) -> None:
    replaying, eager = models
    recorded = []
    for size in ((48, 60), (33, 64), (64, 20)):
        embedding = eager.encode(random_image(*size))
        session = InteractiveSession(replaying, embedding)
        for click, mask in zip(CLICKS[:4], by_prediction(eager, embedding, CLICKS[:4]), strict=True):
            assert agree(session.click(*click), mask)
        recorded.append(Rerun.recorded)
    assert recorded[0] == recorded[-1] == len(replaying.runtime.buckets) > 1  # type: ignore[union-attr]


def test_a_move_to_where_it_is_records_anew(models: tuple[Sam, Sam]) -> None:
    """It drops what is derived from the weights, whose addresses a graph has."""
    replaying, eager = models
    embedding, requests = eager.encode(random_image(48, 60)), [Prompt([[3, 4]], [1])]
    for move in (lambda: None, lambda: replaying.to("cpu"), lambda: replaying.mask_decoder.float()):
        before = Rerun.recorded
        move()
        replaying.predict(embedding, requests)
        assert Rerun.recorded == before + 1
        replaying.predict(embedding, requests)
        assert Rerun.recorded == before + 1


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, got cpu"):
        load_model(device="cpu", cuda_graphs=True)
