"""Bodies of strangers: they hold no place for nothing, and what takes long to parse is refused early."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from python_multipart.multipart import MultipartParser
from serving import multipart
from uploads_by_hand import CLICK, HEAD, NOISE, PNG, begun, started
from waiting import SECONDS, wait_until

from sam.server import Settings, bodies, schemas
from sam.server.errors import ApiError
from sam.server.schemas import AutomaticRequest, SegmentRequest, read_document, read_fields


def test_what_follows_a_form_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = MultipartParser.write
    monkeypatch.setattr(MultipartParser, "write", lambda self, data: (sizes.append(len(data)), write(self, data))[1])
    form = bodies._Form(b"b", Settings())
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
        "[" + "[]," * 140_000 + "[]]",
        "[" + "{}," * 9_000 + "{}]",
        "[" + "1," * 270_000 + "1]",
        '{"' + '":1,"'.join(map(str, range(17_000))) + '":1}',
        '[{"points":[[1,1]],"' + '":1,"'.join(map(str, range(9_000))) + '":1}]',
        "[" * 140_000,
    ],
)
def test_json_that_takes_long_meets_no_parser(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    """A parser holds the interpreter, and with it the event loop, until it is done."""
    monkeypatch.setattr(schemas, "_PROMPTS", None)
    monkeypatch.setattr(SegmentRequest, "model_validate_json", lambda text: pytest.fail("parsed"))
    for read in (
        lambda: read_document(SegmentRequest, b'{"prompts":' + prompts.encode() + b"}"),
        lambda: read_fields(SegmentRequest, {"prompts": prompts}),
    ):
        with pytest.raises(ApiError, match="invalid_request"):
            read()


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
