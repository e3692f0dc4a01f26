"""``segment IMAGE``: masks for one prompt, as an overlay, as PNGs and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.read import MAX_MEGAPIXELS, read_image
from ..masks import rle
from ..masks.overlay import draw_overlay
from ..masks.results import MaskPrediction
from ..masks.rle_encode import encode
from ..modeling import Sam
from ..prompts.prompt import Prompt
from ..system.atomic_write import write_atomically
from .options import Steps, add_model_options, add_traceback_option, file_name, model_from
from .provenance import Origin, Record


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("segment", help="masks for clicks and boxes on one image")
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument(
        "--point",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y[,LABEL]",
        help="a click in pixels; label 1 (default) is the object, 0 the background; may be repeated",
    )
    parser.add_argument("--box", type=_box, metavar="X0,Y0,X1,Y1", help="a box in pixels")
    parser.add_argument("--single", action="store_true", help="one mask in place of three alternatives")
    parser.add_argument(
        "--out",
        type=file_name,
        default="out",
        metavar="DIR",
        help="folder for the results (default: out); those of this image's last run are replaced",
    )
    parser.add_argument("--force", action="store_true", help="replace also what something else than this image made")
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        metavar="N",
        help=f"refuse larger images (default: {MAX_MEGAPIXELS:g}; 0 lifts the limit)",
    )
    add_model_options(parser)
    add_traceback_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if not args.point and args.box is None:
        raise ValueError("nothing to segment: give --point X,Y or --box X0,Y0,X1,Y1")
    points, labels = None, None
    if args.point:
        points, labels = [p[:2] for p in args.point], [p[2] for p in args.point]
    prompt = Prompt(points, labels, args.box)
    image = read_image(args.image, args.max_megapixels or None)
    out = Path(args.out)
    stem = Path(args.image).stem
    mask_names = [f"{stem}_mask_{index}.png" for index in range(1 if args.single else 3)]
    results = [f"{stem}_overlay.png", *mask_names, f"{stem}.json"]
    origin, record = Origin.of(Path(args.image), {"command": "segment"}), Record(out)
    for name in () if args.force else results:
        record.check(out / name, origin)

    steps = Steps(total=4)
    try:
        with steps.step("load model"):
            model = model_from(args)
        with steps.step("encode image"):
            embedding = model.encode(image)
        with steps.step("predict masks"):
            prediction = model.predict(embedding, [prompt], multimask_output=not args.single)
        with steps.step("write results"):
            out.mkdir(parents=True, exist_ok=True)
            for name in record.results_of(origin.file, "segment"):
                (out / name).unlink(missing_ok=True)
                record.forget(name)
            record.add(results, origin)
            records = _write_masks(prediction, [out / name for name in mask_names])
            best = int(prediction.iou_predictions[0].argmax())
            overlay = draw_overlay(image, prediction.masks[0, best : best + 1].cpu().numpy(), [prompt])
            with write_atomically(out / f"{stem}_overlay.png") as partial:
                overlay.save(partial)
            document = {
                "image": {"file": Path(args.image).name, "height": image.shape[0], "width": image.shape[1]},
                "prompt": {"points": points, "labels": labels, "box": args.box},
                "model": _describe(model, args.checkpoint),
                "milliseconds": {name: round(ms, 1) for name, ms in steps.milliseconds.items()},
                "masks": records,
            }
            with write_atomically(out / f"{stem}.json") as partial:
                partial.write_text(json.dumps(document, indent=2) + "\n")
    finally:
        steps.close()
    for index, mask in enumerate(records):
        mark = "  <- overlay" if index == best else ""
        print(f"mask {index}: predicted IoU {mask['predicted_iou']:.3f}, {mask['area']} px{mark}")
    print(f"wrote to {out}: {', '.join(results)}")


def _write_masks(prediction: MaskPrediction, paths: list[Path]) -> list[dict[str, Any]]:
    masks = prediction.masks[0].cpu()
    records = []
    for index, (path, mask, encoded) in enumerate(zip(paths, masks, encode(masks), strict=True)):
        with write_atomically(path) as partial:
            Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(partial)
        records.append(
            {
                "file": path.name,
                "predicted_iou": float(prediction.iou_predictions[0, index]),
                "area": rle.area(encoded),
                "bbox": rle.bounding_box(encoded),
                "segmentation": {"size": encoded["size"], "counts": rle.compress(encoded["counts"])},
            }
        )
    return records


def _describe(model: Sam, checkpoint: str | None) -> dict[str, Any]:
    return {
        "variant": model.name,
        "checkpoint": checkpoint or "embedded",
        "model_hash": model.model_hash,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": model.resolved_kernels,
        "torch": torch.__version__,
    }


def _numbers(text: str, counts: tuple[int, ...], form: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return values


def _point(text: str) -> tuple[float, float, int]:
    x, y, *label = _numbers(text, (2, 3), "X,Y or X,Y,LABEL")
    if label and label[0] not in (0, 1):
        raise argparse.ArgumentTypeError(f"the label in {text!r} must be 1 (object) or 0 (background)")
    return x, y, int(label[0]) if label else 1


def _box(text: str) -> list[float]:
    return _numbers(text, (4,), "X0,Y0,X1,Y1")
