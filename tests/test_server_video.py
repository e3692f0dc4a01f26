"""Sessions of video over HTTP: frames, prompts, masks, limits, and what becomes of those that nobody uses."""

from __future__ import annotations

import io
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL_2, TINY, draw_weights_that_see, random_image, random_model
from PIL import Image
from polygons import fill

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import file_of
from waiting import SECONDS, wait_until

import sam
from sam import Prompt
from sam.client import Client, ServiceError
from sam.engine import Engine, streams
from sam.masks import rle
from sam.masks.rle_encode import encode
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base
from sam.server import Settings
from sam.server.service import warm_up
from sam.server.sessions import VideoSession
from sam.video.session import step_together

SESSIONS = "/v1/video/sessions"
CLIP = [random_image(45, 70, seed) for seed in range(4)]
PNGS = [file_of(image) for image in CLIP]
CLICK, BOX = {"points": [[15, 20]]}, {"box": [30, 20, 55, 40]}
FAR, MANY = {"points": [[71, 1]]}, {"points": [[1, 1]] * 64}
PROMPTS = {"cat": Prompt([(15, 20)], [1]), "dog": Prompt(box=[30, 20, 55, 40])}
SETTINGS = Settings(max_sessions=3, max_session_objects=3, max_session_prompts=6, max_pixels=100_000)


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2))


@pytest.fixture(scope="module")
def running(model: SAM2Base) -> Iterator[Local]:
    local = Local(Engine(model), SETTINGS)
    yield local
    local.close()


@pytest.fixture
def local(running: Local) -> Iterator[Local]:
    yield running
    for key in list(running.service.sessions._open):
        assert running.request("DELETE", f"{SESSIONS}/{key}")[0] in (200, 404)


def opened(local: Local, **options: Any) -> str:
    status, answer, _ = local.post(SESSIONS, **options)
    assert status == 200, answer
    return f"{SESSIONS}/{answer['session']}"


def state_of(local: Local, session: str) -> Any:
    status, _, content = local.request("GET", session)
    return json.loads(content) if status == 200 else status


def held_by(local: Local, session: str) -> VideoSession:
    return local.service.sessions._open[session.rpartition("/")[2]]


def assert_same(answer: dict[str, Any], result: sam.FrameResult) -> None:
    assert (answer["frame"], answer["image"]) == (result.frame, {"height": 45, "width": 70})
    assert [record["id"] for record in answer["objects"]] == list(result.objects)
    for index, record in enumerate(answer["objects"]):
        mask = result.masks[index].numpy()
        np.testing.assert_array_equal(rle.decode(record["segmentation"]), mask)
        assert record["area"] == mask.sum() > 0
        assert record["object_score"] == pytest.approx(result.object_scores[index].item())
        assert record["predicted_iou"] == pytest.approx(result.predicted_iou[index].item())


def test_a_session_tracks_as_python_does(local: Local, model: SAM2Base) -> None:
    """With a click that comes with its frame, a mask for a frame to come, a correction, and an object less."""
    mask = np.zeros((45, 70), bool)
    mask[10:30, 20:50] = True
    tracking = sam.track(model, iter(CLIP), {0: {"cat": PROMPTS["cat"]}, 2: {"m": mask}})
    session = opened(local)
    assert state_of(local, session)["frame"] is None
    (coded,) = encode(torch.from_numpy(mask)[None])
    status, answer, _ = local.post(f"{session}/prompts", frame=2, prompts=[{"object": "m", "mask": coded}])
    assert (status, answer["next_frame"], answer["objects"]) == (200, 0, [])
    _, answer, headers = local.post(f"{session}/frames", PNGS[0], frame=0, prompts=[{"object": "cat", **CLICK}])
    assert_same(answer, next(tracking))
    assert (headers["x-frame"], headers["x-objects"]) == ("0", "cat")
    assert_same(local.post(f"{session}/frames", PNGS[1])[1], next(tracking))
    correction = tracking.session.add("cat", Prompt([(50, 30)], [0]))
    assert correction is not None
    prompts = [{"object": "cat", "points": [[50, 30]], "labels": [0]}]
    assert_same(local.post(f"{session}/prompts", frame=1, prompts=prompts)[1], correction)
    assert_same(local.post(f"{session}/masks", frame=1)[1], correction)
    assert_same(local.post(f"{session}/frames", PNGS[2])[1], next(tracking))
    tracking.session.remove("cat")
    assert_same(local.post(f"{session}/remove", object="cat")[1], tracking.session.result())
    assert_same(local.post(f"{session}/frames", PNGS[3])[1], next(tracking))
    state = state_of(local, session)
    assert (state["frame"], state["next_frame"], state["objects"]) == (3, 4, ["m"])
    assert state["masks"] == {"first": 0, "last": 3}
    assert local.request("DELETE", session)[0] == 200
    assert state_of(local, session) == 404


