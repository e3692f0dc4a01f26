"""Streams of the engine: videos of several clients, frame by frame, each as if it were alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL_2, TINY, draw_weights_that_see, random_image, random_model
from waiting import SECONDS, wait_until

import sam
from sam import Prompt
from sam.engine import Engine, EngineFailedError, OutOfMemoryError, StreamError, TrackedFrame, streams
from sam.masks import rle
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base
from sam.video.session import step_together

CLICK, BOX = Prompt([(15, 20)], [1]), Prompt(box=[30, 20, 55, 40])
CLIPS = [[random_image(45, 70, seed) for seed in range(start, start + 4)] for start in (0, 10)]


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2))


@pytest.fixture
def engine(model: SAM2Base) -> Iterator[Engine]:
    made = Engine(model)
    yield made
    made.close(SECONDS)


class Held:
    """The stage's step, which waits to be let on and notes how many frames each batch has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open, self.batches = threading.Event(), threading.Event(), list[int]()
        self.faults: list[BaseException] = []
        monkeypatch.setattr(streams, "step_together", self)

    def __call__(self, sessions: Any, frames: Any) -> Any:
        self.batches.append(len(frames))
        self.entered.set()
        assert self.open.wait(SECONDS)
        results = step_together(sessions, frames)
        if self.faults:  # after the sessions have changed
            raise self.faults.pop(0)
        return results


def assert_same(answer: TrackedFrame | None, expected: sam.FrameResult) -> None:
    assert answer is not None
    assert (answer.frame, answer.objects, answer.size) == (expected.frame, expected.objects, expected.size)
    assert answer.rles == expected.rles()
    np.testing.assert_array_equal(answer.object_scores, expected.object_scores)
    np.testing.assert_array_equal(answer.predicted_iou, expected.predicted_iou)


def test_streams_are_tracked_as_if_each_were_alone(model: SAM2Base, engine: Engine) -> None:
    """Bit for bit, between clicks on an image: with objects prompted, added, corrected and removed on the way."""
    tracked = [list(sam.track(model, iter(CLIPS[1]), {0: {"b": BOX}, 2: {"c": CLICK}})), []]
    tracking = sam.track(model, iter(CLIPS[0]), {0: {"a": CLICK}})
    for result in tracking:
        tracked[1].append(result)
        if result.frame == 1:
            tracking.session.add("a", Prompt([(50, 30)], [0]))
            tracking.session.add("d", BOX)
    one, other = engine.open_stream(), engine.open_stream()
    assert one.prompt({"c": CLICK}, frame=2).result(SECONDS) is None
    futures = [[one.push(CLIPS[1][0], {"b": BOX})], [other.push(CLIPS[0][0], {"a": CLICK}, frame=0)]]
    clicks = [engine.segment(CLIPS[0][0], [CLICK])]
    for frame in range(1, 4):
        futures[0].append(one.push(CLIPS[1][frame]))
        futures[1].append(other.push(CLIPS[0][frame]))
        clicks.append(engine.segment(CLIPS[0][frame], [CLICK]))
        if frame == 1:
            corrected = other.prompt({"a": Prompt([(50, 30)], [0]), "d": BOX})
    for of_stream, expected in zip(futures, tracked, strict=True):
        for future, result in zip(of_stream, expected, strict=True):
            assert_same(future.result(SECONDS), result)
    answer = corrected.result(SECONDS)
    assert answer is not None
    assert (answer.frame, answer.objects) == (1, ("a", "d"))
    assert all(rle.decode(mask).any() for mask in answer.rles)
    assert (other.frame, other.size, other.objects) == (3, (45, 70), ("a", "d"))
    without = other.remove("a").result(SECONDS)
    assert without is not None
    assert without.objects == other.objects == ("d",)
    assert without.rles == [futures[1][3].result().rles[1]]
    assert [len(click.result(SECONDS)) for click in clicks] == [1] * 4
    assert engine.counters()["frames"] == 8 + 3


def test_masks_of_any_size_wait_small(model: SAM2Base, engine: Engine) -> None:
    mask = np.zeros((450, 700), bool)
    mask[200:, 300:] = True
    stream = engine.open_stream()
    stream.prompt({"a": mask}, frame=1).result(SECONDS)
    assert stream.session is not None
    assert stream.session._scheduled[1]["a"].shape == (64, 64)
    answers = [stream.push(frame).result(SECONDS) for frame in CLIPS[0][:2]]
    for answer, result in zip(answers, sam.track(model, iter(CLIPS[0][:2]), {1: {"a": mask}}), strict=True):
        assert_same(answer, result)


