"""Sessions of video on a started service: those that are dropped leave no memory behind, and SIGTERM ends them."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import pytest
from clips import write_clip
from models import draw_weights_that_see, random_image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import Server, file_of, multipart
from waiting import SECONDS, wait_until

import sam
from sam.client import Client
from sam.modeling.build import build_from_config

pytestmark = [pytest.mark.slow, pytest.mark.service]
SESSIONS, LIMIT = 50, 100 * 2**20
# The service, which takes a session for abandoned after a second.
HASTY = """
import sys
from dataclasses import replace
import sam.server
from sam.cli import main
serve = sam.server.serve
sam.server.serve = lambda engine, settings: serve(engine, replace(settings, session_seconds=1.0))
sys.exit(main(["serve", *sys.argv[1:]]))
"""
FRAME = file_of(random_image(360, 480), "JPEG")
PROMPTS = [{"object": str(index), "points": [[60 * index, 100]]} for index in range(1, 5)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tiny model, for 256 px."""
    path = tmp_path_factory.mktemp("model") / "weights.safetensors"
    config = sam.SAM2_VARIANTS["sam2.1_tiny"].with_image_size(256)
    sam.save_checkpoint(draw_weights_that_see(build_from_config(config)), path)
    return path


def options(weights: Path) -> tuple[str, ...]:
    return ("--checkpoint", str(weights), "--image-size", "256", "--device", "cpu")


def ask(server: Server, path: str, body: bytes, kind: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    try:
        connection.request("POST", f"/v1/video/sessions{path}", body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def visit(server: Server) -> None:
    """Open a session as soon as there is room, track four objects over two frames, and leave."""
    opened: list[str] = []

    def has_opened() -> bool:
        status, answer = ask(server, "", b"{}", "application/json")
        if status == 200:
            opened.append(answer["session"])
        return status == 200

    wait_until(has_opened)
    for fields in ({"prompts": PROMPTS}, {}):
        status, answer = ask(server, f"/{opened[0]}/frames", *multipart(FRAME, fields))
        assert (status, len(answer["objects"])) == (200, 4)


def open_sessions(server: Server) -> float:
    return float(server.get("/metrics")[1].decode().partition("\nsam_video_sessions ")[2].split()[0])


def test_sessions_that_are_dropped_leave_no_memory_behind(weights: Path) -> None:
    with Server(*options(weights), command=("-c", HASTY)) as server:
        for _ in range(3):
            visit(server)
        wait_until(lambda: open_sessions(server) == 0)
        before, most = server.resident_bytes(), 0
        for _ in range(SESSIONS):
            visit(server)
            most = max(most, server.resident_bytes())
        wait_until(lambda: open_sessions(server) == 0)
        wait_until(lambda: server.resident_bytes() - before <= LIMIT)
        grown = server.resident_bytes() - before
        ended = server.get("/metrics")[1].decode().partition('reason="expired"} ')[2].split()[0]
        print(f"\n{SESSIONS} sessions: +{(most - before) / 2**20:.0f} MiB at most, {grown / 2**20:+.0f} MiB afterwards")
        assert float(ended) == SESSIONS + 3
        assert server.stop() == 0
        assert not server.tracebacks()


def test_sigterm_ends_a_video_that_is_tracked(weights: Path, tmp_path: Path) -> None:
    """The frame under way is tracked, the next ones are not; the status is 0."""
    clip = write_clip(tmp_path / "clip.mp4", [random_image(64, 96, seed) for seed in range(200)])
    with Server(*options(weights)) as server, Client(server.url) as client:
        video = client.open_video()
        video.send_video(clip, {"cat": {"points": [[20, 20]]}})
        wait_until(lambda: video.state().next_frame >= 2)
        assert server.stop() == 0
        assert not server.tracebacks()
