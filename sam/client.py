"""A client of the service: an image is sent once, prompts name its embedding. Answers are checked before use."""

from __future__ import annotations

import http.client
import io
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .masks import rle
from .masks.formats import MaskFormat, find_format
from .prompts import wire
from .prompts.prompt import Prompt
from .system.timed_response import timed_response

T = TypeVar("T")
_IDENTIFIER = re.compile(wire.IDENTIFIER)
_MASKS_OF_A_PROMPT = 3
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
class _Answer:
    """One answer of HTTP, whoever gave it."""

    status: int
    media_type: str
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class RemoteImage:
    """An image that the service has embedded, of ``height`` x ``width`` pixels."""

    embedding: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class RemoteMasks:
    """The C masks of one prompt.

    Attributes:
        masks: [C, H, W] bool.
        predicted_iou: [C].
        best: index of the mask of the highest predicted IoU.
        reference: names that mask as ``mask_input`` of a later prompt; None if the service did not store it.
        object_score: a logit, above 0 where SAM 2 sees the object; None of SAM, which does not say.
    """

    masks: np.ndarray
    predicted_iou: np.ndarray
    best: int
    reference: dict[str, Any] | None
    object_score: float | None = None


class Client:
    """Send requests to a service; one client per thread.

    Every method raises :class:`ServiceError` when the service refuses, or something else answers for it, and
    ``OSError`` when it is not there, breaks off, or takes longer than ``timeout`` seconds for one whole answer.
    An answer of more than ``max_answer_bytes``, or whose masks are not of the image's size, is not the service's. One
    whose masks take more than ``max_mask_bytes``, one byte per pixel of each, is refused before any of them is decoded.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 60.0,
        max_answer_bytes: int = 2**28,
        max_mask_bytes: int = 2**31,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"url must be http://HOST[:PORT] or https://HOST[:PORT], got {url!r}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII characters")
        if not timeout > 0:  # NaN is not
            raise ValueError(f"timeout must be positive, got {timeout}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port)
        self._connection.response_class = self._response  # type: ignore[assignment]
        self._timeout, self._max_answer_bytes = timeout, max_answer_bytes
        self._max_mask_bytes = max_mask_bytes
        self._deadline = math.inf
        self._base = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def embed(self, image: str | os.PathLike[str] | bytes) -> RemoteImage:
        """Send an image, a file's path or its bytes: JPEG, PNG or WebP."""
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        boundary = secrets.token_hex(16)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        sizes = _possible_sizes(data)
        return self._post(
            "/v1/embed",
            body,
            f"multipart/form-data; boundary={boundary}",
            lambda answer: _read_image(answer.json(), sizes),
        )

    def segment(
        self, image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool = True
    ) -> list[RemoteMasks]:
        """Return the masks of each prompt.

        Args:
            prompts: as :class:`sam.Prompt`, or as a document
                ``{"points": [[x, y]], "labels": [1], "box": [...], "mask_input": reference}``.
        """
        return self._ask(
            "/v1/segment",
            _segment_request(image, prompts, multimask_output),
            lambda answer: self._read_prompts(answer.json(), image, len(prompts)),
        )

    def automatic(self, image: RemoteImage, **options: Any) -> list[dict[str, Any]]:
        """Return records of everything, as :class:`sam.SamAutomaticMaskGenerator` gives them, masks as [H, W] bool."""
        most = _MASKS_OF_A_PROMPT * int(options.get("points_per_side", 32)) ** 2
        request = {"embedding": image.embedding, **options}
        return self._ask("/v1/automatic", request, lambda answer: self._read_records(answer.json(), image, most))

    def segment_as(
        self, output: str, image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool = True
    ) -> bytes:
        """Return the masks of prompts in a format of :data:`sam.masks.formats.FORMATS`, as the service sent them.

        The content is a file, for JSON formats the whole answer; only its media type and size are checked.
        """
        form = find_format(output)
        request = {**_segment_request(image, prompts, multimask_output), "output": output}
        return self._ask("/v1/segment", request, lambda answer: _read_file(answer, form))

    def automatic_as(self, output: str, image: RemoteImage, **options: Any) -> bytes:
        """Return the masks of everything in a format, as :meth:`segment_as` does."""
        form = find_format(output)
        request = {"embedding": image.embedding, **options, "output": output}
        return self._ask("/v1/automatic", request, lambda answer: _read_file(answer, form))

    def ready(self) -> bool:
        """Return whether the service takes requests; False also when it cannot be reached."""
        try:
            return self._send("GET", "/v2/health/ready", None, {}).status == 200
        except (OSError, ServiceError):
            return False

    def close(self) -> None:
        """Close the connection; a later request opens a new one."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, path: str, request: dict[str, Any], read: Callable[[_Answer], T]) -> T:
        return self._post(path, json.dumps(request).encode(), "application/json", read)

    def _post(self, path: str, body: bytes, content_type: str, read: Callable[[_Answer], T]) -> T:
        answer = self._send("POST", path, body, {"Content-Type": content_type})
        try:
            if answer.status == 200:
                return read(answer)
            refusal = _read_refusal(answer)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, MemoryError) as problem:
            message = f"not an answer of the service: {answer.content[:100]!r}"
            raise ServiceError(answer.status, "unknown", message, "unknown") from problem
        raise refusal

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> _Answer:
        self._deadline = time.monotonic() + self._timeout
        for last in (False, True):
            try:
                self._connection.timeout = self._seconds_left()
                if self._connection.sock is None:
                    self._connection.connect()
                self._connection.sock.settimeout(self._seconds_left())
                self._connection.request(method, self._base + path, body, {**self._headers, **headers})
                answer = self._connection.getresponse()
                return _Answer(answer.status, answer.headers.get_content_type(), self._read(answer))
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._connection.close()  # the service ended an idle connection; asking again changes nothing there
                if last:
                    raise
            except TimeoutError as error:
                self._connection.close()
                raise TimeoutError(f"no whole answer within {self._timeout} s") from error
            except http.client.HTTPException as error:
                self._connection.close()
                there = f"{self._connection.host}:{self._connection.port}"
                raise ConnectionError(f"no whole answer of HTTP from {there}: {error!r}") from error
            except BaseException:
                self._connection.close()
                raise
        raise AssertionError

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        text = answer.read(self._max_answer_bytes + 1)
        if len(text) > self._max_answer_bytes:
            message = f"an answer of more than {self._max_answer_bytes} bytes: {text[:100]!r}"
            raise ServiceError(answer.status, "unknown", message, "unknown")
        if answer.length:  # a read of so many bytes takes an early end for the end
            raise http.client.IncompleteRead(b"", answer.length)
        return text

    def _read_prompts(self, answer: Any, image: RemoteImage, count: int) -> list[RemoteMasks]:
        prompts, result = _list(_dict(answer)["prompts"], count), answer["result"]
        if len(prompts) != count or not (result is None or _IDENTIFIER.fullmatch(result)):
            raise ValueError("not an answer to these prompts")
        all_records = [_list(_dict(prompt)["masks"], _MASKS_OF_A_PROMPT) for prompt in prompts]
        self._check_room(sum(map(len, all_records)), image)
        results = []
        for index, (prompt, records) in enumerate(zip(prompts, all_records, strict=True)):
            masks = np.stack([_mask(record, image) for record in records])
            scores = np.array([_number(record["predicted_iou"]) for record in records], np.float32)
            best = _count(prompt["best"], 0, len(records) - 1)
            reference = wire.mask_reference(result, index, best) if result else None
            object_score = prompt.get("object_score")
            if object_score is not None:
                object_score = _number(object_score)
            results.append(RemoteMasks(masks, scores, best, reference, object_score))
        return results

    def _read_records(self, answer: Any, image: RemoteImage, most: int) -> list[dict[str, Any]]:
        records = _list(_dict(answer)["masks"], most)
        self._check_room(len(records), image)
        return [_read_record(_dict(record), image) for record in records]

    def _check_room(self, count: int, image: RemoteImage) -> None:
        size = count * image.height * image.width
        if size > self._max_mask_bytes:
            message = f"{count} masks of {size} bytes in all, more than the limit of {self._max_mask_bytes}"
            raise ServiceError(200, "unknown", message, "unknown")

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _response(self, connection: socket.socket, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
        return timed_response(self._seconds_left, connection, *arguments, **options)


def _possible_sizes(data: bytes) -> set[tuple[int, int]] | None:
    """Return (height, width) as stored and turned by a quarter; None if it cannot be read as an image here."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {image.size, image.size[::-1]}
    except Exception:
        return None


