"""The process of the service: listen, drain on SIGTERM, end with a status that says why."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..engine import Engine
from .app import create_app
from .connections import Connections, as_protocol_class
from .service import Service
from .settings import Settings

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("sam.server")
_FIELDS = "fields"
# Of the end: to write the last answers, to stop the model, and to spare.
_UVICORN_SECONDS, _ENGINE_SECONDS, _SPARE_SECONDS = 3, 2.0, 1.0
# Of connections, beyond those of a full queue.
_BEYOND_QUEUE = 100
# Connections are accepted so many at a time, and they count only then.
_BACKLOG, _OTHER_FILES = 128, 64


class JsonFormatter(logging.Formatter):
    """Format records as JSON, one object per line."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name == log.name
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            # An event is a name to look for; others log whole sentences.
            **({"event": record.getMessage()} if ours else {"event": "uvicorn", "message": record.getMessage()}),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Server(uvicorn.Server):
    """uvicorn, but SIGTERM and SIGINT first let those inside finish, and are no reason to die of a signal.

    A second signal, and the time that is stated for all of it, end the process at once: the system does that, so it
    takes no thread that hangs, or holds the interpreter, for it.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        service.stop = self._stop
        service.on_warm = _spare_the_collector

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)

        def on_signal(number: int, frame: FrameType | None) -> None:
            for each in numbers:
                signal.signal(each, signal.SIG_DFL)
            _end_after(self.service.settings.drain_seconds + _UVICORN_SECONDS + _ENGINE_SECONDS + _SPARE_SECONDS)
            loop.call_soon_threadsafe(self._drain)

        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) is on_signal:
                    signal.signal(number, handler)

    def _drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain_and_stop())

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


def configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration: HTTP is parsed in C, within the limits of :mod:`.connections`."""
    return uvicorn.Config(
        app, settings.host, settings.port, log_config=None, access_log=False, server_header=False, proxy_headers=False,
        http=as_protocol_class(Connections(settings)), ws="none", loop="asyncio", backlog=_BACKLOG,
        timeout_keep_alive=math.ceil(settings.head_seconds), timeout_graceful_shutdown=_UVICORN_SECONDS,
    )  # fmt: skip


def serve(engine: Engine, settings: Settings) -> int:
    """Answer requests until a signal comes or the model fails.

    Returns:
        the exit status: 0 after a signal, 1 after a failure or when the port cannot be had. The engine is closed by
        then, and no thread of the service runs: one inside torch would crash an interpreter that ends.
    """
    _log_as_json()
    threads_before = set(threading.enumerate())
    settings = _within_descriptors(
        replace(settings, max_connections=max(settings.max_connections, engine.max_queue + _BEYOND_QUEUE))
    )
    app = create_app(engine, settings)
    server = _Server(configure(app, settings), app.state.service)
    status = 1
    try:
        server.run()
        status = 0 if engine.failure is None and server.started else 1
    except SystemExit:  # uvicorn's way to say that it could not listen; it logged why
        log.error("not listening", extra={_FIELDS: {"host": settings.host, "port": settings.port}})
    except Exception:
        log.critical("service failed", exc_info=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as KeyboardInterrupt it would leave before the threads have ended
    ended = engine.close(timeout=_ENGINE_SECONDS) and not _threads_are_left(threads_before)
    status = status if ended else 1
    log.info("stopped", extra={_FIELDS: {"status": status}})
    if not ended:  # an orderly end would wait for them, or take the interpreter from under them
        os._exit(status)
    _end_after(0)
    return status


def _spare_the_collector() -> None:
    """Let the garbage collector pass over what is there to stay: with torch, a full collection holds all for 0.2 s."""
    gc.collect()
    gc.freeze()


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("sam.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "sam.server" else logging.WARNING)
    # These write what is odd in a request, as often as the client likes, and warnings are remembered by their text.
    for name in ("PIL", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="PIL")


def _within_descriptors(settings: Settings) -> Settings:
    """Lower the number of connections to the files this process may open: each can have an upload on disk beside it."""
    if resource is None:
        return settings
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * settings.max_connections + _BACKLOG + _OTHER_FILES
    if allowed < needed:
        allowed = needed if most == resource.RLIM_INFINITY else min(needed, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    connections = min(settings.max_connections, (allowed - _BACKLOG - _OTHER_FILES) // 2)
    if connections < settings.max_connections:
        log.warning("few descriptors", extra={_FIELDS: {"descriptors": allowed, "max_connections": connections}})
    return replace(settings, max_connections=max(1, connections))


def _end_after(seconds: float) -> None:
    """Let the system end this process after ``seconds``; 0 cancels that. Without such a timer do nothing."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _threads_are_left(before: set[threading.Thread]) -> bool:
    """Return whether threads of the service still run a moment after they were told to end."""
    others = [each for each in threading.enumerate() if each not in before]
    for each in others:
        each.join(_SPARE_SECONDS / len(others))
    return any(each.is_alive() for each in others)
