"""``auto IMAGE_OR_FOLDER``: masks of everything in images, as PNGs with a table or in another format."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..amg.defaults import thresholds_of
from ..automatic_mask_generator import SamAutomaticMaskGenerator
from ..images.read import is_image_name, read_image
from ..masks import rle
from ..masks.formats import MaskFormat, encode_records
from ..masks.overlay import draw_overlay
from ..system.atomic_write import new_folder, write_atomically
from .model import model_from
from .parsers import AUTOMATIC_SETTINGS, mask_formats
from .provenance import RECORD, Origin, Record

# The columns of the official script's table.
_COLUMNS = (
    "id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y", "predicted_iou",
    "stability_score", "crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Segment every image of a folder; return 1 if some failed, else 0."""
    images = find_images(Path(args.source))
    out = Path(args.out)
    if out.resolve() == Path(args.source).resolve():
        raise ValueError(f"--out must be another folder than that of the images, got {out}")
    targets = {path: _Target(out, name, args) for path, name in images.items()}
    _check_distinct(targets)
    out.mkdir(parents=True, exist_ok=True)
    generator, settings = _generator(args)
    record = Record(out)
    if record.damaged:
        print(f"fastsam auto: {record.path}: skipped {record.damaged} damaged lines", file=sys.stderr)
    masks = done = skipped = failed = 0
    for path, target in tqdm(targets.items(), desc="auto", unit="image", disable=None, leave=False):
        try:
            origin = Origin.of(path, settings)
            if not args.force and target.is_finished(origin, record):
                skipped += 1
                continue
            image = read_image(path, args.max_megapixels or None)
            records = generator.generate(image)
            target.remove(record)
            record.add(target.results, origin)
            target.write(image, records)
        except (ValueError, OSError) as error:
            if args.traceback:
                raise
            failed += 1
            message = " ".join(str(error).split())
            where = "" if str(path) in message else f"{path}: "
            tqdm.write(f"fastsam auto: {where}{message}", file=sys.stderr)
        else:
            done += 1
            masks += len(records)
    if skipped:
        print(f"skipped {skipped}, whose results are in {out}; --force does them anew")
    if done or failed:
        print(f"{done} images, {masks} masks in {out}" + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def find_images(source: Path) -> dict[Path, str]:
    """Find the images of a folder, or the one image, each with a name of its own for its results.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without images.
    """
    if not source.is_dir():
        if not source.is_file():
            raise FileNotFoundError(f"no such image or folder: {source}")
        return {source: source.stem}
    paths = sorted(path for path in source.iterdir() if path.is_file() and is_image_name(path))
    if not paths:
        raise ValueError(f"no images in {source}")
    stems = Counter(path.stem.casefold() for path in paths)  # some file systems do not tell a from A
    return {path: path.stem if stems[path.stem.casefold()] == 1 else path.name for path in paths}


def _check_distinct(targets: dict[Path, _Target]) -> None:
    owners: dict[str, Path] = {}
    for path, target in targets.items():
        for result in target.results:
            if result.casefold() == RECORD:
                raise ValueError(f"the results of {path} would be called {result}, as the record of them is: rename it")
            other = owners.setdefault(result.casefold(), path)
            if other != path:
                raise ValueError(f"the results of {other} and {path} would both be called {result}: rename one")


def _generator(args: argparse.Namespace) -> tuple[SamAutomaticMaskGenerator, dict[str, Any]]:
    """Make the generator, and list all that its masks depend on besides the image."""
    model = model_from(args)
    suited = thresholds_of(model)
    settings = {
        name: suited.get(name, default) if (given := getattr(args, name)) is None else given
        for name, _, default, _ in AUTOMATIC_SETTINGS
    }
    generator = SamAutomaticMaskGenerator(model, **settings, output_mode="coco_rle", max_memory=args.max_memory)
    # A folder of PNGs and one JSON of run lengths have different names; other formats may share one with either.
    form = {} if args.format in ("png", "coco") else {"format": args.format}
    return generator, {"model_hash": model.model_hash, **settings, **form}


class _Target:
    """The results of one image in a folder. They appear under their names only when they are whole."""

    def __init__(self, out: Path, name: str, args: argparse.Namespace) -> None:
        self.out = out
        self._form = mask_formats()[args.format]
        self._masks = out / (name if self._form is None else name + self._form.suffix)
        self._overlay = out / f"{name}_overlay.png"
        self._results = [self._masks, self._overlay] if args.overlay else [self._masks]

    @property
    def results(self) -> list[str]:
        return [path.name for path in self._results]

    def is_finished(self, origin: Origin, record: Record) -> bool:
        """Return whether all results exist.

        Raises:
            ValueError: one has another origin, or none in the record.
        """
        for path in self._replaced(record):
            record.check(path, origin)
        return all(map(self._is_whole, self._results))

    def _is_whole(self, path: Path) -> bool:
        return (path / "metadata.csv" if self._is_folder(path) else path).is_file()

    def _is_folder(self, path: Path) -> bool:
        return path == self._masks and self._form is None

    def _replaced(self, record: Record) -> list[Path]:
        """List the files that new results replace: those of their names, and an earlier overlay of other masks.

        An overlay that is not asked for and not in the record as ours is somebody else's picture, and stays.
        """
        made = record.get(self._overlay.name)
        ours = made is not None and made.command == "auto"
        if self._overlay in self._results or not ours or not self._overlay.is_file():
            return self._results
        return [*self._results, self._overlay]

    def remove(self, record: Record) -> None:
        """Remove the files that new results replace.

        Raises:
            ValueError: a folder of that name holds something else; nothing was removed.
        """
        replaced = self._replaced(record)
        for path in replaced:
            known = self._is_folder(path) and (record.get(path.name) is not None or self._is_whole(path))
            if path.is_dir() and not known:
                raise ValueError(f"{path} is a folder of something else")
        for path in replaced:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if path not in self._results:
                record.forget(path.name)

    def write(self, image: np.ndarray, records: list[dict[str, Any]]) -> None:
        """Write the masks, and the overlay if there is to be one."""
        if self._overlay in self._results:
            with write_atomically(self._overlay) as partial:
                _draw(image, records).save(partial)
        if self._form is None:
            _write_pngs(records, self._masks)
        else:
            _write_file(self._form, records, image.shape[:2], self._masks)


def _write_file(form: MaskFormat, records: list[dict[str, Any]], size: tuple[int, ...], target: Path) -> None:
    masks = encode_records(form, records, (size[0], size[1]))
    with write_atomically(target) as partial:
        partial.write_bytes(masks if isinstance(masks, bytes) else (json.dumps(masks) + "\n").encode())


def _write_pngs(records: list[dict[str, Any]], target: Path) -> None:
    with new_folder(target) as folder, open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for number, record in enumerate(records):
            mask = rle.decode(record["segmentation"])
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}.png")
            numbers = (*rle.bounding_box(record["segmentation"]), *record["point_coords"][0], record["predicted_iou"])
            table.writerow((number, record["area"], *numbers, record["stability_score"], *record["crop_box"]))


def _draw(image: np.ndarray, records: list[dict[str, Any]]) -> Image.Image:
    """Draw the masks on the image, small ones over large ones."""
    order = sorted(records, key=lambda record: -record["area"])
    masks = np.zeros((len(order), *image.shape[:2]), bool)
    for mask, record in zip(masks, order, strict=True):
        mask[:] = rle.decode(record["segmentation"])
    return draw_overlay(image, masks)
