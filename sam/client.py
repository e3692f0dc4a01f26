"""A client of the service, on the standard library: an image is sent once, prompts name its embedding."""

from __future__ import annotations

import http.client
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from . import rle

T = TypeVar("T")


class ServiceError(RuntimeError):
    """The service refused, or the answer is none of the service's: a proxy's page, for example.

    Attributes:
        status: of HTTP.
        code: one of the service's fixed codes, for example ``queue_full``; ``unknown`` when it is none of its answers.
        request_id: to be found in the service's log; ``unknown`` as well.
    """

    def __init__(self, status: int, code: str, message: str, request_id: str) -> None:
        super().__init__(f"{code} ({status}): {message} [request {request_id}]")
        self.status, self.code, self.request_id = status, code, request_id


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
        best: place of the mask of the highest predicted IoU.
        reference: of that mask, to be given as ``mask_input`` of a next prompt; None if it was not kept.
    """

    masks: np.ndarray
    predicted_iou: np.ndarray
    best: int
    reference: dict[str, Any] | None


class Client:
    """Asks a service; not for sharing between threads.

    Every method raises :class:`ServiceError` when the service refuses, or something else answers for it, and
    ``OSError`` when it is not there or breaks off.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"url must be http://HOST[:PORT] or https://HOST[:PORT], got {url!r}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout)
        self._base = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def embed(self, image: str | os.PathLike[str] | bytes) -> RemoteImage:
        """Send an image, a file's path or its bytes: JPEG, PNG or WebP."""
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        boundary = secrets.token_hex(16)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        return self._post("/v1/embed", body, f"multipart/form-data; boundary={boundary}", _read_image)

    def segment(
        self, image: RemoteImage, prompts: Sequence[dict[str, Any]], multimask_output: bool = True
    ) -> list[RemoteMasks]:
        """Masks for each prompt: ``{"points": [[x, y]], "labels": [1], "box": [...], "mask_input": reference}``."""
        question = {"embedding": image.embedding, "prompts": list(prompts), "multimask": multimask_output}
        return self._ask("/v1/segment", question, _read_prompts)

    def automatic(self, image: RemoteImage, **options: Any) -> list[dict[str, Any]]:
        """Records of everything, as :class:`sam.SamAutomaticMaskGenerator` gives them, masks as [H, W] bool."""
        return self._ask("/v1/automatic", {"embedding": image.embedding, **options}, _read_records)

    def ready(self) -> bool:
        """Whether the service takes requests; False also when it cannot be reached."""
        try:
            return self._send("GET", "/v2/health/ready", None, {})[0] == 200
        except OSError:
            return False

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, path: str, question: dict[str, Any], read: Callable[[Any], T]) -> T:
        return self._post(path, json.dumps(question).encode(), "application/json", read)

    def _post(self, path: str, body: bytes, kind: str, read: Callable[[Any], T]) -> T:
        status, text = self._send("POST", path, body, {"Content-Type": kind})
        try:
            answer = json.loads(text)
            if status == 200:
                return read(answer)
            error = answer["error"]
            refusal = ServiceError(status, error["code"], error["message"], answer["request_id"])
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as problem:
            message = f"not an answer of the service: {text[:100]!r}"
            raise ServiceError(status, "unknown", message, "unknown") from problem
        raise refusal

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        for last in (False, True):
            try:
                self._connection.request(method, self._base + path, body, {**self._headers, **headers})
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self._connection.close()  # the service ended an idle connection; asking again changes nothing there
                if last:
                    raise
            except http.client.HTTPException as error:
                self._connection.close()
                there = f"{self._connection.host}:{self._connection.port}"
                raise ConnectionError(f"no whole answer of HTTP from {there}: {error!r}") from error
            except BaseException:
                self._connection.close()
                raise
        raise AssertionError


def _read_image(answer: Any) -> RemoteImage:
    return RemoteImage(answer["embedding"], answer["image"]["height"], answer["image"]["width"])


def _read_prompts(answer: Any) -> list[RemoteMasks]:
    results = []
    for index, prompt in enumerate(answer["prompts"]):
        masks = np.stack([rle.decode(mask["segmentation"]) for mask in prompt["masks"]])
        scores = np.array([mask["predicted_iou"] for mask in prompt["masks"]], np.float32)
        best = prompt["best"]
        reference = {"result": answer["result"], "prompt": index, "mask": best} if answer["result"] else None
        results.append(RemoteMasks(masks, scores, best, reference))
    return results


def _read_records(answer: Any) -> list[dict[str, Any]]:
    return [{**record, "segmentation": rle.decode(record["segmentation"])} for record in answer["masks"]]
