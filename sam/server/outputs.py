"""The masks of an answer in one of :data:`sam.masks.formats.FORMATS`, within the service's limit of pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from fastapi import Response

from ..engine import PromptMasks, TrackedFrame
from ..masks import rle
from ..masks.formats import MaskFormat, MaskSet, encode_masks, encode_records
from .errors import ApiError

Check = Callable[[], None]


def prompt_masks(
    answers: Sequence[PromptMasks], form: MaskFormat, size: tuple[int, int], max_pixels: int, check: Check
) -> bytes | list[dict[str, Any]]:
    """Return the masks of all prompts: one file, or one JSON record per prompt that names its best mask.

    Records of SAM 2 have the object score too, and a file of arrays all of them.

    Raises:
        ApiError: the format needs pixels, and the masks have more than ``max_pixels``.
    """
    if form.best_only:
        rles = [answer.rles[answer.best] for answer in answers]
    else:
        rles = [encoded for answer in answers for encoded in answer.rles]
    predicted_iou = np.stack([answer.predicted_iou for answer in answers])
    arrays, scores = {"predicted_iou": predicted_iou}, [answer.object_score for answer in answers]
    if None not in scores:
        arrays["object_scores"] = np.array(scores, np.float32)
    masks = MaskSet(rles, size, arrays, check)
    _check_pixels(form, len(rles), size, max_pixels)
    if not form.is_json:
        content = form.encode(masks)
        assert isinstance(content, bytes)
        return content
    records = encode_masks(form, masks, predicted_iou.flatten().tolist())
    ends = accumulate(len(answer.rles) for answer in answers)
    results: list[dict[str, Any]] = []
    for answer, end in zip(answers, ends, strict=True):
        results.append({"best": answer.best, "masks": records[end - len(answer.rles) : end]})
        if answer.object_score is not None:
            results[-1]["object_score"] = answer.object_score
    return results


def automatic_masks(
    records: Sequence[dict[str, Any]], form: MaskFormat, size: tuple[int, int], max_pixels: int, check: Check
) -> bytes | list[dict[str, Any]]:
    """Return the masks of everything: one file, or one JSON record per mask.

    Raises:
        ApiError: the format needs pixels, and the masks have more than ``max_pixels``.
    """
    _check_pixels(form, len(records), size, max_pixels)
    return encode_records(form, records, size, check)


def object_masks(answer: TrackedFrame, form: MaskFormat, max_pixels: int, check: Check) -> bytes | list[dict[str, Any]]:
    """Return the masks of a frame's objects: one file, or one JSON record per object.

    Args:
        answer: its run lengths are compressed.

    Raises:
        ApiError: the format needs pixels, and the masks have more than ``max_pixels``.
    """
    _check_pixels(form, len(answer.rles), answer.size, max_pixels)
    arrays = {"predicted_iou": answer.predicted_iou, "object_scores": answer.object_scores}
    masks = MaskSet(answer.rles, answer.size, {**arrays, "objects": np.array(answer.objects, np.str_)}, check)
    if not form.is_json:
        content = form.encode(masks)
        assert isinstance(content, bytes)
        return content
    listed = [{**encoded, "counts": rle.decompress(encoded["counts"])} for encoded in answer.rles]
    records = encode_masks(form, replace(masks, rles=listed), answer.predicted_iou.tolist())
    scores = answer.object_scores.tolist()
    return [
        {"id": name, **record, "object_score": score}
        for name, record, score in zip(answer.objects, records, scores, strict=True)
    ]


def response(
    form: MaskFormat,
    masks: bytes | list[dict[str, Any]],
    name: str,
    document: dict[str, Any],
    headers: dict[str, str],
) -> Response:
    """Answer with the file of the masks, or with a document that holds their records under ``name``."""
    content = masks if isinstance(masks, bytes) else json.dumps({**document, name: masks}, allow_nan=False)
    return Response(content, media_type=form.media_type, headers=headers)


def _check_pixels(form: MaskFormat, count: int, size: tuple[int, int], max_pixels: int) -> None:
    if form.needs_pixels and count * size[0] * size[1] > max_pixels:
        raise ApiError("output_too_large")
