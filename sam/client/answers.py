"""Answers of a service, checked before use: their parts are of the right kind and size, or it is not the service's."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..masks import rle
from ..masks.formats import MaskFormat
from ..prompts import wire

IDENTIFIER = re.compile(wire.IDENTIFIER)
_MAX_ERROR_TEXT, _MAX_PATH = 1000, 16


class ServiceError(RuntimeError):
    """Raised when the service refuses, or when something else answers: a proxy's page, for example.

    Attributes:
        status: status of HTTP.
        code: one of the service's fixed codes, for example ``queue_full``; ``unknown`` if something else answered.
        request_id: id in the service's log; ``unknown`` if something else answered.
        where: path to the refused value, for example ``("prompts", 0, "points", 1)``; empty if there is none.
    """

    def __init__(self, status: int, code: str, message: str, request_id: str, where: Sequence[str | int] = ()) -> None:
        place = f" At {'.'.join(map(str, where))}." if where else ""
        super().__init__(f"{code} ({status}): {message}{place} [request {request_id}]")
        self.status, self.code, self.request_id, self.where = status, code, request_id, tuple(where)


@dataclass(frozen=True)
class Answer:
    """One answer of HTTP, whoever gave it."""

    status: int
    media_type: str
    content: bytes

    def json(self) -> Any:
        """Return the document that it is."""
        return json.loads(self.content)


@dataclass(frozen=True)
class RemoteImage:
    """An image that the service has embedded, of ``height`` x ``width`` pixels."""

    embedding: str
    height: int
    width: int


def possible_sizes(data: bytes) -> set[tuple[int, int]] | None:
    """Return (height, width) as stored and turned by a quarter; None if it cannot be read as an image here."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {image.size, image.size[::-1]}
    except Exception:
        return None


def read_refusal(answer: Answer) -> ServiceError:
    """Return the error that a refusal describes."""
    document = a_dict(answer.json())
    return read_error(document["error"], answer.status, document["request_id"])


def read_error(error: Any, status: int, request_id: Any) -> ServiceError:
    """Return the error that a part of a document describes."""
    error = a_dict(error)
    code, message = a_text(error["code"]), a_text(error["message"])
    return ServiceError(status, code, message, a_text(request_id), a_path(error.get("where", [])))


def read_file(answer: Answer, form: MaskFormat) -> bytes:
    """Return the file that an answer is."""
    if answer.media_type != form.media_type:
        raise ValueError(f"not of type {form.media_type}")
    return answer.content


def a_mask(record: Any, height: int, width: int) -> np.ndarray:
    """Return the mask [height, width] of a record.

    Its size is checked, and that its counts are not more than pixels, before anything of them is allocated. A string
    has no more characters than that either: those beyond a count's first stand for 16 pixels or more.
    """
    encoded = a_dict(a_dict(record)["segmentation"])
    pixels = height * width
    if encoded["size"] != [height, width] or len(encoded["counts"]) > pixels + 1:
        raise ValueError(f"no mask of an image of {height}x{width}")
    if not isinstance(encoded["counts"], str):
        encoded["counts"] = [a_count(count, 0) for count in encoded["counts"]]
    return rle.decode(encoded)


def a_dict(value: Any) -> dict[str, Any]:
    """Return ``value``, which must be an object of JSON."""
    if not isinstance(value, dict):
        raise TypeError("an object is missing")
    return value


def a_list(value: Any, most: int | None = None) -> list[Any]:
    """Return ``value``, which must be a list of at most ``most``."""
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise TypeError(f"a list of at most {most} is missing")
    return value


def a_text(value: Any) -> str:
    """Return ``value``, which must be a short text."""
    if not isinstance(value, str) or len(value) > _MAX_ERROR_TEXT:
        raise TypeError("a short text is missing")
    return value


def a_path(value: Any) -> list[str | int]:
    """Return ``value``, which must be a path in a document."""
    return [a_count(part, 0) if isinstance(part, int) else a_text(part) for part in a_list(value, _MAX_PATH)]


def a_count(value: Any, least: int, most: float = math.inf) -> int:
    """Return ``value``, which must be a whole number within limits."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a number within {least}..{most} is missing")
    return value


def a_number(value: Any) -> float:
    """Return ``value``, which must be a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number is missing")
    return float(value)
