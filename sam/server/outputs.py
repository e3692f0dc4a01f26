"""Masks in the forms that clients ask for. Masks come in as uncompressed run lengths."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

from .. import rle
from ..engine import PromptMasks
from ..polygons import multipolygon
from .errors import ApiError


def segmentations(encoded: Sequence[dict[str, Any]], output: str) -> list[dict[str, Any]]:
    """COCO's compressed RLEs, or multipolygons."""
    if output == "polygons":
        return [multipolygon(rle.decode(one)) for one in encoded]
    strings = rle.compress_all([one["counts"] for one in encoded])
    return [{"size": one["size"], "counts": string} for one, string in zip(encoded, strings, strict=True)]


def prompt_records(
    answers: Sequence[PromptMasks], output: str, size: tuple[int, int], max_pixels: int
) -> list[dict[str, Any]]:
    """For each prompt its masks, the best named."""
    if output == "polygons":
        _check_pixels(sum(len(answer.rles) for answer in answers), size, max_pixels)
    encoded = [{**one, "counts": np.array(one["counts"], np.int64)} for answer in answers for one in answer.rles]
    scores = [float(score) for answer in answers for score in answer.predicted_iou]
    masks = [
        {
            "segmentation": segmentation,
            "area": int(one["counts"][1::2].sum()),
            "bbox": rle.bounding_box(one),
            "predicted_iou": score,
        }
        for one, segmentation, score in zip(encoded, segmentations(encoded, output), scores, strict=True)
    ]
    ends = accumulate(len(answer.rles) for answer in answers)
    return [
        {"best": answer.best, "masks": masks[end - len(answer.rles) : end]}
        for answer, end in zip(answers, ends, strict=True)
    ]


def automatic_records(
    records: Sequence[dict[str, Any]], output: str, size: tuple[int, int], max_pixels: int
) -> list[dict[str, Any]]:
    """Return the generator's records with COCO's boxes; the stability of an empty mask, 0 / 0, is null."""
    if output == "polygons":
        _check_pixels(len(records), size, max_pixels)
    return [
        {
            **record,
            "segmentation": segmentation,
            "bbox": rle.bounding_box(record["segmentation"]),
            "stability_score": None if math.isnan(record["stability_score"]) else record["stability_score"],
        }
        for record, segmentation in zip(
            records, segmentations([record["segmentation"] for record in records], output), strict=True
        )
    ]


def label_png(encoded: Sequence[dict[str, Any]], size: tuple[int, int], max_pixels: int) -> bytes:
    """One picture: 0 is background, mask i is i + 1 and lies over those before it; a mask alone is 255.

    8 bits a pixel, 16 for more than 255 masks.
    """
    _check_pixels(len(encoded), size, max_pixels)
    labels = np.zeros(size, np.uint8 if len(encoded) <= 255 else np.uint16)
    for index, one in enumerate(encoded):
        labels[rle.decode(one)] = 255 if len(encoded) == 1 else index + 1
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def npz(encoded: Sequence[dict[str, Any]], size: tuple[int, int], max_pixels: int, **arrays: Any) -> bytes:
    """``masks`` [N, H, W] bool beside ``arrays``, compressed, without pickles."""
    _check_pixels(len(encoded), size, max_pixels)
    masks = np.zeros((len(encoded), *size), bool)
    for index, one in enumerate(encoded):
        masks[index] = rle.decode(one)
    file = io.BytesIO()
    np.savez_compressed(file, masks=masks, **arrays)
    return file.getvalue()


def _check_pixels(count: int, size: tuple[int, int], max_pixels: int) -> None:
    if count * size[0] * size[1] > max_pixels:
        raise ApiError("output_too_large")
