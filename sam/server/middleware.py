"""Steps of every request before and after its route: an id, the token, a log line, metrics."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Service

log = logging.getLogger("sam.server")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
# All that the routes read. Other headers are dropped: frameworks would parse cookies, ranges and queries.
_READ_BY_ROUTES = (b"content-type", b"content-encoding", b"content-length")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+?)\.?(?::[0-9]*)?")
_CLIENT_LEFT = 499


class Gatekeeper:
    """ASGI middleware that admits or refuses; answers carry ``X-Request-ID``, the client's own if it is plain."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, sent = time.perf_counter(), _CLIENT_LEFT, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                answer["X-Content-Type-Options"] = "nosniff"
            else:
                sent += len(message.get("body", b""))
            await send(message)

        async def refuse(error: ApiError) -> None:
            self.service.metrics.errors.labels(error.code).inc()
            response = JSONResponse(error.body(request_id), error.status, error.headers)
            await response(scope, receive, send_with_id)

        try:
            self._check(scope, headers)
            scope["headers"] = [(name, value) for name, value in headers.raw if name in _READ_BY_ROUTES]
            scope["query_string"] = b""
            await self.app(scope, receive, send_with_id)
        except ApiError as error:
            await refuse(error)
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status == _CLIENT_LEFT:
                await refuse(ApiError("internal"))
        finally:
            self._record(scope, request_id, status, time.perf_counter() - started, sent)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] in OPEN_PATHS:
            return
        settings = self.service.settings
        if settings.token is not None:
            if not _shows_token(headers.get("authorization", ""), settings.token):
                raise ApiError("unauthorized")
        # Without a token a page of another site must not reach the service through the visitor's browser,
        # under a name of its own that leads to this machine neither.
        elif settings.loopback and _name_of(headers.getlist("host")) not in (*_LOCAL_NAMES, settings.host.lower()):
            raise ApiError("forbidden")
        if scope["method"] not in ("GET", "HEAD") and _is_foreign(headers):
            raise ApiError("forbidden")

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float, sent: int) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")
        metrics = self.service.metrics
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(seconds)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "route": path,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": sent,
        }
        log.info("request", extra={"fields": fields})


def _name_of(hosts: list[str]) -> str | None:
    """Return the name or address in the one Host header, in lower case; None if there is none."""
    match = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
    return match[1] if match else None


def _is_foreign(headers: Headers) -> bool:
    """Return whether a page of another site sent the request.

    Browsers say so by Sec-Fetch-Site, but only to https and this machine; else by Origin, which they send with every
    request that changes something.
    """
    sites = headers.getlist("sec-fetch-site")
    if sites:
        return any(site not in ("same-origin", "none") for site in sites)
    hosts = headers.getlist("host")
    own = [f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")] if len(hosts) == 1 else []
    return any(origin.lower() not in own for origin in headers.getlist("origin"))


def _shows_token(authorization: str, token: str) -> bool:
    """Check ``Bearer TOKEN``, or for browsers ``Basic`` with the token as the password."""
    scheme, _, credentials = authorization.partition(" ")
    shown = b""
    if scheme.lower() == "bearer":
        shown = credentials.strip().encode()
    elif scheme.lower() == "basic":
        try:
            shown = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    return hmac.compare_digest(shown, token.encode())
