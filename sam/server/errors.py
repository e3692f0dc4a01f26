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
    "unknown_session": _Kind(404, "There is no such session any more; it was closed, or nobody used it for long."),
    "unknown_frame": _Kind(404, "The masks of this frame are not there, or not any more."),
    "unknown_object": _Kind(404, "The session has no such object."),
    "method_not_allowed": _Kind(405, "This method is not allowed here."),
    "request_timeout": _Kind(408, "The request did not arrive in time."),
    "wrong_frame": _Kind(409, "The frame is not the session's next one, or it went by."),
    "session_busy": _Kind(409, "The session is tracking a video; wait for its end, or close it."),
    "payload_too_large": _Kind(413, "The request is larger than the limit."),
    "image_too_large": _Kind(413, "The image has more pixels than the limit."),
    "video_too_large": _Kind(413, "The video's frames have more pixels than the limit."),
    "unsupported_media_type": _Kind(415, "The content type or encoding of the request is not supported."),
    "unsupported_image": _Kind(415, "The image must be JPEG, PNG or WebP with 8 bits a channel."),
    "unsupported_video": _Kind(415, "The video must be MP4, MOV, MKV, WebM or AVI, of a common codec."),
    "no_video_files": _Kind(415, "This service reads no video files, for want of PyAV; send their frames."),
    "bad_image": _Kind(422, "The image is damaged, too long and thin, or of too many pieces."),
    "bad_video": _Kind(422, "The video is damaged at this frame; those before it were tracked."),
    "invalid_request": _Kind(422, "A value of the request is missing or not allowed."),
    "out_of_image": _Kind(422, "A point or a whole box lies outside the image."),
    "output_too_large": _Kind(422, "The masks have too many pixels for this output; ask for rle."),
    "session_full": _Kind(422, "The session holds as many objects, prompts or bytes as it may."),
    "cannot_track": _Kind(422, "This model cannot track: it is of images alone. Serve a checkpoint of SAM 2."),
    "internal": _Kind(500, "The server made a mistake."),
    "queue_full": _Kind(503, "The server is busy; try again later."),
    "too_many_sessions": _Kind(503, "As many sessions are open as there may be; close one, or try again later."),
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
