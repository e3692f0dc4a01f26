"""The engine: many clients, one model; what is promised when it is busy, full or late."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import numpy as np
import pytest
import torch
from busy import CLICK, hold
from gate import Gate
from models import TINY_2, random_image, random_model
from waiting import SECONDS, wait_until

import sam
from sam import Prompt, Sam, SamAutomaticMaskGenerator
from sam.engine import AutomaticOptions, DeadlineExceededError, Engine, QueueFullError
from sam.engine.errors import EngineError
from sam.engine.stages import fair_shares
from sam.masks import rle


def test_answers_are_those_of_the_model(nano: Sam, photo: np.ndarray) -> None:
    """Whatever shares a batch with a request, its masks are the model's own."""
    images = [photo, np.ascontiguousarray(photo[:200, 50:])]
    prompts = [
        [Prompt([(170, 115)], [1]), Prompt(box=(135, 85, 208, 148))],
        [Prompt([(60, 70), (5, 5)], [1, 0])],
    ]
    with Engine(nano, max_batch=8) as engine:
        futures = [engine.segment(*both, keep_logits=True) for both in zip(images, prompts, strict=True)]
        for image, requests, future in zip(images, prompts, futures, strict=True):
            expected = nano.predict(nano.encode(image), requests)
            for index, answer in enumerate(future.result(SECONDS)):
                masks = np.stack([rle.decode(encoded) for encoded in answer.rles])
                differ = (masks != expected.masks[index].numpy()).mean()
                assert differ < 1e-3  # other batches sum in another order, which may move a border's pixel
                np.testing.assert_allclose(answer.predicted_iou, expected.iou_predictions[index], atol=1e-4)
                assert answer.low_res_logits is not None
                np.testing.assert_allclose(answer.low_res_logits, expected.low_res_logits[index], atol=2e-2)


def test_answers_of_sam_2_have_an_object_score() -> None:
    model, image = random_model(TINY_2), random_image(48, 60)
    for mlp in model.sam_mask_decoder.output_hypernetworks_mlps:
        mlp.layers[2].weight.mul_(30)
    prompts = [Prompt([(20, 30)], [1]), Prompt(box=(5, 6, 40, 50))]
    expected = model.predict(model.encode(image), prompts)
    assert expected.object_scores is not None
    with Engine(model) as engine:
        answers = engine.segment(image, prompts, keep_logits=True).result(SECONDS)
    for row, answer in enumerate(answers):
        assert answer.object_score == pytest.approx(float(expected.object_scores[row]), abs=1e-4)
        assert answer.low_res_logits is not None
        assert np.abs(answer.low_res_logits).max() == 32
        np.testing.assert_allclose(answer.low_res_logits, expected.low_res_logits[row], atol=2e-2)
        masks = np.stack([rle.decode(encoded) for encoded in answer.rles])
        assert (masks != expected.masks[row].numpy()).mean() < 1e-3


def test_embedding_is_the_models_bit_for_bit(model: Sam, engine_of: Callable[..., Engine]) -> None:
    image = random_image(200, 300)
    embedding = engine_of().embed(image).result(SECONDS)
    expected = model.encode(image)
    assert embedding.features.equal(expected.features)
    assert embedding.geometry == expected.geometry
    assert embedding.image_hash == expected.image_hash
    assert embedding.model_hash == model.model_hash