def test_masks_are_read_in_every_format(local: Local) -> None:
    session = opened(local)
    objects = [{"object": "cat", **CLICK}, {"object": "dog", **BOX}]
    _, answer, _ = local.post(f"{session}/frames", PNGS[0], prompts=objects)
    masks = [rle.decode(record["segmentation"]) for record in answer["objects"]]
    _, polygons, _ = local.post(f"{session}/masks", frame=0, output="polygons")
    for record, mask in zip(polygons["objects"], masks, strict=True):
        np.testing.assert_array_equal(fill(record["segmentation"]["coordinates"], mask.shape), mask)
    _, picture, headers = local.post(f"{session}/masks", frame=0, output="png")
    assert (headers["content-type"], headers["x-objects"]) == ("image/png", "cat,dog")
    labels = np.where(masks[1], 2, masks[0])
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(picture))), labels)
    _, archive, _ = local.post(f"{session}/masks", frame=0, output="npz")
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["masks"], masks)
        assert arrays["objects"].tolist() == ["cat", "dog"]
        np.testing.assert_allclose(arrays["object_scores"], [each["object_score"] for each in answer["objects"]])
    _, picture, _ = local.post(f"{opened(local)}/frames", PNGS[0], output="png")
    assert not np.array(Image.open(io.BytesIO(picture))).any()


def test_the_client(local: Local, model: SAM2Base) -> None:
    mask = np.zeros((45, 70), bool)
    mask[10:30, 20:50] = True
    tracking = sam.track(model, iter(CLIP), {0: {"cat": PROMPTS["cat"], "dog": PROMPTS["dog"]}, 1: {"m": mask}})
    with Client(f"http://127.0.0.1:{local.port}") as client:
        with client.open_video() as video:
            assert video.prompt({"m": mask}, frame=1) is None
            for result in itertools.islice(tracking, 2):
                prompts = {"cat": PROMPTS["cat"], "dog": BOX} if result.frame == 0 else None
                frame = video.push(PNGS[result.frame], prompts)
                assert (frame.frame, frame.objects) == (result.frame, result.objects)
                np.testing.assert_array_equal(frame.masks, result.masks)
                np.testing.assert_allclose(frame.object_scores, result.object_scores)
                np.testing.assert_array_equal(video.masks(result.frame).masks, frame.masks)
            assert Image.open(io.BytesIO(video.masks_as("png", 1))).size == (70, 45)
            left = video.remove("dog")
            assert left is not None
            assert left.objects == ("cat", "m")
            tracking.session.remove("dog")
            np.testing.assert_array_equal(video.push(PNGS[2]).masks, next(tracking).masks)
            assert (video.state().next_frame, video.next_frame, video.state().tracking) == (3, 3, False)
            video.next_frame = 2  # as if an answer had been lost
            with pytest.raises(ServiceError, match="wrong_frame"):
                video.push(PNGS[2])
            assert video.state().next_frame == 3
        assert len(local.service.sessions) == 0
        video.close()
        with pytest.raises(ServiceError, match="unknown_session"):
            video.push(PNGS[3])