def _segment_request(
    image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool
) -> dict[str, Any]:
    documents = [wire.to_dict(prompt) if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    return {"embedding": image.embedding, "prompts": documents, "multimask": multimask_output}


def _read_refusal(answer: _Answer) -> ServiceError:
    document = _dict(answer.json())
    error = _dict(document["error"])
    code, message, request_id = _text(error["code"]), _text(error["message"]), _text(document["request_id"])
    return ServiceError(answer.status, code, message, request_id, _path(error.get("where", [])))


def _read_file(answer: _Answer, form: MaskFormat) -> bytes:
    if answer.media_type != form.media_type:
        raise ValueError(f"not of type {form.media_type}")
    return answer.content


def _read_image(answer: Any, sizes: set[tuple[int, int]] | None) -> RemoteImage:
    handle, size = _dict(answer)["embedding"], _dict(answer["image"])
    height, width = (_count(size[name], 1) for name in ("height", "width"))
    if not _IDENTIFIER.fullmatch(handle) or (sizes is not None and (height, width) not in sizes):
        raise ValueError("not the image that was sent")
    return RemoteImage(handle, height, width)


def _read_record(record: dict[str, Any], image: RemoteImage) -> dict[str, Any]:
    _count(record["area"], 0, image.height * image.width)
    numbers = [*_list(record["bbox"], 4), *_list(record["crop_box"], 4), record["predicted_iou"]]
    numbers += [number for point in _list(record["point_coords"], 1) for number in _list(point, 2)]
    if record["stability_score"] is not None:
        numbers.append(record["stability_score"])
    for number in numbers:
        _number(number)
    return {**record, "segmentation": _mask(record, image)}


def _mask(record: Any, image: RemoteImage) -> np.ndarray:
    """Check the size, and that the counts are not more than pixels, before anything of them is allocated.

    A string has no more characters than that either: those beyond a count's first stand for 16 pixels or more.
    """
    encoded = _dict(_dict(record)["segmentation"])
    pixels = image.height * image.width
    if encoded["size"] != [image.height, image.width] or len(encoded["counts"]) > pixels + 1:
        raise ValueError(f"no mask of an image of {image.height}x{image.width}")
    if not isinstance(encoded["counts"], str):
        encoded["counts"] = [_count(count, 0) for count in encoded["counts"]]
    return rle.decode(encoded)


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object is missing")
    return value


def _list(value: Any, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise TypeError(f"a list of at most {most} is missing")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_ERROR_TEXT:
        raise TypeError("a short text is missing")
    return value


def _path(value: Any) -> list[str | int]:
    return [_count(part, 0) if isinstance(part, int) else _text(part) for part in _list(value, _MAX_PATH)]


def _count(value: Any, least: int, most: float = math.inf) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a number within {least}..{most} is missing")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number is missing")
    return float(value)
