"""Video files over HTTP: decoded in a process of their own, tracked in the background, broken ones named."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import without_frame, write_clip
from models import SMALL_2, draw_weights_that_see, random_image
from PIL import Image

pytest.importorskip("av", reason="reading video files needs the extra 'video'")
pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import ROOT, file_of
from waiting import SECONDS, wait_until

import sam
from sam import Prompt
from sam.client import Client, RemoteFrame, ServiceError
from sam.engine import Engine, TrackedFrame, streams
from sam.images import videos
from sam.images.videos import DamagedVideoError, UnsupportedVideoError, VideoApart, VideoTooLargeError, decode_frames
from sam.masks import rle
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base
from sam.server import Settings, answering, sessions
from sam.server import video as video_routes
from sam.video.session import step_together

PICTURES = [random_image(48, 64, seed) for seed in range(3)]
PROMPTS = [{"object": "cat", "points": [[15, 20]]}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", PICTURES)


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2))


@pytest.fixture(scope="module")
def local(model: SAM2Base) -> Iterator[Local]:
    running = Local(Engine(model), Settings(max_videos=1, max_video_pixels=320 * 240))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def all_closed(local: Local) -> Iterator[None]:
    yield
    for key in list(local.service.sessions._open):
        local.request("DELETE", f"/v1/video/sessions/{key}")


def opened(local: Local) -> str:
    return f"/v1/video/sessions/{local.post('/v1/video/sessions')[1]['session']}"


def send(local: Local, session: str, content: bytes, **fields: Any) -> tuple[int, Any]:
    parts = [b'--b\r\nContent-Disposition: form-data; name="video"; filename="x"\r\n\r\n' + content + b"\r\n"]
    for name, value in fields.items():
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(f"{head}{json.dumps(value)}\r\n".encode())
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, _, text = local.request("POST", f"{session}/video", b"".join(parts) + b"--b--\r\n", headers)
    return status, json.loads(text)


def state_of(local: Local, session: str) -> Any:
    return json.loads(local.request("GET", session)[2])


def ended(local: Local, session: str) -> Any:
    wait_until(lambda: state_of(local, session)["video"]["state"] != "tracking")
    return state_of(local, session)["video"]


def test_a_file_is_tracked_in_the_background(local: Local, model: SAM2Base, clip: Path) -> None:
    """Its masks are those of Python; prompts come with it or before it, frames after it."""
    session = opened(local)
    box = {"object": "dog", "box": [30, 20, 55, 40]}
    assert local.post(f"{session}/prompts", frame=1, prompts=[box])[0] == 200
    status, answer = send(local, session, clip.read_bytes(), prompts=PROMPTS)
    assert (status, answer["video"]["state"]) == (200, "tracking")
    assert ended(local, session) == {"state": "done", "frames": 3}
    prompts = {0: {"cat": Prompt([(15, 20)], [1])}, 1: {"dog": Prompt(box=[30, 20, 55, 40])}}
    tracking = sam.track(model, clip, prompts)
    for result in tracking:
        _, answer, _ = local.post(f"{session}/masks", frame=result.frame)
        found = [rle.decode(record["segmentation"]) for record in answer["objects"]]
        np.testing.assert_array_equal(found, result.masks.numpy())
        assert result.masks.any()
    _, answer, _ = local.post(f"{session}/frames", file_of(PICTURES[0]), frame=3)
    expected = tracking.session.step(PICTURES[0]).masks.numpy()
    np.testing.assert_array_equal([rle.decode(record["segmentation"]) for record in answer["objects"]], expected)


def test_a_broken_video_names_the_frame_and_keeps_what_was_tracked(local: Local, clip: Path) -> None:
    session = opened(local)
    assert send(local, session, without_frame(clip, 2), prompts=PROMPTS)[0] == 200
    video = ended(local, session)
    error = {"code": "bad_video", "message": "The video is damaged at this frame; those before it were tracked."}
    assert video == {"state": "failed", "frames": 2, "error": {**error, "where": ["frame", 2]}}
    for frame in range(2):
        status, answer, _ = local.post(f"{session}/masks", frame=frame)
        assert (status, [record["id"] for record in answer["objects"]]) == (200, ["cat"])
        assert rle.decode(answer["objects"][0]["segmentation"]).any()
    assert local.error(f"{session}/masks", frame=2) == (404, "unknown_frame")
    assert local.post(f"{session}/frames", file_of(PICTURES[2]), frame=2)[0] == 200  # a client may go on by itself
    _, answer = send(local, session, without_frame(clip, 0))
    assert (answer["error"]["code"], answer["error"]["where"]) == ("bad_video", ["frame", 0])


def test_the_client_reads_masks_as_they_come(local: Local, model: SAM2Base, clip: Path) -> None:
    """And then raises what ended the file, which names the frame."""
    results = list(sam.track(model, clip, {0: {"cat": Prompt([(15, 20)], [1])}}))
    found: list[RemoteFrame] = []
    with Client(f"http://127.0.0.1:{local.port}") as client, client.open_video() as video:
        video.send_video(clip, {"cat": {"points": [[15, 20]]}})
        for frame, result in zip(video.frames(0.01), results, strict=True):
            np.testing.assert_array_equal(frame.masks, result.masks)
        video.send_video(without_frame(clip, 1))
        with pytest.raises(ServiceError, match=r"bad_video .* At frame\.1\.") as refused:
            found.extend(video.frames(0.01))
        assert refused.value.where == ("frame", 1)
        assert [frame.frame for frame in found] == [3]
        assert video.push(file_of(PICTURES[0])).frame == 4


@pytest.fixture
def slow_start(monkeypatch: pytest.MonkeyPatch) -> tuple[list[VideoApart], threading.Event, threading.Event]:
    """The processes that decode files; an event once one has started, and one until which its start waits."""
    started: list[VideoApart] = []
    entered, go_on = threading.Event(), threading.Event()

    class Slow(VideoApart):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)
            entered.set()
            assert go_on.wait(SECONDS)

    monkeypatch.setattr(video_routes, "VideoApart", Slow)
    return started, entered, go_on


def test_a_file_has_its_place_before_its_process_has_started(local: Local, clip: Path, slow_start: Any) -> None:
    _, entered, go_on = slow_start
    one, other = opened(local), opened(local)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send, local, one, clip.read_bytes())
        assert entered.wait(SECONDS)
        assert send(local, other, clip.read_bytes())[1]["error"]["code"] == "queue_full"
        go_on.set()
        assert first.result(SECONDS)[0] == 200
    assert ended(local, one)["state"] == "done"
    assert send(local, other, clip.read_bytes())[0] == 200
    assert ended(local, other)["state"] == "done"


def test_a_client_that_leaves_while_the_process_starts_leaves_none_behind(
    local: Local, tmp_path: Path, slow_start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more frames than a pipe holds, which it would wait for somebody to read."""
    started, entered, go_on = slow_start
    left, cancel_on_disconnect = threading.Event(), answering.cancel_on_disconnect

    def watched(receive: Any, work: Any) -> Any:
        async def noted() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                left.set()
            return message

        return cancel_on_disconnect(noted, work)

    monkeypatch.setattr(answering, "cancel_on_disconnect", watched)
    film, session = write_clip(tmp_path / "long.mp4", PICTURES * 4), opened(local)
    head = b'--b\r\nContent-Disposition: form-data; name="video"; filename="x"\r\n\r\n'
    body = head + film.read_bytes() + b"\r\n--b--\r\n"
    leaver = http.client.HTTPConnection("127.0.0.1", local.port, timeout=SECONDS)
    leaver.request("POST", f"{session}/video", body, {"Content-Type": "multipart/form-data; boundary=b"})
    assert entered.wait(SECONDS)
    leaver.close()
    assert left.wait(SECONDS)
    go_on.set()
    wait_until(lambda: started[0]._process.poll() is not None)
    assert state_of(local, session)["video"] is None


