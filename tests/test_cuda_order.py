"""What is ordered between streams of a GPU, and what a capture does, with stand-ins for torch's streams and events.

They write down who waits for whom; that a GPU keeps to it is for tests/test_gpu.py.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import TINY, random_image, random_model

import sam.embedding
from sam import ImageEmbedding, MaskPrediction, Prompt
from sam.inference import Graphs, StackedInput
from sam.inference.graphs import CudaRecorder, empty_cache
from sam.sessions.stream import _PendingCopy

Log = list[tuple[str, ...]]


class FakeEvent:
    def __init__(self, log: Log, name: str) -> None:
        self._log, self.name = log, name

    def record(self, stream: FakeStream) -> None:
        self._log.append(("record", self.name, stream.name))

    def synchronize(self) -> None:
        self._log.append(("event waits", self.name))


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, log: Log, name: str) -> None:
        self._log, self.name = log, name

    def record_event(self) -> FakeEvent:
        return FakeEvent(self._log, f"end of {self.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append((self.name, "waits for", event.name))

    def wait_stream(self, stream: FakeStream) -> None:
        self._log.append((self.name, "waits for", stream.name))

    def synchronize(self) -> None:
        self._log.append(("host waits for", self.name))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What was ordered; the current stream is called "main" until a test names another."""
    log: Log = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream(log, "main"))
    return log


# Graphs: the end of a replay -----------------------------------------------------------------------------------


class Replay:
    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


def graphs(log: Log) -> Graphs:
    made = Graphs(torch.device("cpu"), Replay)
    made._done = FakeEvent(log, "done")  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("failing", ["use", "function", "input", None])
def test_the_next_request_waits_for_a_replay_whose_request_failed(log: Log, failing: str | None) -> None:
    made = graphs(log)

    def double(x: torch.Tensor) -> tuple[torch.Tensor]:
        if failing == "function":
            raise RuntimeError("out of memory")
        return (2 * x,)

    rows = StackedInput((torch.ones(3 if failing == "input" else 2, 2),), (2, 2))
    with pytest.raises(RuntimeError) if failing else nullcontext(), made.run("key", double, [rows]):
        if failing == "use":
            raise RuntimeError("out of memory")
    assert log == [("main", "waits for", "done"), ("record", "done", "main")]


def test_a_copy_that_fails_is_not_taken_for_the_image_that_was_there(log: Log) -> None:
    """Two images are copied below each other; of a third and one that does not fit, the third lands in place."""
    made = graphs(log)
    first, second, third = (torch.full((1, 2), float(i)) for i in (1, 2, 3))

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        with made.run("key", lambda x: (2 * x,), [StackedInput(tensors, (2, 2))]) as (outputs, _):
            return outputs[0].clone()

    assert run(first, second).tolist() == [[2, 2], [4, 4]]
    with pytest.raises(RuntimeError):
        run(third, torch.ones(1, 5))
    assert run(first, second).tolist() == [[2, 2], [4, 4]]


# A capture -----------------------------------------------------------------------------------------------------


class FakeGraph:
    def __init__(self, log: Log) -> None:
        self._log = log

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self._log.append(("begin", capture_error_mode))

    def capture_end(self) -> None:
        self._log.append(("end",))


@pytest.fixture
def recorder(log: Log, monkeypatch: pytest.MonkeyPatch) -> CudaRecorder:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "capture"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: log.append(("device waits",)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append(("cache emptied",)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 16 << 30))
    return CudaRecorder(torch.device("cuda"))


def test_captures_stall_nobody(log: Log, recorder: CudaRecorder) -> None:
    for _ in range(3):
        recorder(lambda: log.append(("work",)))
    one = [
        ("capture", "waits for", "main"),
        ("work",),
        ("work",),
        ("begin", "thread_local"),
        ("work",),
        ("end",),
        ("main", "waits for", "capture"),
    ]
    assert log == 3 * one


def test_a_capture_gives_back_cached_memory_where_little_is_left(
    log: Log, recorder: CudaRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 16 << 30))
    recorder(lambda: None)
    assert log.index(("host waits for", "capture")) + 1 == log.index(("cache emptied",))
    assert log.index(("cache emptied",)) < log.index(("begin", "thread_local"))
    assert ("device waits",) not in log


