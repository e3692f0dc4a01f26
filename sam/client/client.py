"""A client of the service: an image is sent once, prompts name its embedding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..masks.formats import find_format
from ..prompts import wire
from ..prompts.prompt import Prompt
from .answers import (
    IDENTIFIER,
    RemoteImage,
    ServiceError,
    a_count,
    a_dict,
    a_list,
    a_mask,
    a_number,
    possible_sizes,
    read_file,
)
from .connection import Connection, content_of
from .video import RemoteVideo, open_video

_MASKS_OF_A_PROMPT = 3


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


class Client(Connection):
    """Send requests to a service; one client per thread.

    Every method raises :class:`ServiceError` when the service refuses, or something else answers for it, and
    ``OSError`` when it is not there, breaks off, or takes longer than ``timeout`` seconds for one whole answer.
    An answer of more than ``max_answer_bytes``, or whose masks are not of the image's size, is not the service's. One
    whose masks take more than ``max_mask_bytes``, one byte per pixel of each, is refused before any of them is decoded.
    """

    def embed(self, image: str | os.PathLike[str] | bytes) -> RemoteImage:
        """Send an image, a file's path or its bytes: JPEG, PNG or WebP."""
        data = content_of(image)
        sizes = possible_sizes(data)
        return self.send_file("/v1/embed", "image", data, {}, lambda answer: _read_image(answer.json(), sizes))

    def segment(
        self, image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool = True
    ) -> list[RemoteMasks]:
        """Return the masks of each prompt.

        Args:
            prompts: as :class:`sam.Prompt`, or as a document
                ``{"points": [[x, y]], "labels": [1], "box": [...], "mask_input": reference}``.
        """
        return self.ask(
            "/v1/segment",
            _segment_request(image, prompts, multimask_output),
            lambda answer: self._read_prompts(answer.json(), image, len(prompts)),
        )

    def automatic(self, image: RemoteImage, **options: Any) -> list[dict[str, Any]]:
        """Return records of everything, as :class:`sam.SamAutomaticMaskGenerator` gives them, masks as [H, W] bool."""
        most = _MASKS_OF_A_PROMPT * int(options.get("points_per_side", 32)) ** 2
        request = {"embedding": image.embedding, **options}
        return self.ask("/v1/automatic", request, lambda answer: self._read_records(answer.json(), image, most))

    def segment_as(
        self, output: str, image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool = True
    ) -> bytes:
        """Return the masks of prompts in a format of :data:`sam.masks.formats.FORMATS`, as the service sent them.

        The content is a file, for JSON formats the whole answer; only its media type and size are checked.
        """
        form = find_format(output)
        request = {**_segment_request(image, prompts, multimask_output), "output": output}
        return self.ask("/v1/segment", request, lambda answer: read_file(answer, form))

    def automatic_as(self, output: str, image: RemoteImage, **options: Any) -> bytes:
        """Return the masks of everything in a format, as :meth:`segment_as` does."""
        form = find_format(output)
        request = {"embedding": image.embedding, **options, "output": output}
        return self.ask("/v1/automatic", request, lambda answer: read_file(answer, form))

    def open_video(self, fill_hole_area: int = 8) -> RemoteVideo:
        """Open a session in which objects are tracked through the frames of a video; only SAM 2 can.

        Args:
            fill_hole_area: holes of up to so many low-resolution pixels are filled.
        """
        return open_video(self, fill_hole_area)

    def ready(self) -> bool:
        """Return whether the service takes requests; False also when it cannot be reached."""
        try:
            return self._send("GET", "/v2/health/ready", None, {}).status == 200
        except (OSError, ServiceError):
            return False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_prompts(self, answer: Any, image: RemoteImage, count: int) -> list[RemoteMasks]:
        prompts, result = a_list(a_dict(answer)["prompts"], count), answer["result"]
        if len(prompts) != count or not (result is None or IDENTIFIER.fullmatch(result)):
            raise ValueError("not an answer to these prompts")
        all_records = [a_list(a_dict(prompt)["masks"], _MASKS_OF_A_PROMPT) for prompt in prompts]
        self.check_room(sum(map(len, all_records)), image.height, image.width)
        results = []
        for index, (prompt, records) in enumerate(zip(prompts, all_records, strict=True)):
            masks = np.stack([a_mask(record, image.height, image.width) for record in records])
            scores = np.array([a_number(record["predicted_iou"]) for record in records], np.float32)
            best = a_count(prompt["best"], 0, len(records) - 1)
            reference = wire.mask_reference(result, index, best) if result else None
            object_score = prompt.get("object_score")
            if object_score is not None:
                object_score = a_number(object_score)
            results.append(RemoteMasks(masks, scores, best, reference, object_score))
        return results

    def _read_records(self, answer: Any, image: RemoteImage, most: int) -> list[dict[str, Any]]:
        records = a_list(a_dict(answer)["masks"], most)
        self.check_room(len(records), image.height, image.width)
        return [_read_record(a_dict(record), image) for record in records]


def _segment_request(
    image: RemoteImage, prompts: Sequence[Prompt | dict[str, Any]], multimask_output: bool
) -> dict[str, Any]:
    documents = [wire.to_dict(prompt) if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    return {"embedding": image.embedding, "prompts": documents, "multimask": multimask_output}


def _read_image(answer: Any, sizes: set[tuple[int, int]] | None) -> RemoteImage:
    handle, size = a_dict(answer)["embedding"], a_dict(answer["image"])
    height, width = (a_count(size[name], 1) for name in ("height", "width"))
    if not IDENTIFIER.fullmatch(handle) or (sizes is not None and (height, width) not in sizes):
        raise ValueError("not the image that was sent")
    return RemoteImage(handle, height, width)


def _read_record(record: dict[str, Any], image: RemoteImage) -> dict[str, Any]:
    a_count(record["area"], 0, image.height * image.width)
    numbers = [*a_list(record["bbox"], 4), *a_list(record["crop_box"], 4), record["predicted_iou"]]
    numbers += [number for point in a_list(record["point_coords"], 1) for number in a_list(point, 2)]
    if record["stability_score"] is not None:
        numbers.append(record["stability_score"])
    for number in numbers:
        a_number(number)
    return {**record, "segmentation": a_mask(record, image.height, image.width)}