@pytest.mark.parametrize(
    ("route", "fields", "status", "code", "where"),
    [
        ("frames", {"frame": 7}, 409, "wrong_frame", ["frame"]),
        ("frames", {"prompts": [{"object": "a", **FAR}]}, 422, "out_of_image", ["prompts", 0, "points", 0]),
        ("frames", {"prompts": [{"object": "a b", **CLICK}]}, 422, "invalid_request", ["prompts", 0, "object"]),
        ("frames", {"prompts": [{"object": "a", **CLICK}] * 2}, 422, "invalid_request", ["prompts"]),
        ("frames", {"prompts": [{"object": str(i), **CLICK} for i in range(4)]}, 422, "session_full", None),
        ("prompts", {"prompts": []}, 422, "invalid_request", ["prompts"]),
        ("prompts", {"prompts": [{"object": "a"}]}, 422, "invalid_request", ["prompts", 0]),
        ("prompts", {"frame": 0, "prompts": [{"object": "a", **CLICK}]}, 409, "wrong_frame", ["frame"]),
        ("prompts", {"prompts": [{"object": "a", "box": [71, 0, 80, 9]}]}, 422, "out_of_image", ["prompts", 0, "box"]),
        ("prompts", {"prompts": [{"object": "a", **MANY}]}, 422, "session_full", ["prompts", 0, "points"]),
        ("masks", {"frame": 9}, 404, "unknown_frame", ["frame"]),
        ("masks", {}, 422, "invalid_request", ["frame"]),
        ("remove", {"object": "z"}, 404, "unknown_object", ["object"]),
    ],
)
def test_what_a_session_refuses(
    local: Local, route: str, fields: dict[str, Any], status: int, code: str, where: list[Any] | None
) -> None:
    """And it is as it was."""
    session = opened(local)
    for image in PNGS[:2]:
        local.post(f"{session}/frames", image)
    local.post(f"{session}/prompts", prompts=[{"object": "a", **CLICK}])
    before = {**state_of(local, session), "request_id": "", "seconds_left": 0}
    answered, answer, _ = local.post(f"{session}/{route}", PNGS[2] if route == "frames" else None, **fields)
    assert (answered, answer["error"]["code"]) == (status, code)
    assert answer["error"].get("where") == where
    assert {**state_of(local, session), "request_id": "", "seconds_left": 0} == before


def test_masks_as_prompts_are_checked(local: Local) -> None:
    session = opened(local)
    local.post(f"{session}/frames", PNGS[0])
    for mask, where in (
        ({"size": [45, 71], "counts": [45 * 71]}, "size"),
        ({"size": [45, 70], "counts": [9]}, "counts"),
        ({"size": [45, 70], "counts": "~~"}, "counts"),
    ):
        status, answer, _ = local.post(f"{session}/prompts", prompts=[{"object": "a", "mask": mask}])
        assert (status, answer["error"]["where"]) == (422, ["prompts", 0, "mask", where])
    both = {"object": "a", "mask": {"size": [45, 70], "counts": [45 * 70]}, **CLICK}
    assert local.error(f"{session}/prompts", prompts=[both]) == (422, "invalid_request")
    large = {"object": "a", "mask": {"size": [1000, 1000], "counts": [10**6]}}
    assert local.error(f"{session}/prompts", frame=5, prompts=[large]) == (422, "invalid_request")


def test_no_more_sessions_or_prompts_than_there_may_be(local: Local) -> None:
    first = opened(local)
    for _ in range(2):
        opened(local)
    assert local.error(SESSIONS) == (503, "too_many_sessions")
    assert local.request("DELETE", first)[0] == 200
    session = opened(local)
    for frame in range(6):
        assert local.post(f"{session}/prompts", frame=frame, prompts=[{"object": "a", **CLICK}])[0] == 200
    assert local.error(f"{session}/prompts", frame=6, prompts=[{"object": "a", **CLICK}]) == (422, "session_full")
    held = held_by(local, session)
    assert local.post(f"{session}/frames", PNGS[0])[0] == 200
    held._max_mask_bytes = 3 * held.nbytes
    for image in PNGS:
        local.post(f"{session}/frames", image)
    assert state_of(local, session)["masks"] == {"first": 2, "last": 4}
    assert 0 < held.nbytes <= held._max_mask_bytes
    assert local.error(f"{session}/masks", frame=1) == (404, "unknown_frame")
    metrics = local.request("GET", "/metrics")[2].decode()
    assert "sam_video_sessions 3.0" in metrics
    assert float(metrics.partition("\nsam_video_session_bytes ")[2].split()[0]) > held.stream.nbytes


