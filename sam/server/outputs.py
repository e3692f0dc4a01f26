"""Masks in the forms that clients ask for. Masks come in as uncompressed run lengths.

Each form is made mask by mask, and large ones in strips: ``check``, called between them, may end it by raising.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

from ..engine import PromptMasks
from ..masks import rle
from ..masks.polygons import multipolygon
from .errors import ApiError

Check = Callable[[], None]
# Of a mask, or of run lengths, that are compressed at once.
_STRIP_BYTES, _MANY_RUNS = 2**21, 2**18


def segmentations(encoded: Sequence[dict[str, Any]], output: str, check: Check) -> list[dict[str, Any]]:
    """COCO's compressed RLEs, or multipolygons."""
    if output == "polygons":
        return [multipolygon(mask) for mask in _masks(encoded, check)]
    strings: list[str] = []
    counts: list[Sequence[int]] = []
    for index, one in enumerate(encoded, 1):
        counts.append(one["counts"])
        if index == len(encoded) or sum(map(len, counts)) > _MANY_RUNS:
            check()
            strings += rle.compress_all(counts)
            counts = []
    return [{"size": one["size"], "counts": string} for one, string in zip(encoded, strings, strict=True)]


def _masks(encoded: Sequence[dict[str, Any]], check: Check) -> Iterator[np.ndarray]:
    for one in encoded:
        check()
        yield rle.decode(one)


def prompt_records(
    answers: Sequence[PromptMasks], output: str, size: tuple[int, int], max_pixels: int, check: Check
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
        for one, segmentation, score in zip(encoded, segmentations(encoded, output, check), scores, strict=True)
    ]
    ends = accumulate(len(answer.rles) for answer in answers)
    return [
        {"best": answer.best, "masks": masks[end - len(answer.rles) : end]}
        for answer, end in zip(answers, ends, strict=True)
    ]


def automatic_records(
    records: Sequence[dict[str, Any]], output: str, size: tuple[int, int], max_pixels: int, check: Check
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
            records, segmentations([record["segmentation"] for record in records], output, check), strict=True
        )
    ]


def label_png(encoded: Sequence[dict[str, Any]], size: tuple[int, int], max_pixels: int, check: Check) -> bytes:
    """One picture: 0 is background, mask i is i + 1 and lies over those before it; a mask alone is 255.

    8 bits a pixel, 16 for more than 255 masks.
    """
    _check_pixels(len(encoded), size, max_pixels)
    labels = np.zeros(size, np.uint8 if len(encoded) <= 255 else np.uint16)
    for index, mask in enumerate(_masks(encoded, check)):
        labels[mask] = 255 if len(encoded) == 1 else index + 1
    file = _CheckedFile(check)
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


class _CheckedFile(io.BytesIO):
    """A file in memory that whoever writes to it can be stopped by."""

    def __init__(self, check: Check) -> None:
        super().__init__()
        self._check = check

    def write(self, data: Any) -> int:
        self._check()
        return super().write(data)


def npz(
    encoded: Sequence[dict[str, Any]], size: tuple[int, int], max_pixels: int, check: Check, **arrays: np.ndarray
) -> bytes:
    """``masks`` [N, H, W] bool beside ``arrays``, compressed, without pickles; never all of the masks at once."""
    _check_pixels(len(encoded), size, max_pixels)
    height, width = size
    rows = max(1, _STRIP_BYTES // width)
    head = {"descr": "|b1", "fortran_order": False, "shape": (len(encoded), height, width)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("masks.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, head)
            for mask in _masks(encoded, check):
                for top in range(0, height, rows):
                    check()
                    entry.write(mask[top : top + rows].tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return file.getvalue()


def _check_pixels(count: int, size: tuple[int, int], max_pixels: int) -> None:
    if count * size[0] * size[1] > max_pixels:
        raise ApiError("output_too_large")
