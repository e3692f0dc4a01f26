"""The process: listen, drain on SIGTERM, end with a status that says why."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ..engine import Engine
from .app import create_app
from .service import Service
from .settings import Settings

log = logging.getLogger("sam.server")
_FIELDS = "fields"


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Server(uvicorn.Server):
    """uvicorn, but SIGTERM and SIGINT first let those inside finish, and are no reason to die of a signal."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        service.stop = self._stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._drain)

        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain_and_stop())
        else:  # asked twice
            self.should_exit = self.force_exit = True

    async def _drain_and_stop(self) -> None:
        await self.service.drain()
        self.should_exit = True

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                log.info("listening", extra={_FIELDS: {"url": url}})


def serve(engine: Engine, settings: Settings) -> int:
    """Answer requests until a signal comes or the model fails.

    Returns:
        the exit status: 0 after a signal, 1 after a failure or when the port cannot be had.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.captureWarnings(True)  # PIL's of odd metadata
    for name in ("sam.server", "uvicorn.error", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "sam.server" else logging.WARNING)
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app, settings.host, settings.port, log_config=None, access_log=False, server_header=False, proxy_headers=False,
        http="h11", ws="none", loop="asyncio", timeout_keep_alive=15, timeout_graceful_shutdown=3,
    )  # fmt: skip
    server = _Server(config, app.state.service)
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that it could not listen
        return 1
    stopped = engine.close(timeout=2.0)
    status = 0 if engine.failure is None and server.started else 1
    log.info("stopped", extra={_FIELDS: {"status": status}})
    if not stopped:  # the model hangs, and so would an orderly end
        os._exit(status or 1)
    return status
