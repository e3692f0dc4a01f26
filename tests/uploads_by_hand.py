"""Uploads written to a socket by hand, and services that they are sent to."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from models import TINY, random_image, random_model

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
from local_service import Local
from serving import file_of
from waiting import SECONDS

from sam.engine import Engine
from sam.server import Settings

PNG = file_of(random_image(60, 90))
NOISE = file_of(random_image(300, 300))  # 270 KB
CLICK = [{"points": [[5, 5]]}]
FORM = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'


def started(settings: Settings, **limits: Any) -> Local:
    return Local(Engine(random_model(TINY), **limits), settings)


def begun(running: Local, length: int, body: bytes = b"") -> socket.socket:
    """A connection on which an upload of ``length`` bytes is announced and ``body`` is sent."""
    connection = socket.create_connection(("127.0.0.1", running.port))
    head = f"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    connection.settimeout(SECONDS)
    return connection
