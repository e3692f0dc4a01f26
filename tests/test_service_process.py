"""``python -m sam serve`` as a process: signals, faults, exit statuses, the client, the curl lines of the README."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY_2, random_image, random_model
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import ROOT, TOKEN, Server, file_of, multipart
from waiting import SECONDS, wait_until

import sam
from sam.cli import main
from sam.client import Client, ServiceError
from sam.examples import service_client

SMALL = ("--image-size", "128", "--device", "cpu")
SERVICE = [pytest.mark.slow, pytest.mark.service]
# The service with a model that fails on images 13 pixels wide, as a broken device would on any.
FAULTY = """
import sys
from sam.cli import main
from sam.modeling import Sam
encode = Sam.encode
def faulty(self, images, batch_size=None):
    if images[0].pixels.shape[1] == 13 * 128 // 26:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return encode(self, images, batch_size)
Sam.encode = faulty
sys.exit(main(["serve", *sys.argv[1:]]))
"""
# The service whose images are never decoded; the thread may hold the interpreter as well, once the service drains.
HANGING = """
import ctypes, sys, threading, time
from dataclasses import replace
import sam.server
from sam.cli import main
from sam.server import app, service
drain_seconds, holds = float(sys.argv.pop(1)), sys.argv.pop(1) == "holding"
draining, drain, serve = threading.Event(), service.Service.drain, sam.server.serve
def hang(*arguments):
    draining.wait(), time.sleep(0.3)  # until it is in the log
    ctypes.PyDLL(None).sleep(1000) if holds else time.sleep(1000)
async def noted(self):
    draining.set()
    await drain(self)
app.decode_image, service.Service.drain = hang, noted
sam.server.serve = lambda engine, settings: serve(engine, replace(settings, drain_seconds=drain_seconds))
sys.exit(main(["serve", *sys.argv[1:]]))
"""


# The service whose first image takes until the engine is closed, and then a moment more.
SLOW_START = """
import sys, threading, time
from sam.cli import main
from sam.engine import Engine
from sam.modeling import Sam
closing, encode, close = threading.Event(), Sam.encode, Engine.close
def slow(self, images, batch_size=None):
    closing.wait(), time.sleep(0.2)
    return encode(self, images, batch_size)
def noted(self, timeout=None):
    closing.set()
    ended = close(self, timeout)
    print("engine thread ended:", not self._thread.is_alive())
    return ended
Sam.encode, Engine.close = slow, noted
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(SAM_TOKEN=TOKEN) as running:
        yield running
        assert running.stop() == 0


