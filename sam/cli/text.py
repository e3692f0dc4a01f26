"""``text IMAGE``: masks of what labels name, as an overlay and as COCO's JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..images.read import read_image
from ..masks.formats import FORMATS, MaskSet, encode_masks
from ..masks.overlay import draw_overlay
from ..masks.rle_encode import encode
from ..prompts.prompt import Prompt
from ..system.atomic_write import write_atomically
from ..text import TextMasks, load_detector, segment
from ..text.labels import normalized
from .model import model_from
from .provenance import Origin, Record
from .steps import Steps


def run(args: argparse.Namespace) -> None:
    """Find and segment the labels in one image, and write the results."""
    image = read_image(args.image, args.max_megapixels or None)
    out, stem = Path(args.out), Path(args.image).stem
    overlay, document = f"{stem}_text.png", f"{stem}_text.json"
    origin, record = Origin.of(Path(args.image), {"command": "text"}), Record(out)
    for name in () if args.force else (overlay, document):
        record.check(out / name, origin)

    steps = Steps(total=4)
    try:
        with steps.step("load detector"):
            detector = load_detector(args.detector, device=args.device)
        with steps.step("load model"):
            model = model_from(args)
        with steps.step("find and segment"):
            (found,) = segment(
                model,
                detector,
                [image],
                [[label for label, _ in args.label]],
                threshold=args.threshold,
                thresholds={label: own for label, own in args.label if own is not None},
                nms_thresh=args.nms_thresh,
                agnostic_nms=args.agnostic_nms,
                mask_nms_thresh=args.mask_nms_thresh,
                negative_labels=args.negative,
                within=None if args.within is None else [args.within],
            )
        with steps.step("write results"):
            out.mkdir(parents=True, exist_ok=True)
            record.add((overlay, document), origin)
            boxes = [Prompt(box=box) for box in found.boxes.cpu().numpy()]
            picture = draw_overlay(image, found.masks.cpu().numpy(), boxes, found.labels)
            with write_atomically(out / overlay) as partial:
                picture.save(partial)
            content = _coco(Path(args.image).name, image.shape[:2], [label for label, _ in args.label], found)
            with write_atomically(out / document) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n")
    finally:
        steps.close()
    for each in content["annotations"]:
        name = content["categories"][each["category_id"] - 1]["name"]
        print(f"{name}: score {each['score']:.3f}, predicted IoU {each['predicted_iou']:.3f}, {each['area']} px")
    print(f"{len(found)} objects; wrote to {out}: {overlay}, {document}")


def _coco(file: str, size: tuple[int, ...], labels: list[str], found: TextMasks) -> dict[str, Any]:
    """Return COCO's document of one image: its boxes are those of masks, and the detector's stand beside them."""
    masks = MaskSet(encode(found.masks.cpu()), (size[0], size[1]))
    records = encode_masks(FORMATS["rle"], masks, found.predicted_iou.tolist())
    own = zip(found.label_ids.tolist(), found.scores.tolist(), found.boxes.tolist(), records, strict=True)
    return {
        "images": [{"id": 1, "file_name": file, "height": size[0], "width": size[1]}],
        "categories": [{"id": place, "name": normalized(label)} for place, label in enumerate(labels, 1)],
        "annotations": [
            {
                "id": place,
                "image_id": 1,
                "category_id": label + 1,
                "iscrowd": 0,
                "score": score,
                "detected_box": box,
                **record,
            }
            for place, (label, score, box, record) in enumerate(own, 1)
        ],
    }
