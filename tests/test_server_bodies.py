"""Bodies of strangers: they hold no place for nothing, and what takes long to parse is refused early."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from models import TINY, random_model
from python_multipart.multipart import MultipartParser
from serving import multipart
from uploads_by_hand import CLICK, HEAD, NOISE, PNG, begun, started
from waiting import SECONDS, wait_until

from sam.engine import Engine
from sam.server import Settings, answering, bodies, create_app, schemas
from sam.server import service as service_module
from sam.server.errors import KINDS, ApiError
from sam.server.run import _Server, configure
from sam.server.schemas import AutomaticRequest, SegmentRequest, read_document, read_fields


def test_what_follows_a_form_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = MultipartParser.write
    monkeypatch.setattr(MultipartParser, "write", lambda self, data: (sizes.append(len(data)), write(self, data))[1])
    form = bodies._Form(b"b", Settings(), "image")
    body, _ = multipart(PNG, {"prompts": CLICK})
    for piece in (body, *[b"\r\n--b\r" * 10_000] * 9):
        form.feed(piece)
    assert sum(sizes) == len(body)
    image, texts = form.parts()
    assert image is not None
    assert (image.read(), json.loads(texts["prompts"])) == (PNG, CLICK)
    form.close()


# Places only for who has something to compute -----------------------------------------------------------------


def test_bodies_that_do_not_come_hold_no_place() -> None:
    """Nothing sent, a byte, all but the end; the queue has four places."""
    running = started(Settings(body_seconds=SECONDS), max_queue=4)
    sent = [b"", b"-", HEAD, HEAD + PNG[:-10]]
    slow = [begun(running, 60_000, body) for body in sent * 3]
    wait_until(lambda: running.service.bodies.held == 3 * sum(map(len, sent)))
    assert running.service.in_flight == 0
    assert running.post("/v1/embed", PNG)[0] == 200
    for connection in slow:
        connection.close()
    wait_until(lambda: running.service.bodies.held == 0)
    running.close()


def test_large_bodies_take_turns_and_small_ones_do_not_wait() -> None:
    running = started(Settings(max_uploads=1))
    limiter = running.service.bodies.large
    first = begun(running, 10**6, HEAD + NOISE[:100_000])
    wait_until(lambda: limiter.borrowed_tokens == 1)
    assert running.post("/v1/embed", PNG)[0] == 200
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(running.post, "/v1/embed", NOISE)
        wait_until(lambda: limiter.statistics().tasks_waiting == 1)
        assert not second.done()
        first.close()
        assert second.result(SECONDS)[0] == 200
    assert limiter.borrowed_tokens == 0
    running.close()


def test_who_waits_too_long_for_a_turn_is_told_to_come_again() -> None:
    running = started(Settings(max_uploads=1, body_seconds=SECONDS))
    with begun(running, 10**6, HEAD + NOISE[:100_000]):
        wait_until(lambda: running.service.bodies.large.borrowed_tokens == 1)
        running.engine.deadline = 0.2
        assert running.error("/v1/embed", NOISE) == (503, "queue_full")
    running.close()


def test_a_body_that_lags_behind_is_given_up_long_before_the_deadline() -> None:
    running = started(Settings(body_seconds=0.2), deadline=SECONDS)
    for body in (b"", HEAD, HEAD + NOISE[:3000]):
        with begun(running, 10_000, body) as slow:
            assert b" 408 " in slow.recv(100)
    wait_until(lambda: running.service.bodies.held == 0)
    running.close()


def test_bytes_of_all_bodies_are_bounded() -> None:
    running = started(Settings(max_held_bytes=200_000))
    status, answer, headers = running.post("/v1/embed", NOISE)
    assert (status, answer["error"]["code"], headers["retry-after"]) == (507, "storage_full", "1")
    with begun(running, 10**6, HEAD + NOISE[:150_000]):
        wait_until(lambda: running.service.bodies.held > 150_000)
        assert running.error("/v1/embed", NOISE[:60_000]) == (507, "storage_full")
    wait_until(lambda: running.service.bodies.held == 0)
    assert running.post("/v1/embed", PNG)[0] == 200
    running.close()


# JSON that takes long -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts",
    [
        "[" + "[]," * 69_000 + "[]]",
        "[" + "{}," * 2_150 + "{}]",
        "[" + "1," * 204_000 + "1]",
        '[{"points":[' + "[1,1]," * 69_000 + "[1,1]]}]",
        '[{"points":[[1,1]],"labels":[' + "1," * 204_000 + "1]}]",
        '[{"box":[' + "1," * 204_000 + "1]}]",
        '{"' + '":1,"'.join(map(str, range(17_000))) + '":1}',
        '[{"points":[[1,1]],"' + '":1,"'.join(map(str, range(9_000))) + '":1}]',
        "[" * 140_000,
    ],
)
def test_json_that_takes_long_meets_no_parser(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    """A parser holds the interpreter, and with it the event loop, until it is done."""
    monkeypatch.setattr(schemas, "_PROMPTS", dict.fromkeys(schemas._PROMPTS))
    monkeypatch.setattr(SegmentRequest, "model_validate_json", lambda text: pytest.fail("parsed"))
    for read in (
        lambda: read_document(SegmentRequest, b'{"prompts":' + prompts.encode() + b"}"),
        lambda: read_fields(SegmentRequest, {"prompts": prompts}),
    ):
        with pytest.raises(ApiError, match="invalid_request"):
            read()


@pytest.mark.parametrize("form", [False, True], ids=["document", "form"])
def test_one_large_text_is_validated_at_a_time_and_nobody_else_waits(
    monkeypatch: pytest.MonkeyPatch, form: bool
) -> None:
    """Two would take as long, and the event loop, which waits for the interpreter, would wait for both."""
    running = started(Settings())
    begun, go, threads = threading.Semaphore(0), threading.Semaphore(0), set()
    read_text = answering.read_text

    def read_slowly(schema: Any, upload: Any) -> Any:
        if upload.text_size > answering.SMALL_TEXT:
            begun.release()
            threads.add(threading.current_thread())
            assert go.acquire(timeout=SECONDS)
        return read_text(schema, upload)

    monkeypatch.setattr(answering, "read_text", read_slowly)
    prompts, limiter = [{"points": [[1, 1]] * 64}] * 200, running.service._interpreting.limiter
    with ThreadPoolExecutor(2) as pool:
        large = [
            pool.submit(running.error, "/v1/segment", PNG if form else None, prompts=prompts, output="none")
            for _ in range(2)
        ]
        assert begun.acquire(timeout=SECONDS)
        wait_until(lambda: limiter.statistics().tasks_waiting == 1)
        assert running.request("GET", "/v2/health/live")[0] == 200
        assert running.post("/v1/segment", PNG, prompts=CLICK)[0] == 200
        assert not begun.acquire(blocking=False)
        go.release(2)
        assert [future.result(SECONDS) for future in large] == [(422, "invalid_request")] * 2
    assert running.thread not in threads
    running.close()


@pytest.mark.parametrize("fails", [False, True])
def test_the_interpreter_rests_after_a_text_for_as_long_as_the_text_took(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings, begun, rests = iter([10.0, 17.0, 20.0, 21.0]), [], []
    monkeypatch.setattr(service_module.time, "thread_time", lambda: next(readings))

    def work(name: str) -> str:
        begun.append(name)
        if fails:
            raise ValueError(name)
        return name

    async def two_texts() -> None:
        loop, paced = asyncio.get_running_loop(), service_module.PacedThread()
        monkeypatch.setattr(loop, "call_later", lambda seconds, call, *args: rests.append((seconds, call, args)))
        first, second = await asyncio.gather(run(paced, "first"), begins(paced, "second"))
        assert first == ("ValueError" if fails else "first")
        assert (begun, [seconds for seconds, _, _ in rests]) == (["first"], [7.0])
        _, release, args = rests[0]
        release(*args)
        assert await second == ("ValueError" if fails else "second")
        assert (begun, [seconds for seconds, _, _ in rests]) == (["first", "second"], [7.0, 1.0])

    async def run(paced: service_module.PacedThread, name: str) -> str:
        try:
            return await paced.run(lambda: work(name))
        except ValueError as error:
            return type(error).__name__

    async def begins(paced: service_module.PacedThread, name: str) -> asyncio.Task[str]:
        task = asyncio.ensure_future(run(paced, name))
        while not paced.limiter.statistics().tasks_waiting:
            await asyncio.sleep(0)
        return task

    asyncio.run(two_texts())


def test_many_prompts_are_compared_with_the_image_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    running = started(Settings())
    threads = set()
    find_outside = schemas.wire.find_outside

    def look(*arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return find_outside(*arguments)

    monkeypatch.setattr(schemas.wire, "find_outside", look)
    status, answer, _ = running.post("/v1/segment", PNG, prompts=[{"points": [[1, 1]]}] * 99 + [{"points": [[1, 1e6]]}])
    assert (status, answer["error"]["where"]) == (422, ["prompts", 99, "points", 0])
    assert threads
    assert running.thread not in threads
    running.close()


def test_the_collector_passes_over_what_was_there_before_the_first_request() -> None:
    """With torch it is a million objects, and whoever begins a full collection holds everybody for 0.2 s."""
    engine = Engine(random_model(TINY))
    application = create_app(engine)
    service = application.state.service
    _Server(configure(application, service.settings), service)
    assert gc.get_freeze_count() == 0
    try:
        service._warm_up()
        assert service.warm
        assert gc.get_freeze_count() > len(gc.get_objects())
    finally:
        gc.unfreeze()
        engine.close()


def test_the_largest_document_is_read() -> None:
    point = [12345.123456789012] * 2
    reference = {"result": "0" * 32, "prompt": 1023, "mask": 15}
    prompt = {"points": [point] * 64, "labels": [1] * 64, "box": [1.5] * 4, "mask_input": reference}
    largest = {"embedding": "0" * 32, "prompts": [prompt] * 1024, "multimask": True, "output": "rle"}
    read = read_document(SegmentRequest, json.dumps(largest).encode())
    assert (len(read.prompts), read.prompts[-1].points[-1]) == (1024, tuple(point))
    fields = {"prompts": json.dumps(largest["prompts"]), "output": '"png"', "embedding": "1" * 32, "multimask": "false"}
    request = read_fields(SegmentRequest, fields)
    assert (len(request.prompts), request.output, request.embedding, request.multimask) == (
        1024,
        "png",
        "1" * 32,
        False,
    )


def test_other_fields_are_short() -> None:
    with pytest.raises(ApiError) as refused:
        read_fields(AutomaticRequest, {"points_per_side": "1" * 1025})
    assert (refused.value.code, refused.value.where) == ("invalid_request", ["points_per_side"])
    for nonsense in ("NaN", "9" * 1000, "[" * 1000, "1e999"):
        with pytest.raises(ApiError, match="invalid_request"):
            read_fields(AutomaticRequest, {"pred_iou_thresh": nonsense})


@pytest.mark.parametrize("extra", [-128, 128])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit_to_the_byte(extra: int, chunked: bool) -> None:
    """64 MiB less 128 bytes is read to the end, 128 more is refused: by the length told, or while it streams."""
    running = started(Settings())
    limit = running.service.settings.max_body_bytes
    head, tail = multipart(b"\0", {})[0].split(b"\0")
    body = head + bytes(limit + extra - len(head) - len(tail)) + tail
    pieces = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    try:
        status, _, text = running.request("POST", "/v1/embed", pieces if chunked else body, headers)
    except (BrokenPipeError, ConnectionResetError):
        status, text = 413, b'{"error": {"code": "payload_too_large"}}'  # it hung up on what was still coming
        assert extra > 0
    expected = "unsupported_image" if extra < 0 else "payload_too_large"
    assert json.loads(text)["error"]["code"] == expected
    assert status == KINDS[expected].status
    assert running.request("GET", "/v2/health/ready")[0] == 200
    running.close()