def test_client(server: Server, nano: sam.Sam, photo: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(photo).save(path)
    with Client(server.url, TOKEN) as client:
        assert client.ready()
        image = client.embed(path)
        assert (image.height, image.width) == photo.shape[:2]
        (click,) = client.segment(image, [{"points": [[170, 115]]}])
        expected = nano.predict(nano.encode(photo), [sam.Prompt([(170, 115)], [1])])
        assert (click.masks != expected.masks[0].numpy()).mean() < 1e-3
        np.testing.assert_allclose(click.predicted_iou, expected.iou_predictions[0], atol=1e-3)
        corrected = {"points": [[170, 115], [30, 280]], "labels": [1, 0], "mask_input": click.reference}
        (answer,) = client.segment(image, [corrected], multimask_output=False)
        assert answer.masks.shape == (1, *photo.shape[:2])
        records = client.automatic(image, points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0)
        assert all(record["segmentation"].sum() == record["area"] for record in records)
        with pytest.raises(ServiceError, match=r"out_of_image \(422\): .* At prompts.0.points.0\.") as refused:
            client.segment(image, [{"points": [[9999, 1]]}])
        assert (refused.value.code, refused.value.where) == ("out_of_image", ("prompts", 0, "points", 0))
    with Client(server.url, "wrong-token") as stranger, pytest.raises(ServiceError, match="unauthorized"):
        stranger.embed(path)
    assert not Client("http://127.0.0.1:1").ready()
    with pytest.raises(ValueError, match="url must be http"):
        Client("127.0.0.1:8000")


def test_the_example_of_a_client(
    server: Server,
    photo: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    service_client.main("photo.png", "170", "115", server.url, TOKEN)
    assert Image.open("mask.png").size == (451, 300)
    assert re.match(r"mask\.png: predicted IoU 0\.\d\d, corrected 0\.\d\d", capsys.readouterr().out)


@pytest.fixture
def readme(photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the README says of the service, but of everything with fewer clicks; in a folder where its photo is."""
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text().partition("<!-- service")[2].partition("<!-- end of service -->")[0]
    assert text.count("points_per_side=16") == 2
    return text.replace("points_per_side=16", "points_per_side=2")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_lines_of_the_readme(server: Server, readme: str) -> None:
    send_curl_lines(server, readme)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_lines_on_sam_2(readme: str, tmp_path: Path) -> None:
    sam.save_checkpoint(random_model(TINY_2), tmp_path / "weights.safetensors")
    with Server("--checkpoint", str(tmp_path / "weights.safetensors"), "--device", "cpu", SAM_TOKEN=TOKEN) as running:
        send_curl_lines(running, readme)


def send_curl_lines(server: Server, readme: str) -> None:
    """Each in turn, with this server's address and token; ``EMBEDDING`` is what the one that embeds answered."""
    lines = re.findall(r"^curl (?:.*\\\n)*.*$", readme, re.MULTILINE)
    assert len(lines) >= 5
    embedding = ""
    for line in lines:
        command = line.replace("http://127.0.0.1:8000", server.url).replace("EMBEDDING", embedding)
        strictly = "" if "--fail" in line else "--fail-with-body "
        command = command.replace("curl ", f"curl {strictly}-sS -H 'Authorization: Bearer {TOKEN}' ", 1)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if line.endswith("/v1/embed"):
            embedding = json.loads(done.stdout)["embedding"]
    assert Image.open("mask.png").size == (451, 300)
    (to_file,) = (line for line in lines if "-o mask.png" in line)
    assert "--fail " in to_file


def test_client_lines_of_the_readme(server: Server, readme: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    here = 'Client("http://127.0.0.1:8000")'
    assert here in code
    scope: dict[str, Any] = {}
    exec(code.replace(here, f"Client({server.url!r}, {TOKEN!r})"), scope)
    assert scope["first"].masks.shape == (3, 300, 451)
    assert scope["second"].masks.shape == (1, 300, 451)
    assert isinstance(scope["everything"], list)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_threads_of_openmp_do_not_spin(server: Server) -> None:
    """They would take time from those that read and write requests."""
    assert b"OMP_WAIT_POLICY=PASSIVE" in Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")


def test_the_log_is_json_with_request_ids(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    connection.request("GET", "/v2/health/live?x=1", headers={"X-Request-ID": "find-me"})
    connection.getresponse().read()
    connection.close()
    result = lambda: [record for record in server.log if record.get("request_id") == "find-me"]  # noqa: E731
    wait_until(result)
    assert {**result()[0], "time": 0, "seconds": 0} == {
        "time": 0, "level": "info", "event": "request", "request_id": "find-me", "method": "GET",
        "route": "/v2/health/live", "status": 200, "seconds": 0, "bytes": 13,
    }  # fmt: skip
    assert TOKEN not in json.dumps(server.log)


def test_sigterm_under_load_loses_nothing() -> None:
    """Whoever was let in is answered; others are told 503 or find nobody listening; the status is 0."""
    with Server(*SMALL, "--max-queue", "64", OMP_WAIT_POLICY="PASSIVE") as server:
        statuses: Counter[int | str] = Counter()
        body, kind = multipart(file_of(random_image(50, 60)), {"prompts": [{"points": [[5, 5]]}] * 8})
        stopping = threading.Event()

        def client() -> None:
            while True:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
                try:
                    connection.request("POST", "/v1/segment", body, {"Content-Type": kind})
                    answer = connection.getresponse()
                    answer.read()
                    statuses[answer.status] += 1
                    if answer.status == 503:
                        return
                except OSError as error:
                    assert stopping.is_set()
                    statuses[type(error).__name__] += 1
                    return
                finally:
                    connection.close()

        threads = [threading.Thread(target=client) for _ in range(16)]
        for thread in threads:
            thread.start()
        wait_until(lambda: statuses[200] >= 2 * len(threads))
        stopping.set()
        assert server.stop() == 0
        for thread in threads:
            thread.join(SECONDS)
        logged = Counter(record["status"] for record in server.log if record.get("route") == "/v1/segment")
        assert statuses[200] > 0
        assert statuses[200] == logged[200]
        assert set(logged) <= {200, 503}
        assert set(statuses) <= {200, 503, "ConnectionRefusedError", "ConnectionResetError"}


@pytest.mark.parametrize(
    ("drain_seconds", "thread", "second", "status"),
    [
        (1000, "hanging", signal.SIGTERM, -signal.SIGTERM),
        pytest.param(1000, "holding", signal.SIGTERM, -signal.SIGTERM, marks=SERVICE),
        pytest.param(1000, "hanging", signal.SIGINT, -signal.SIGINT, marks=SERVICE),
        pytest.param(0.2, "hanging", None, 1, marks=SERVICE),
        pytest.param(0.2, "holding", None, -signal.SIGALRM, marks=SERVICE),
    ],
)
def test_it_ends_when_told_whatever_threads_do(
    drain_seconds: float, thread: str, second: signal.Signals | None, status: int
) -> None:
    """At the second signal, or within the stated time; ``holding`` lets no other thread of Python run."""
    with Server(*SMALL, command=("-c", HANGING, str(drain_seconds), thread)) as server:
        body, kind = multipart(file_of(random_image(9, 9)), {})
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        connection.request("POST", "/v1/embed", body, {"Content-Type": kind})
        wait_until(lambda: b"sam_in_flight 1.0" in server.get("/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for("draining")["in_flight"] == 1
        if second is not None:
            server.process.send_signal(second)
        assert server.process.wait(SECONDS) == status


def test_a_model_fault_ends_the_process() -> None:
    with Server(*SMALL, command=("-c", FAULTY)) as server, Client(server.url) as client:
        client.embed(file_of(random_image(20, 30)))
        with pytest.raises(ServiceError, match="model_failed"):
            client.embed(file_of(random_image(26, 13)))
        assert not client.ready()
        assert server.process.wait(SECONDS) == 1
    failed = next(record for record in server.log if record["event"] == "model failed")
    assert "illegal memory access" in failed["traceback"]


@pytest.mark.parametrize(
    ("host", "event"), [("127.0.0.1", "not listening"), pytest.param("no..host", "service failed", marks=SERVICE)]
)
def test_no_port_to_listen_on(host: str, event: str) -> None:
    """The engine, which warms up by then, has ended before the process does; every event is a name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ["--host", host, "--port", str(port), "--token", TOKEN, *SMALL]
        done = subprocess.run(
            [sys.executable, "-c", SLOW_START, *given], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "engine thread ended: True\n"), done.stderr
    log = [json.loads(line) for line in done.stderr.splitlines()]
    assert {record["event"] for record in log} == {"uvicorn", event, "warm-up ended early", "stopped"}
    assert log[-1]["status"] == 1
    if event == "not listening":
        assert "in use" in log[0]["message"]
        assert {**log[1], "time": 0} == {"time": 0, "level": "error", "event": event, "host": host, "port": port}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines: give --token, or --insecure"),
        (["--token", "short"], "the token must be at least 8 printable"),
        (["--checkpoint", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--max-queue", "0"], "max_queue must be positive, got 0"),
    ],
)
def test_mistakes_end_with_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.delenv("SAM_TOKEN", raising=False)
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sam.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert "pip install 'fastsam-kernels[serve]'" in capsys.readouterr().err
