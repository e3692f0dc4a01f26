"""The service behind nginx, by the configuration that the package brings."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import random_image
from waiting import SECONDS, wait_until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from serving import TOKEN, Server, file_of, multipart

import sam.server
from sam.client import Client

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.service,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]
PNG = file_of(random_image(40, 50))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--image-size", "128", "--device", "cpu", SAM_TOKEN=TOKEN) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def port(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = (Path(sam.server.__file__).parent / "nginx.conf").read_text()
    for ours_says, here in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("127.0.0.1:8000;", f"127.0.0.1:{server.port};"),
    ):
        assert ours.count(ours_says) == 1
        ours = ours.replace(ours_says, here)
    (folder / "sam.conf").write_text(ours)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/errors;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}include {folder}/sam.conf;\n}}\n"
    )
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")])

    def listens() -> bool:
        assert process.poll() is None, (folder / "errors").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens)
    yield port
    process.terminate()
    process.wait(SECONDS)


def asked(port: int, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    body, kind = multipart(PNG, {})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body if method == "POST" else None, {"Content-Type": kind, **named})
    return connection.getresponse().status


def test_the_client_works_through_it(port: int) -> None:
    with Client(f"http://127.0.0.1:{port}", TOKEN) as client:
        image = client.embed(PNG)
        (masks,) = client.segment(image, [{"points": [[5, 5]]}])
        assert masks.masks.shape == (3, 40, 50)


def test_whose_request_it_is_stays_known(port: int) -> None:
    token = {"Authorization": f"Bearer {TOKEN}", "Host": "sam.example"}
    assert asked(port, "POST", "/v1/embed", Origin="http://sam.example", **token) == 200
    assert asked(port, "POST", "/v1/embed", Origin="https://sam.example", **token) == 200
    assert asked(port, "POST", "/v1/embed", Origin="http://evil.example", **token) == 403
    assert asked(port, "POST", "/v1/embed", Host="sam.example") == 401
    assert asked(port, "GET", "/metrics", **token) == 403


def test_the_service_sees_whole_bodies_only(port: int, server: Server) -> None:
    body, kind = multipart(PNG, {})
    head = f"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    before = len([record for record in server.log if record["event"] == "request"])
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as slow:
        slow.sendall(f"{head}Authorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n".encode() + body[:-1])
        assert asked(port, "GET", "/v2/health/live") == 200
        wait_until(lambda: len([record for record in server.log if record["event"] == "request"]) == before + 1)
        slow.sendall(body[-1:])
        assert b" 200 " in slow.recv(100)


def test_one_address_has_a_share(port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(16)]
    for connection in held:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
    wait_until(lambda: asked(port, "GET", "/v2/health/live") == 429)
    for connection in held:
        connection.close()
    wait_until(lambda: asked(port, "GET", "/v2/health/live") == 200)
