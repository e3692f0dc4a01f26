"""Errors that clients see: a fixed code and a fixed sentence, never the text of an exception."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Kind:
    status: int
    message: str


KINDS: dict[str, _Kind] = {
    "bad_request": _Kind(400, "The request could not be read."),
    "unauthorized": _Kind(401, "A valid token is needed."),
    "forbidden": _Kind(403, "Requests from other sites are refused."),
    "not_found": _Kind(404, "There is nothing here."),
    "unknown_embedding": _Kind(404, "The embedding is not known any more; send the image again."),
    "unknown_result": _Kind(404, "The result that a mask input refers to is not known any more."),
    "unknown_model": _Kind(404, "There is no such model here."),
    "method_not_allowed": _Kind(405, "This method is not allowed here."),
    "request_timeout": _Kind(408, "The request did not arrive in time."),
    "payload_too_large": _Kind(413, "The request is larger than the limit."),
    "image_too_large": _Kind(413, "The image has more pixels than the limit."),
    "unsupported_media_type": _Kind(415, "The content type or encoding of the request is not supported."),
    "unsupported_image": _Kind(415, "The image must be JPEG, PNG or WebP with 8 bits a channel."),
    "bad_image": _Kind(422, "The image is damaged, too long and thin, or of too many pieces."),
    "invalid_request": _Kind(422, "A value of the request is missing or not allowed."),
    "out_of_image": _Kind(422, "A point or a whole box lies outside the image."),
    "output_too_large": _Kind(422, "The masks have too many pixels for this output; ask for rle."),
    "internal": _Kind(500, "The server made a mistake."),
    "queue_full": _Kind(503, "The server is busy; try again later."),
    "not_ready": _Kind(503, "The server is starting."),
    "draining": _Kind(503, "The server is stopping."),
    "out_of_memory": _Kind(503, "The device ran out of memory; try again later or with less."),
    "model_failed": _Kind(503, "The model failed; the server is stopping."),
    "deadline_exceeded": _Kind(504, "The answer was not ready within the deadline."),
    "storage_full": _Kind(507, "The server has no room for the request; try again later."),
}


class ApiError(Exception):
    """End a request with one of :data:`KINDS`; ``where`` is the path to the value in the request."""

    def __init__(self, code: str, where: Sequence[str | int] | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.status = KINDS[code].status
        self.where = where

    def body(self, request_id: str) -> dict[str, Any]:
        error: dict[str, Any] = {"code": self.code, "message": KINDS[self.code].message}
        if self.where is not None:
            error["where"] = list(self.where)
        return {"error": error, "request_id": request_id}

    @property
    def headers(self) -> dict[str, str]:
        if self.code == "unauthorized":
            return {"WWW-Authenticate": 'Basic realm="token as password", charset="UTF-8"'}
        return {"Retry-After": "1"} if self.status in (503, 507) else {}