def test_what_a_session_refuses_while_it_tracks_a_file(
    local: Local, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(SECONDS)
        return step_together(*arguments)

    monkeypatch.setattr(streams, "step_together", held)
    session, other = opened(local), opened(local)
    assert send(local, session, clip.read_bytes())[0] == 200
    assert entered.wait(SECONDS)
    assert local.error(f"{session}/frames", file_of(PICTURES[0])) == (409, "session_busy")
    assert send(local, session, clip.read_bytes())[1]["error"]["code"] == "session_busy"
    assert send(local, other, clip.read_bytes())[1]["error"]["code"] == "queue_full"  # one file at a time
    run = local.service.sessions._open[session.rpartition("/")[2]].run
    assert run is not None
    assert run.decoder is not None
    assert run.decoder._process.poll() is None
    assert local.request("DELETE", session)[0] == 200
    assert run.decoder._process.poll() is not None
    go_on.set()
    wait_until(lambda: local.service.sessions.running == 0 and local.service.in_flight == 0)
    assert run.ended
    assert local.service.bodies.held == 0


def test_masks_that_are_not_kept_yet_are_waited_for(local: Local, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame counts as tracked a moment before its masks can be read."""
    compress, go_on = sessions._compressed, threading.Event()

    def held(answer: TrackedFrame) -> TrackedFrame:
        assert go_on.wait(SECONDS)
        return compress(answer)

    monkeypatch.setattr(sessions, "_compressed", held)
    with Client(f"http://127.0.0.1:{local.port}") as client, client.open_video() as video:
        video.send_video(clip)
        wait_until(lambda: video.state().next_frame == 1)
        assert video.state().last_masks is None
        frames = video.frames(0.01)
        threading.Timer(0.2, go_on.set).start()
        assert [frame.frame for frame in frames] == [0, 1, 2]


def test_what_the_readme_shows(local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = [random_image(240, 320, seed) for seed in range(2)]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(f"0000{index}.jpg")
    write_clip(tmp_path / "clip.mp4", pictures)
    text = (ROOT / "README.md").read_text().partition("<!-- service: of videos")[2].partition("<!-- end of")[0]
    text = text.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{local.port}")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["first"].masks.shape == (1, 240, 320)
    assert scope["first"].predicted_iou != scope["corrected"].predicted_iou
    assert [scope[name].frame for name in ("first", "corrected", "second", "frame")] == [0, 0, 1, 3]
    if shutil.which("curl") is None:
        return
    session, lines = "", re.findall(r"^curl (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        command = line.replace("SESSION", session).replace("curl ", "curl -sS --fail-with-body ", 1)
        command = command if "--fail -o" not in command else command.replace("--fail-with-body ", "")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        session = session or json.loads(done.stdout)["session"]
    assert Image.open("mask.png").size == (320, 240)
    assert len(local.service.sessions) == 0


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"no video", 415, "unsupported_video"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), 422, "bad_video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415, "unsupported_video"),
        (file_of(PICTURES[0]), 415, "unsupported_video"),
    ],
)
def test_other_files_are_refused(local: Local, content: bytes, status: int, code: str) -> None:
    answered, answer = send(local, opened(local), content)
    assert (answered, answer["error"]["code"]) == (status, code)
    assert local.service.sessions.running == 0


def test_without_pyav_frames_are_asked_for(local: Local, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest))
    status, answer = send(local, opened(local), clip.read_bytes())
    assert (status, answer["error"]["code"]) == (415, "no_video_files")


def test_a_file_decoded_apart_has_the_same_pixels(clip: Path) -> None:
    with open(clip, "rb") as file:
        decoder = VideoApart(file, 32, 10**6, SECONDS)
    try:
        for pixels, height, width in decode_frames(clip, 32):
            found = decoder.read()
            assert found is not None
            assert found[1] == (height, width)
            np.testing.assert_array_equal(found[0], pixels)
        assert decoder.read() is None
    finally:
        decoder.close()


def test_files_apart_are_within_limits(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pixels, of codecs, and of time; where the process ends by itself too."""

    def refused(content: bytes, error: type[Exception], max_pixels: int = 10**6, seconds: float = SECONDS) -> None:
        decoder = VideoApart(io.BytesIO(content), 32, max_pixels, seconds)
        try:
            with pytest.raises(error):
                list(iter(decoder.read, None))
        finally:
            decoder.close()

    refused(clip.read_bytes(), VideoTooLargeError, max_pixels=48 * 64 - 1)
    refused(write_clip(tmp_path / "x.avi", PICTURES, "ffv1").read_bytes(), UnsupportedVideoError)
    monkeypatch.setattr(videos, "_CHILD", "import time; time.sleep(1000)")
    refused(clip.read_bytes(), DamagedVideoError, seconds=0.01)
    monkeypatch.setattr(videos, "_CHILD", "import os; os._exit(1)")
    refused(clip.read_bytes(), DamagedVideoError)