def test_the_cache_is_not_emptied_during_a_capture(log: Log, recorder: CudaRecorder) -> None:
    emptying = threading.Thread(target=empty_cache)

    def work() -> None:
        if ("begin", "thread_local") in log and not emptying.is_alive():
            emptying.start()
            emptying.join(0.1)  # an answer that comes too late is no failure

    recorder(work)
    emptying.join()
    assert log.index(("cache emptied",)) > log.index(("end",))


def test_a_capture_that_fails_is_ended(log: Log, recorder: CudaRecorder) -> None:
    def fails_at_the_third() -> None:
        log.append(("work",))
        if log.count(("work",)) == 3:
            raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(fails_at_the_third)
    assert log[-1] == ("end",)


# Features ------------------------------------------------------------------------------------------------------


def test_whoever_reads_features_on_another_stream_waits_for_them(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle is made on one stream and read on another, by each way that there is to read it."""
    streams = [FakeStream(log, "encoding"), FakeStream(log, "decoding")]
    here = [streams[0]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: here[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, "keeps")))

    def of(cls: Any, tensor: torch.Tensor) -> Any:
        return cls(here[0], here[0].record_event())

    monkeypatch.setattr(sam.embedding._Finish, "of", classmethod(of))
    model = random_model(TINY)
    prompt = Prompt([[3, 4]], [1])
    masks = Prompt([[3, 4]], [1], mask_input=torch.zeros(1, *model.low_res_size))
    waits = [("decoding", "waits for", "end of encoding"), ("decoding", "keeps")]
    readers: list[Callable[[ImageEmbedding], object]] = [
        lambda embedding: model.predict(embedding, [prompt]),
        lambda embedding: model.predict(embedding, [masks]),
        lambda embedding: embedding.to("cpu"),
        lambda embedding: embedding.ready_features(),
        pickle.dumps,
    ]
    for read in readers:
        here[0] = streams[0]
        embedding = model.encode(random_image(48, 60))
        embedding.ready_features()
        assert log == []  # on the same stream nobody waits
        here[0] = streams[1]
        read(embedding)
        assert log[:2] == waits
        log.clear()


class Unpicklable(FakeStream):
    def __reduce__(self) -> str:
        raise TypeError("a stream cannot be pickled")


def test_a_predictor_marks_its_image_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[int, ...]] = []
    of = sam.embedding._Finish.of
    monkeypatch.setattr(
        sam.embedding._Finish,
        "of",
        classmethod(lambda cls, tensor: (marked.append(tuple(tensor.shape)), of(tensor))[1]),
    )
    predictor = sam.SamPredictor(random_model(TINY))
    predictor.set_image(random_image(48, 60))
    assert marked == [(1, 64, 8, 8)]


def test_copies_of_a_handle_leave_events_behind(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    embedding = random_model(TINY).encode(random_image(48, 60))
    stream = Unpicklable(log, "encoding")
    object.__setattr__(embedding, "_finish", sam.embedding._Finish(stream, stream.record_event()))  # type: ignore[arg-type]
    for twin in (pickle.loads(pickle.dumps(embedding)), copy.deepcopy(embedding)):
        assert torch.equal(twin.features, embedding.features)
        assert (twin.geometry, twin.model_hash) == (embedding.geometry, embedding.model_hash)
        assert twin._finish is None


# Results of streams --------------------------------------------------------------------------------------------


def test_results_leave_the_memory_that_copies_go_through(log: Log) -> None:
    staged = MaskPrediction(torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.ones(1, 1), torch.ones(1, 1, 2, 2))
    result = _PendingCopy(staged, FakeEvent(log, "arrived")).result()  # type: ignore[arg-type]
    assert log == [("event waits", "arrived")]
    for name in ("masks", "iou_predictions", "low_res_logits"):
        staging, given = getattr(staged, name), getattr(result, name)
        assert torch.equal(staging, given)
        assert staging.data_ptr() != given.data_ptr()
