"""The service over real sockets when it is busy, left or broken."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from gate import Gate
from models import TINY, random_image, random_model

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
import anyio.from_thread
from local_service import Local
from serving import file_of, multipart
from waiting import SECONDS, wait_until

from sam.engine import Engine
from sam.masks import formats, rle, rle_encode
from sam.masks.formats import MaskSet
from sam.server import Settings, app
from sam.server.connections import Connection
from sam.server.service import warm_up

PNG = file_of(random_image(60, 90))
CLICK = [{"points": [[5, 5]]}]


@pytest.fixture
def gated() -> Iterator[tuple[Local, Gate]]:
    """A service whose model waits for the gate, of its own for each test."""
    model = random_model(TINY)
    gate = Gate(model)
    gate.open.set()
    running = Local(Engine(model, max_queue=4, deadline=SECONDS), Settings())
    gate.open.clear()
    for passes in (gate.encoded, gate.decoded):
        passes.clear()
    gate.entered.clear()
    yield running, gate
    gate.open.set()
    running.close()


def test_exactly_as_many_are_rejected_as_do_not_fit(gated: tuple[Local, Gate]) -> None:
    running, gate = gated
    with ThreadPoolExecutor(8) as pool:
        inside = [pool.submit(running.post, "/v1/segment", PNG, prompts=CLICK) for _ in range(4)]
        wait_until(lambda: running.service.in_flight == 4)
        for _ in range(2):  # answered while the model is held: they wait for nothing
            status, answer, headers = running.post("/v1/segment", PNG, prompts=CLICK)
            assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "queue_full", "1")
        gate.open.set()
        assert [future.result(SECONDS)[0] for future in inside] == [200] * 4
    assert running.service.metrics.errors.labels("queue_full")._value.get() == 2
    wait_until(lambda: running.service.in_flight == 0)


def test_who_left_is_dropped_before_dispatch(gated: tuple[Local, Gate]) -> None:
    running, gate = gated
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(running.post, "/v1/embed", PNG)
        assert gate.entered.wait(SECONDS)
        body, kind = multipart(file_of(random_image(40, 40)), {"prompts": CLICK})
        head = (
            f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        )
        with socket.create_connection(("127.0.0.1", running.port)) as leaving:
            leaving.sendall(head.encode() + b"\r\n" + body)
            wait_until(lambda: running.engine.pending == 2)
        wait_until(lambda: running.engine.pending == 1)
        gate.open.set()
        assert busy.result(SECONDS)[0] == 200
    assert running.post("/v1/embed", file_of(random_image(41, 41)))[0] == 200
    assert gate.encoded == [1, 1]
    assert gate.decoded == []
    assert running.engine.counters()["cancelled"] == 1


def test_who_left_while_the_image_was_decoded_is_not_dispatched(
    gated: tuple[Local, Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, gate = gated
    gate.open.set()
    decode, lost, gone = app.decode_image, Connection.connection_lost, threading.Event()
    before = running.engine.counters()["accepted"]

    def slow_decode(*arguments: Any) -> np.ndarray:
        assert gone.wait(SECONDS)
        return decode(*arguments)

    def connection_lost(protocol: Connection, error: Exception | None) -> None:
        lost(protocol, error)
        gone.set()

    monkeypatch.setattr(app, "decode_image", slow_decode)
    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    body, kind = multipart(PNG, {})
    head = f"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as leaving:
        leaving.sendall(head.encode() + body)
        wait_until(lambda: running.service.in_flight == 1)
    wait_until(lambda: running.service.in_flight == 0)
    assert gate.encoded == []
    assert running.engine.counters()["accepted"] == before


def test_deadline() -> None:
    model = random_model(TINY)
    gate = Gate(model)
    gate.open.set()
    running = Local(Engine(model, deadline=0.3), Settings())
    gate.open.clear()
    gate.entered.clear()
    gate.encoded.clear()
    assert running.error("/v1/embed", PNG) == (504, "deadline_exceeded")
    assert running.error("/v1/embed", file_of(random_image(9, 9))) == (504, "deadline_exceeded")
    entered = list(gate.encoded)
    assert len(entered) <= 1  # none if the first one, too, expired on its way
    gate.open.set()
    wait_until(lambda: running.engine.pending == 0)
    assert gate.encoded == entered
    running.close()


# Answers of many masks --------------------------------------------------------------------------------------------


class Encoding:
    """Decoding of masks for answers that takes until nobody waits for it any more, or as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.at_once, self.most_at_once = 0, 0, 0
        self.go, self._lock, self._decode = threading.Event(), threading.Lock(), rle.decode
        monkeypatch.setattr(rle, "decode", self)

    def __call__(self, encoded: dict[str, Any]) -> np.ndarray:
        with self._lock:
            self.begun += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        while not self.go.wait(0.005):
            try:
                anyio.from_thread.check_cancelled()
            except BaseException:  # so this mask is whole; it is for the work on the next one to end
                break
        with self._lock:
            self.at_once -= 1
        return self._decode(encoded)