def test_automatic_is_the_generators(nano: Sam) -> None:
    image = random_image(64, 96)
    image[16:48, 20:60] = (220, 40, 40)
    options = AutomaticOptions(points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    generator = sam.SamAutomaticMaskGenerator(
        nano, 2, pred_iou_thresh=0.0, stability_score_thresh=0.0, output_mode="uncompressed_rle", points_per_batch=3
    )
    with Engine(nano, max_batch=3) as engine:
        records = engine.automatic(image, options).result(SECONDS)
    assert records == generator.generate(image)
    assert records


@pytest.mark.parametrize(
    ("image", "prompts", "message"),
    [
        (np.zeros((4, 4), np.uint8), [CLICK], r"the image must be \[H, W, 3\]"),
        (np.zeros((1, 5000, 3), np.uint8), [CLICK], "aspect ratio"),
        (random_image(8, 8), [], "at least one prompt"),
        (random_image(8, 8), [Prompt(mask_input=np.zeros((1, 3, 3)))], "mask_input must be low-resolution logits"),
        (sam.ImageEmbedding(torch.zeros(1, 2, 3, 4), sam.embedding.ImageGeometry((4, 4), (4, 4), 4)), [CLICK], "feat"),
    ],
)
def test_a_bad_request_raises_where_it_is_made(
    engine_of: Callable[..., Engine], gate: Gate, image: Any, prompts: list[Prompt], message: str
) -> None:
    """It never meets the batch of those that wait at the same time."""
    engine = engine_of()
    hold(engine, gate)
    good = engine.segment(random_image(8, 8), [CLICK])
    with pytest.raises(ValueError, match=message):
        engine.segment(image, prompts)
    gate.open.set()
    assert len(good.result(SECONDS)) == 1
    assert engine.counters()["accepted"] == 2


def test_whatever_waits_is_one_batch(engine_of: Callable[..., Engine], gate: Gate) -> None:
    """Ragged prompts of several images together, images together, without any delay before them."""
    engine = engine_of(max_batch=16, max_images=4)
    hold(engine, gate)
    futures = [engine.segment(random_image(8, 8 + i), [CLICK] * (i + 1)) for i in range(4)]
    gate.open.set()
    assert [len(future.result(SECONDS)) for future in futures] == [1, 2, 3, 4]
    assert gate.encoded == [1, 4]
    assert gate.decoded == [10]


def test_batches_are_full_under_saturation(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_batch=8)
    embedding = hold(engine, gate)
    gate.open.set()
    handle = embedding.result(SECONDS)
    gate.open.clear()
    gate.entered.clear()
    futures = [engine.segment(handle, [CLICK])]
    assert gate.entered.wait(SECONDS)
    futures += [engine.segment(handle, [CLICK] * 3) for _ in range(40)]
    gate.open.set()
    for future in futures:
        future.result(SECONDS)
    later = gate.decoded[1:]
    assert sum(later) == 120
    assert sum(later) / (8 * len(later)) >= 0.9


def test_masks_of_one_and_of_three_are_not_mixed(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of()
    hold(engine, gate)
    three, one = (engine.segment(random_image(8, 8), [CLICK], multimask_output=multi) for multi in (True, False))
    gate.open.set()
    assert len(three.result(SECONDS)[0].rles) == 3
    assert len(one.result(SECONDS)[0].rles) == 1


def test_an_embedding_of_another_dtype_is_refused(engine_of: Callable[..., Engine], model: Sam) -> None:
    made = model.encode(random_image(8, 8))
    engine = engine_of()
    for dtype in (torch.float64, torch.int64, torch.bfloat16):
        other = sam.ImageEmbedding(made.features.to(dtype), made.geometry)
        with pytest.raises(ValueError, match=f"the embedding is in {dtype}, the model in torch.float32"):
            engine.segment(other, [CLICK])
    assert engine.pending == 0


def test_options_that_are_no_numbers_above_zero_are_refused(engine_of: Callable[..., Engine], model: Sam) -> None:
    nan = float("nan")
    for name, value in (("deadline", nan), ("max_images", 0), ("max_images", -1), ("max_batch", 0)):
        with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
            Engine(model, **{name: value})
    with pytest.raises(ValueError, match="deadline must be positive, got nan"):
        engine_of().segment(random_image(8, 8), [CLICK], deadline=nan)
    with pytest.raises(ValueError, match=r"points_per_side must be within 1..1024, got 10000000"):
        AutomaticOptions(points_per_side=10**7)
    with pytest.raises(ValueError, match="truth value of an array"):
        engine_of().segment(random_image(8, 8), [CLICK], np.array([True, False]))  # type: ignore[arg-type]


def testfair_shares() -> None:
    assert fair_shares([(1, 1), (9, 1), (9, 1)], 8, 99) == [1, 4, 3]
    assert fair_shares([(1, 1), (1, 1), (1, 1)], 2, 99) == [1, 1, 0]
    assert fair_shares([(2, 1), (1, 1)], 8, 99) == [2, 1]
    assert fair_shares([(9, 60), (2, 1)], 8, 50) == [1, 0]
    assert fair_shares([(2, 1), (9, 60), (9, 20)], 8, 50) == [2, 0, 2]


def test_large_masks_make_small_batches(engine_of: Callable[..., Engine], gate: Gate) -> None:
    """Prompts on a large image do not keep others waiting for sixteen of them; small ones fill their batch."""
    engine = engine_of(max_batch=8)
    engine._decode.max_pixels = 8 * 10 * 10
    gate.open.set()
    large = engine.embed(random_image(30, 30)).result(SECONDS)
    small = engine.embed(random_image(8, 8)).result(SECONDS)
    assert len(engine.segment(large, [CLICK] * 3).result(SECONDS)) == 3
    assert gate.decoded == [1, 1, 1]
    assert len(engine.segment(small, [CLICK] * 8).result(SECONDS)) == 8
    assert gate.decoded[3:] == [8]


def test_a_huge_request_does_not_starve_others(engine_of: Callable[..., Engine], gate: Gate) -> None:
    """A click that comes after 200 prompts is in the very next batch."""
    engine = engine_of(max_batch=4)
    gate.open.set()
    handle = engine.embed(random_image(8, 8)).result(SECONDS)
    gate.open.clear()
    gate.entered.clear()
    huge = engine.segment(handle, [CLICK] * 200)
    assert gate.entered.wait(SECONDS)
    answered_at: list[int] = []
    small = engine.segment(handle, [CLICK])
    small.add_done_callback(lambda future: answered_at.append(len(gate.decoded)))
    gate.open.set()
    assert len(huge.result(SECONDS)) == 200
    assert answered_at == [2]


def test_clicks_pass_between_the_batches_of_everything(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_batch=2)
    gate.open.set()
    handle = engine.embed(random_image(8, 8)).result(SECONDS)
    gate.open.clear()
    gate.entered.clear()
    everything = engine.automatic(handle, AutomaticOptions(points_per_side=8))
    assert gate.entered.wait(SECONDS)
    click = engine.segment(handle, [CLICK])
    gate.open.set()
    click.result(SECONDS)
    assert not everything.done()
    everything.result(SECONDS)
    assert gate.decoded[1] == 1


def test_everything_that_is_begun_ends_before_another_begins(
    engine_of: Callable[..., Engine], gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is begun holds masks: under load they would all be held, and all expire together."""
    steps: list[str] = []
    names = iter("abc")
    steps_of = SamAutomaticMaskGenerator.steps

    def noted_steps(self: SamAutomaticMaskGenerator, embedding: sam.ImageEmbedding) -> Any:
        name, inner = next(names), steps_of(self, embedding)
        while True:
            steps.append(name)
            try:
                yield next(inner)
            except StopIteration as stop:
                return stop.value

    monkeypatch.setattr(SamAutomaticMaskGenerator, "steps", noted_steps)
    engine = engine_of(max_batch=2)
    hold(engine, gate)
    waiting = [engine.automatic(random_image(8, 8, seed), AutomaticOptions(points_per_side=3)) for seed in range(3)]
    gate.open.set()
    for future in waiting:
        future.result(SECONDS)
    assert len(steps) > 6
    assert steps == sorted(steps)


def test_exactly_as_many_are_rejected_as_do_not_fit(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_queue=5)
    hold(engine, gate)
    image, outcomes = random_image(8, 8), []

    def ask() -> None:
        try:
            outcomes.append(engine.segment(image, [CLICK]))
        except QueueFullError as full:
            outcomes.append(full)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rejected = [outcome for outcome in outcomes if isinstance(outcome, QueueFullError)]
    assert len(rejected) == 2
    assert engine.counters()["rejected"] == 2
    assert str(rejected[0]) == "5 requests are waiting already"
    gate.open.set()
    accepted = [outcome for outcome in outcomes if isinstance(outcome, Future)]
    assert all(len(future.result(SECONDS)) == 1 for future in accepted)
    wait_until(lambda: engine.pending == 0)
    engine.segment(image, [CLICK]).result(SECONDS)  # there is room again


def test_an_expired_request_never_reaches_the_model(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of()
    hold(engine, gate)
    late = engine.segment(random_image(8, 8), [CLICK], deadline=0.01)
    in_time = engine.segment(random_image(7, 7), [CLICK])
    time.sleep(0.05)
    gate.open.set()
    with pytest.raises(DeadlineExceededError):
        late.result(SECONDS)
    in_time.result(SECONDS)
    assert gate.encoded == [1, 1]
    assert gate.decoded == [1]
    wait_until(lambda: engine.pending == 0)
    assert engine.counters()["expired"] == 1


def test_a_cancelled_request_never_reaches_the_model(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_queue=2)
    hold(engine, gate)
    left = engine.segment(random_image(8, 8), [CLICK])
    assert left.cancel()
    assert engine.pending == 1  # its place is free at once
    stays = engine.segment(random_image(7, 7), [CLICK])
    gate.open.set()
    stays.result(SECONDS)
    with pytest.raises(CancelledError):
        left.result()
    assert wait([left, stays], SECONDS).not_done == set()
    assert gate.encoded == [1, 1]
    assert engine.counters()["cancelled"] == 1


def test_a_request_cancelled_half_way_stops_there(engine_of: Callable[..., Engine], gate: Gate) -> None:
    engine = engine_of(max_batch=4)
    gate.open.set()
    handle = engine.embed(random_image(8, 8)).result(SECONDS)
    gate.open.clear()
    gate.entered.clear()
    huge = engine.segment(handle, [CLICK] * 200)
    assert gate.entered.wait(SECONDS)
    assert huge.cancel()
    gate.open.set()
    engine.segment(handle, [CLICK]).result(SECONDS)
    assert gate.decoded == [4, 1]


def test_counters_exist_from_the_start(engine_of: Callable[..., Engine]) -> None:
    """A rate over one that appears with the first failure misses that failure."""
    counters = engine_of().counters()
    for error in (*EngineError.__subclasses__(), EngineError):
        assert counters[error.counter] == 0
    assert {"completed", "cancelled", "out_of_memory", "cache_evictions"} <= set(counters)


def test_nothing_of_an_answered_request_is_kept(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(embedding_cache_bytes=10)
    result = engine.segment(random_image(8, 8), [CLICK]).result(SECONDS)
    reference = weakref.ref(result[0])
    del result
    engine.embed(random_image(9, 9)).result(SECONDS)
    wait_until(lambda: gc.collect() >= 0 and reference() is None)


def test_many_threads(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(max_batch=8, max_queue=1000)
    images = [random_image(20, 20 + i) for i in range(5)]
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(5):
                image, count = images[generator.integers(5)], int(generator.integers(1, 20))
                future = engine.segment(image, [CLICK] * count)
                if generator.random() < 0.2:
                    future.cancel()
                    continue
                answers = future.result(SECONDS)
                assert len(answers) == count
                assert answers[0].rles[0]["size"] == list(image.shape[:2])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    wait_until(lambda: engine.pending == 0)
    counters = engine.counters()
    assert counters["accepted"] == 40 == counters["completed"] + counters["cancelled"]


@pytest.mark.parametrize("option", ["max_batch", "max_queue", "deadline"])
def test_bad_options(model: Sam, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        Engine(model, **{option: 0})
