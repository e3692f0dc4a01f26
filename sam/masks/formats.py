"""The forms in which masks leave the project: one table for the command line, the service and the client."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from . import rle
from .polygons import multipolygon

JSON = "application/json"
# Bytes of a mask, and run lengths, that are compressed between two calls of ``check``.
_STRIP_BYTES, _MAX_RUNS = 2**21, 2**18


def _no_check() -> None:
    pass


@dataclass(frozen=True)
class MaskSet:
    """N masks of one image, to be written in one of :data:`FORMATS`.

    Attributes:
        rles: N run-length encodings, uncompressed or compressed, see :mod:`sam.masks.rle`.
        size: (height, width) of the image.
        arrays: values beside the masks, by name; only formats that hold arrays write them.
        check: called between masks, and between strips of large ones; the encoding ends with what it raises.
    """

    rles: Sequence[dict[str, Any]]
    size: tuple[int, int]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    check: Callable[[], None] = _no_check

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each mask as [H, W] bool, never more than one at a time."""
        for encoded in self.rles:
            self.check()
            yield rle.decode(encoded)


@dataclass(frozen=True)
class MaskFormat:
    """One form of masks.

    Attributes:
        name: the name in requests, options and arguments.
        description: a few words for a list of formats.
        suffix: suffix of a file that holds it.
        media_type: media type of an answer that holds it; :data:`JSON` if masks are values of a document.
        encode: Return the bytes of one file; with media type :data:`JSON`, a list of one JSON value per mask.
        needs_pixels: masks are decoded, so the work grows with their pixels; otherwise only with their runs.
        best_only: it has room for one mask per prompt.
    """

    name: str
    description: str
    suffix: str
    media_type: str
    encode: Callable[[MaskSet], bytes | list[Any]]
    needs_pixels: bool = True
    best_only: bool = False

    @property
    def is_json(self) -> bool:
        """Return whether the masks are part of a JSON document, one value per mask."""
        return self.media_type == JSON


def find_format(name: str) -> MaskFormat:
    """Return the format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def encode_masks(form: MaskFormat, masks: MaskSet, predicted_iou: Sequence[float]) -> list[dict[str, Any]]:
    """Return one JSON record per mask, from uncompressed run lengths: its form, area, COCO's box and predicted IoU."""
    counts = [np.array(encoded["counts"], np.int64) for encoded in masks.rles]
    rles = [{**encoded, "counts": array} for encoded, array in zip(masks.rles, counts, strict=True)]
    return [
        {
            "segmentation": segmentation,
            "area": int(encoded["counts"][1::2].sum()),
            "bbox": rle.bounding_box(encoded),
            "predicted_iou": float(score),
        }
        for encoded, segmentation, score in zip(
            rles, form.encode(replace(masks, rles=rles)), predicted_iou, strict=True
        )
    ]


def encode_records(
    form: MaskFormat, records: Sequence[dict[str, Any]], size: tuple[int, int], check: Callable[[], None] = _no_check
) -> bytes | list[dict[str, Any]]:
    """Return the records of a mask generator with their masks in a form, or the file of all masks.

    Args:
        records: their ``segmentation`` is a run-length encoding of either kind.

    Returns:
        for JSON the records in their order, with COCO's boxes; the stability of an empty mask, 0 / 0, is null. Else
        the file, small masks last, so that a picture shows them.
    """
    if not form.is_json:
        records = sorted(records, key=lambda record: -record["area"])
    encoded = form.encode(MaskSet([record["segmentation"] for record in records], size, check=check))
    if not form.is_json:
        assert isinstance(encoded, bytes)
        return encoded
    return [
        {
            **record,
            "segmentation": segmentation,
            "bbox": rle.bounding_box(record["segmentation"]),
            "stability_score": None if math.isnan(record["stability_score"]) else record["stability_score"],
        }
        for record, segmentation in zip(records, encoded, strict=True)
    ]


def compressed_rles(masks: MaskSet) -> list[dict[str, Any]]:
    """Encode masks as COCO's compressed RLEs; those that are compressed stay as they are."""
    if all(isinstance(encoded["counts"], str) for encoded in masks.rles):
        return [dict(encoded) for encoded in masks.rles]
    strings: list[str] = []
    counts: list[Sequence[int]] = []
    for index, encoded in enumerate(masks.rles, 1):
        counts.append(encoded["counts"])
        if index == len(masks.rles) or sum(map(len, counts)) > _MAX_RUNS:
            masks.check()
            strings += rle.compress_all(counts)
            counts = []
    return [{"size": encoded["size"], "counts": text} for encoded, text in zip(masks.rles, strings, strict=True)]


def multipolygons(masks: MaskSet) -> list[dict[str, Any]]:
    """Encode masks as GeoJSON-style multipolygons."""
    return [multipolygon(mask) for mask in masks]


def label_png(masks: MaskSet) -> bytes:
    """Draw one picture: 0 is background, mask i is i + 1 and lies over those before it; a mask alone is 255.

    8 bits per pixel, 16 for more than 255 masks.
    """
    count = len(masks.rles)
    labels = np.zeros(masks.size, np.uint8 if count <= 255 else np.uint16)
    for index, mask in enumerate(masks):
        labels[mask] = 255 if count == 1 else index + 1
    file = _CheckedFile(masks.check)
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


class _CheckedFile(io.BytesIO):
    """A file in memory that calls ``check`` before each write."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def write(self, data: Any) -> int:
        self._check()
        return super().write(data)


def npz(masks: MaskSet) -> bytes:
    """Write ``masks`` [N, H, W] bool and ``arrays``, compressed and without pickles; one mask in memory at a time."""
    height, width = masks.size
    rows = max(1, _STRIP_BYTES // width)
    head = {"descr": "|b1", "fortran_order": False, "shape": (len(masks.rles), height, width)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("masks.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, head)
            for mask in masks:
                for top in range(0, height, rows):
                    masks.check()
                    entry.write(mask[top : top + rows].tobytes())
        for name, array in masks.arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return file.getvalue()


FORMATS: dict[str, MaskFormat] = {
    entry.name: entry
    for entry in (
        MaskFormat("rle", "COCO's compressed run lengths", ".json", JSON, compressed_rles, needs_pixels=False),
        MaskFormat("png", "one picture of labels", ".png", "image/png", label_png, best_only=True),
        MaskFormat("polygons", "multipolygons in pixels", ".json", JSON, multipolygons),
        MaskFormat("npz", "NumPy arrays", ".npz", "application/octet-stream", npz),
    )
}
