"""A service as a user starts it, in a process of its own, and what is sent to it."""

from __future__ import annotations

import http.client
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from waiting import SECONDS

TOKEN = "a-token-for-tests"
ROOT = Path(__file__).parents[1]


class Server:
    """``python -m sam serve`` on a free port, ready once the block is entered; killed at its end if it still runs."""

    def __init__(self, *arguments: str, command: tuple[str, ...] = ("-m", "sam", "serve"), **environment: str) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
        self.log: list[dict[str, Any]] = []
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                record = json.loads(line)
            except ValueError:
                record = {"event": "not json", "line": line}
            self.log.append(record)
            self._lines.put(record)
        self._lines.put(None)

    def wait_for(self, event: str) -> dict[str, Any]:
        while True:
            record = self._lines.get(timeout=SECONDS)
            assert record is not None, self.log
            if record["event"] == event:
                return record

    def __enter__(self) -> Server:
        self.url = self.wait_for("listening")["url"]
        self.port = int(self.url.rsplit(":", 1)[1])
        self.wait_for("ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def tracebacks(self) -> str:
        """Of mistakes of the server's, for a message."""
        return "\n".join(record["traceback"] for record in self.log if "traceback" in record)

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def multipart(image: bytes, fields: dict[str, Any]) -> tuple[bytes, str]:
    parts = [b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + image + b"\r\n"]
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode())
    return b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


def file_of(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def jpeg_with_an_odd_tag(image: np.ndarray) -> bytes:
    """To be turned by 90 degrees to see it upright, and with text in a tag that should hold a number."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    description, thresholding = b"\x01\x0e\0\x02", b"\x01\x07\0\x02"  # tags of type text
    data = file_of(image, "JPEG", exif=exif)
    assert data.count(description) == 1
    return data.replace(description, thresholding)
