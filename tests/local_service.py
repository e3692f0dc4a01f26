"""The service in this process, on a free port."""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import replace
from typing import Any

import uvicorn
from serving import multipart
from waiting import SECONDS, wait_until

from sam.engine import Engine
from sam.server import Settings, create_app
from sam.server.errors import KINDS
from sam.server.run import configure
from sam.server.service import Service


class Local:
    """The application on a free port, its server in a thread."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        app = create_app(engine, settings)
        self.service: Service = app.state.service
        self.engine, self.app = engine, app
        self._server = uvicorn.Server(configure(app, replace(settings, port=0)))
        self.thread = threading.Thread(target=self._server.run)
        self.thread.start()
        wait_until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        wait_until(lambda: self.service.warm)

    def close(self) -> None:
        self._server.should_exit = True
        self.thread.join(SECONDS)
        self.engine.close(SECONDS)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, route: str, image: bytes | None = None, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        """Multipart with an image, else JSON; the answer as JSON where it is."""
        if image is None:
            body, kind = json.dumps(fields).encode(), "application/json"
        else:
            body, kind = multipart(image, fields)
        status, answered, content = self.request("POST", route, body, {"Content-Type": kind, **(headers or {})})
        is_json = answered.get("content-type") == "application/json"
        return status, json.loads(content) if is_json else content, answered

    def error(self, route: str, image: bytes | None = None, **fields: Any) -> tuple[int, str]:
        status, answer, _ = self.post(route, image, **fields)
        assert set(answer) == {"error", "request_id"}
        assert answer["error"]["message"] == KINDS[answer["error"]["code"]].message
        return status, answer["error"]["code"]