def test_what_a_stream_cannot_do_changes_nothing(model: SAM2Base, engine: Engine) -> None:
    stream, expected = engine.open_stream(), list(sam.track(model, iter(CLIPS[0][:2]), {0: {"a": CLICK}}))
    assert_same(stream.push(CLIPS[0][0], {"a": CLICK}).result(SECONDS), expected[0])
    for future, words in (
        (stream.push(CLIPS[0][1], frame=0), "the next frame is 1, not 0"),
        (stream.push(CLIPS[0][1], {"a": BOX}, frame=2), "the next frame is 1, not 2"),
        (stream.prompt({"a": BOX}, frame=-1), "frame -1 went by, the current one is 0"),
        (stream.remove("z"), "there is no object 'z'"),
    ):
        with pytest.raises(StreamError, match=words):
            future.result(SECONDS)
    with pytest.raises(TypeError, match=r"a sam\.Prompt or a mask"):
        stream.push(CLIPS[0][1], {"a": [1, 2]})
    with pytest.raises(ValueError, match="at least one prompt"):
        stream.prompt({})
    with pytest.raises(TypeError, match="the frame must be a numpy array"):
        stream.push(7)
    assert_same(stream.push(CLIPS[0][1], frame=1).result(SECONDS), expected[1])
    assert engine.counters()["refused"] == 4
    stream.close()
    assert stream.nbytes == 0
    with pytest.raises(StreamError, match="the stream is closed"):
        stream.push(CLIPS[0][2]).result(SECONDS)
    with Engine(random_model(TINY)) as of_images, pytest.raises(TypeError, match="SAM do not track"):
        of_images.open_stream()


def test_without_memory_a_stream_stays_where_it_was(
    model: SAM2Base, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, expected = engine.open_stream(), list(sam.track(model, iter(CLIPS[0][:3]), {0: {"a": CLICK}}))
    assert_same(stream.push(CLIPS[0][0], {"a": CLICK}).result(SECONDS), expected[0])
    held = Held(monkeypatch)
    held.open.set()
    held.faults = [torch.OutOfMemoryError("CUDA out of memory.")] * 3
    with pytest.raises(OutOfMemoryError):
        stream.push(CLIPS[0][1], {"b": BOX}).result(SECONDS)
    assert_same(stream.push(CLIPS[0][1]).result(SECONDS), expected[1])  # with the second try
    assert_same(stream.push(CLIPS[0][2]).result(SECONDS), expected[2])
    assert held.batches == [1] * 5


def test_a_frame_that_nobody_waits_for_is_not_tracked(
    model: SAM2Base, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while it waits or while it is computed: the next one takes its place."""
    stream, held = engine.open_stream(), Held(monkeypatch)
    futures = [stream.push(frame, {"a": CLICK}) for frame in CLIPS[0][:2]]
    assert held.entered.wait(SECONDS)
    assert all(future.cancel() for future in futures)
    held.open.set()
    (expected,) = sam.track(model, iter(CLIPS[0][2:3]), {0: {"a": CLICK}})
    assert_same(stream.push(CLIPS[0][2], {"a": CLICK}).result(SECONDS), expected)
    assert held.batches == [1, 1]
    with pytest.raises(CancelledError):
        futures[0].result(SECONDS)


def test_frames_of_several_streams_are_one_batch_and_let_others_pass(
    model: SAM2Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, order = Held(monkeypatch), list[str]()
    with Engine(model, max_images=2) as engine:
        opened = [engine.open_stream() for _ in range(3)]
        first = opened[0].push(CLIPS[0][0])
        assert held.entered.wait(SECONDS)
        frames = [stream.push(CLIPS[0][1]) for _ in range(2) for stream in opened]
        for name, future in (("frame", frames[-1]), ("click", engine.segment(CLIPS[1][0], [CLICK]))):
            future.add_done_callback(lambda _, name=name: order.append(name))
        held.open.set()
        assert first.result(SECONDS).frame == 0
        assert [future.result(SECONDS).frame for future in frames] == [1, 0, 0, 2, 1, 1]
        assert held.batches == [1, 2, 2, 2]
        assert order == ["click", "frame"]
        opened[0].prompt({"a": CLICK}).result(SECONDS)
        pushed = [opened[0].push(CLIPS[0][2]), opened[1].push(CLIPS[0][2], {"b": BOX})]
        assert [future.result(SECONDS).objects for future in pushed] == [("a",), ("b",)]


def test_a_closed_stream_leaves_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is closed while a frame is computed."""
    stream = engine.open_stream()
    stream.push(CLIPS[0][0], {"a": CLICK}).result(SECONDS)
    assert stream.session is not None
    assert stream.nbytes == stream.session.nbytes > 64 * 64 * 4
    held = Held(monkeypatch)
    future = stream.push(CLIPS[0][1])
    assert held.entered.wait(SECONDS)
    session = weakref.ref(stream.session)
    stream.close()
    held.open.set()
    future.result(SECONDS)
    del future
    wait_until(lambda: engine.pending == 0)
    gc.collect()
    assert session() is None
    assert stream.session is None


def test_a_broken_model_fails_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    held.open.set()
    held.faults = [RuntimeError("CUDA error: an illegal memory access was encountered")]
    with pytest.raises(EngineFailedError):
        engine.open_stream().push(CLIPS[0][0]).result(SECONDS)
    assert engine.failure is not None