def drain(running: Local) -> None:
    assert running.service._loop is not None
    asyncio.run_coroutine_threadsafe(running.service.drain(), running.service._loop).result(SECONDS)


@pytest.mark.parametrize("output", ["npz", "png", "polygons"])
def test_an_encoding_ends_with_the_time_to_drain(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """And so do those that wait for their turn, each with the code that says so."""
    running = Local(Engine(random_model(TINY), deadline=SECONDS), Settings(drain_seconds=0))
    encoding = Encoding(monkeypatch)
    prompts = CLICK * 4
    with ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(running.error, "/v1/segment", PNG, prompts=prompts, output=output) for _ in range(4)]
        wait_until(lambda: running.service.in_flight == 4 and encoding.begun == 2)
        drain(running)
        assert [future.result(SECONDS) for future in requests] == [(503, "draining")] * 4
    assert encoding.begun == 2
    assert running.service.in_flight == 0
    running.close()


def test_an_encoding_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Local(Engine(random_model(TINY), deadline=1.0), Settings())
    encoding = Encoding(monkeypatch)
    assert running.error("/v1/segment", PNG, prompts=CLICK, output="npz") == (504, "deadline_exceeded")
    assert encoding.begun <= 1  # none if it expired on its way
    running.close()


def test_an_encoding_ends_with_its_client(gated: tuple[Local, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    running, gate = gated
    gate.open.set()
    encoding = Encoding(monkeypatch)
    body, kind = multipart(PNG, {"prompts": CLICK, "output": "npz"})
    head = f"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as leaving:
        leaving.sendall(head.encode() + b"\r\n" + body)
        wait_until(lambda: encoding.begun == 1)
    wait_until(lambda: running.service.in_flight == 0)
    assert encoding.begun == 1


def test_few_encodings_run_at_once(gated: tuple[Local, Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    running, gate = gated
    gate.open.set()
    encoding = Encoding(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(running.post, "/v1/segment", PNG, prompts=CLICK, output="npz") for _ in range(4)]
        wait_until(lambda: encoding.begun == 2 and running.service._encoding.statistics().tasks_waiting == 2)
        encoding.go.set()
        assert [future.result(SECONDS)[0] for future in requests] == [200] * 4
    assert encoding.most_at_once == 2


def test_a_body_that_is_on_its_way_at_the_end_of_the_drain(gated: tuple[Local, Gate]) -> None:
    running, _ = gated
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as slow:
        slow.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\n--b\r\n")
        wait_until(lambda: running.service.bodies.held == 5)
        drain(running)
        answer = b""
        while b'"draining"' not in answer:
            answer += (piece := slow.recv(2**16))
            assert piece, answer
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert running.service.bodies.held == 0


def test_a_large_npz_is_written_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_STRIP_BYTES", 60)
    masks = np.random.default_rng(0).random((3, 17, 29)) < 0.5
    checks: list[None] = []
    encoded = rle_encode.encode(torch.from_numpy(masks))
    data = formats.npz(MaskSet(encoded, (17, 29), {"scores": np.arange(3.0)}, lambda: checks.append(None)))
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    np.testing.assert_array_equal(loaded["masks"], masks)
    np.testing.assert_array_equal(loaded["scores"], np.arange(3.0))
    assert len(checks) == 3 * (1 + 9)


def test_many_runs_are_compressed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(7, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    masks[3] = False
    encoded = rle_encode.encode(masks)
    whole = formats.compressed_rles(MaskSet(encoded, (20, 20)))
    monkeypatch.setattr(formats, "_MAX_RUNS", 300)
    checks: list[None] = []
    assert formats.compressed_rles(MaskSet(encoded, (20, 20), check=lambda: checks.append(None))) == whole
    assert len(whole) == 7
    assert 2 <= len(checks) < 7


def test_a_body_that_does_not_come() -> None:
    running = Local(Engine(random_model(TINY), deadline=0.3), Settings())
    with socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\n--b\r\n")
        slow.settimeout(SECONDS)
        assert b"408" in slow.recv(100)
    wait_until(lambda: running.service.in_flight == 0)
    running.close()


def test_not_ready_while_warming_or_draining(gated: tuple[Local, Gate]) -> None:
    running, _ = gated
    for attribute, value, code in (("warm", False, "not_ready"), ("draining", True, "draining")):
        before = getattr(running.service, attribute)
        setattr(running.service, attribute, value)
        assert running.request("GET", "/v2/health/ready")[0] == 503
        assert running.request("GET", "/v2/health/live")[0] == 200
        assert running.error("/v1/embed", PNG) == (503, code)
        setattr(running.service, attribute, before)


def test_warm_up_runs_every_size_of_a_batch() -> None:
    """Where kernels are compiled, no request meets a size of batch that was not run before."""
    gate = Gate(random_model(TINY))
    gate.open.set()
    with Engine(gate.model, max_batch=3, max_images=2) as engine:
        warm_up(engine, every_size=True)
        assert set(gate.encoded) == {1, 2}
        assert set(gate.decoded) == {1, 2, 3}
        assert engine.counters()["automatics"] > 0


def test_one_bad_request_never_fails_its_batch_mates(gated: tuple[Local, Gate]) -> None:
    """They wait at the same time for the same model; the good ones are answered as they are alone."""
    running, gate = gated
    gate.open.set()
    requests = {"prompts": CLICK * 2}
    alone = running.post("/v1/segment", PNG, **requests)[1]["prompts"]
    gate.open.clear()
    gate.entered.clear()
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(running.post, "/v1/embed", file_of(random_image(30, 30)))
        assert gate.entered.wait(SECONDS)
        good = [pool.submit(running.post, "/v1/segment", PNG, **requests) for _ in range(2)]
        wait_until(lambda: running.engine.pending == 3)
        for image, fields, code in (
            (PNG[:200], requests, "bad_image"),
            (PNG, {"prompts": [*CLICK, {"points": [[91, 1]]}]}, "out_of_image"),
            (PNG, {"prompts": [{"points": [[5, 5]], "mask_input": {"result": "0" * 32}}]}, "unknown_result"),
        ):
            assert running.error("/v1/segment", image, **fields)[1] == code
        gate.open.set()
        assert busy.result(SECONDS)[0] == 200
        for future in good:
            status, answer, _ = future.result(SECONDS)
            assert status == 200
            assert [prompt["best"] for prompt in answer["prompts"]] == [prompt["best"] for prompt in alone]
            for prompt, before in zip(answer["prompts"], alone, strict=True):
                scores = [[mask["predicted_iou"] for mask in masks["masks"]] for masks in (prompt, before)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_out_of_memory_is_503_and_the_service_lives(gated: tuple[Local, Gate]) -> None:
    running, gate = gated
    gate.open.set()
    gate.shortage_above = 0
    assert running.error("/v1/embed", PNG) == (503, "out_of_memory")
    gate.shortage_above = None
    assert running.post("/v1/embed", PNG)[0] == 200


def test_a_model_fault_makes_it_unready(gated: tuple[Local, Gate]) -> None:
    running, gate = gated
    stopped = threading.Event()
    running.service.stop = stopped.set
    gate.faults.append(RuntimeError("CUDA error: secret text"))
    gate.open.set()
    status, answer, _ = running.post("/v1/embed", PNG)
    assert (status, answer["error"]["code"]) == (503, "model_failed")
    assert "secret" not in json.dumps(answer)
    assert running.request("GET", "/v2/health/ready")[0] == 503
    assert stopped.wait(SECONDS)
    assert running.error("/v1/embed", PNG) == (503, "model_failed")