def test_sessions_that_nobody_uses_are_closed(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the service, which stands still until it is told; a session in use is none of them."""
    sessions, now = local.service.sessions, [0.0]
    monkeypatch.setattr(sessions, "clock", lambda: now[0])
    used, unused = opened(local), opened(local)
    for session in (used, unused):
        local.post(f"{session}/frames", PNGS[0], prompts=[{"object": "a", **CLICK}])
    held = held_by(local, unused)
    assert held.stream.nbytes > 0
    now[0] = 100.0
    assert state_of(local, used)["seconds_left"] == 120.0
    now[0] = 120.0
    ended = local.service.metrics.sessions_ended.labels("expired")._value
    before, swept = ended.get(), threading.Event()
    loop = local.service._loop
    assert loop is not None
    loop.call_soon_threadsafe(lambda: (sessions._sweep(), swept.set()))
    assert swept.wait(SECONDS)
    assert ended.get() == before + 1
    assert (held.stream.session, held.stream.nbytes, held.nbytes, len(held.masks)) == (None, 0, 0, 0)
    assert state_of(local, unused) == 404
    assert local.error(f"{unused}/frames", PNGS[1]) == (404, "unknown_session")
    with sessions.using(used.rpartition("/")[2]):
        now[0] = 1000.0
        sessions.expire()
        assert len(sessions) == 1
    assert state_of(local, used)["frame"] == 0


def test_frames_of_one_session_wait_for_each_other_and_others_do_not(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a frame is tracked, health answers; a session that is closed then is gone, and its frame refused."""
    entered, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(SECONDS)
        return step_together(*arguments)

    session, answers = opened(local), list[int]()
    monkeypatch.setattr(streams, "step_together", held)
    pushes = [
        threading.Thread(target=lambda: answers.append(local.post(f"{session}/frames", PNGS[0])[0])) for _ in range(2)
    ]
    for push in pushes:
        push.start()
    assert entered.wait(SECONDS)
    wait_until(lambda: held_by(local, session).users == 2)
    assert local.request("GET", "/v2/health/live")[0] == 200
    assert state_of(local, session)["frame"] is None
    assert local.request("DELETE", session)[0] == 200
    go_on.set()
    for push in pushes:
        push.join(SECONDS)
    assert sorted(answers) == [200, 404]
    assert local.engine.failure is None


def test_models_of_images_say_that_they_cannot_track() -> None:
    local = Local(Engine(random_model(TINY)), Settings())
    try:
        assert local.error(SESSIONS) == (422, "cannot_track")
        assert local.error(f"{SESSIONS}/{'0' * 32}/masks", frame=0) == (404, "unknown_session")
        assert local.request("GET", f"{SESSIONS}/x")[0] == 404
    finally:
        local.close()


def test_the_warm_up_tracks_where_kernels_are_compiled(model: SAM2Base) -> None:
    with Engine(model, max_batch=1) as engine:
        warm_up(engine, every_size=True)
        assert engine.counters()["frames"] == 2


def test_other_sites_cannot_close_a_session(local: Local) -> None:
    session = opened(local)
    assert local.request("DELETE", session, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert state_of(local, session)["frame"] is None


def test_the_routes_are_described(local: Local) -> None:
    paths = json.loads(local.request("GET", "/openapi.json")[2])["paths"]
    steps = ("", "/frames", "/video", "/prompts", "/remove", "/masks")
    assert {path for path in paths if "video" in path} == {
        SESSIONS,
        *(SESSIONS + "/{session}" + step for step in steps),
    }
    assert set(paths[SESSIONS + "/{session}"]) == {"get", "delete"}
    body = paths[SESSIONS + "/{session}/frames"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert body["required"] == ["image"]
    assert {"image", "prompts", "frame", "output"} == set(body["properties"])
    for path in ("masks", "prompts", "remove"):
        post = paths[f"{SESSIONS}/{{session}}/{path}"]["post"]
        assert "image/png" in post["responses"]["200"]["content"]
        assert {"404", "409"} < set(post["responses"])
        assert "example" in post["requestBody"]["content"]["application/json"]
