"""``segment IMAGE``: masks for one prompt, as an overlay, as PNGs or in another format, and as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images.read import read_image
from ..masks.formats import FORMATS, MaskFormat, MaskSet, encode_masks
from ..masks.overlay import draw_overlay
from ..masks.results import MaskPrediction
from ..masks.rle_encode import encode
from ..modeling.promptable import PromptableModel
from ..prompts import wire
from ..system.atomic_write import write_atomically
from .model import model_from
from .parsers import mask_formats
from .provenance import Origin, Record
from .steps import Steps


@dataclass(frozen=True)
class _Target:
    """The names of the results of one image in a folder.

    Attributes:
        form: the format of the masks; None for a PNG per mask.
        masks: names of the files that hold them: one per mask, one in all, or none where the JSON does.
    """

    stem: str
    form: MaskFormat | None
    masks: list[str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Target:
        stem, form = Path(args.image).stem, mask_formats()[args.format]
        if form is None:
            return cls(stem, form, [f"{stem}_mask_{index}.png" for index in range(1 if args.single else 3)])
        return cls(stem, form, [] if form.is_json else [f"{stem}_masks{form.suffix}"])

    @property
    def overlay(self) -> str:
        return f"{self.stem}_overlay.png"

    @property
    def document(self) -> str:
        return f"{self.stem}.json"

    @property
    def results(self) -> list[str]:
        return [self.overlay, *self.masks, self.document]


def run(args: argparse.Namespace) -> None:
    """Segment one image and write its results."""
    prompt = wire.from_clicks(args.point, args.box)
    image = read_image(args.image, args.max_megapixels or None)
    out, target = Path(args.out), _Target.of(args)
    origin, record = Origin.of(Path(args.image), {"command": "segment"}), Record(out)
    for name in () if args.force else target.results:
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
            record.add(target.results, origin)
            records = _write_masks(prediction, target, out)
            best = int(prediction.iou_predictions[0].argmax())
            overlay = draw_overlay(image, prediction.masks[0, best : best + 1].cpu().numpy(), [prompt])
            with write_atomically(out / target.overlay) as partial:
                overlay.save(partial)
            document = {
                "image": {"file": Path(args.image).name, "height": image.shape[0], "width": image.shape[1]},
                "prompt": wire.to_dict(prompt),
                "model": _describe(model, args.checkpoint),
                "milliseconds": {name: round(ms, 1) for name, ms in steps.milliseconds.items()},
                **_object_score(prediction),
                "masks": records,
            }
            with write_atomically(out / target.document) as partial:
                partial.write_text(json.dumps(document, indent=2) + "\n")
    finally:
        steps.close()
    for index, mask in enumerate(records):
        mark = "  <- overlay" if index == best else ""
        print(f"mask {index}: predicted IoU {mask['predicted_iou']:.3f}, {mask['area']} px{mark}")
    for score in _object_score(prediction).values():
        print(f"object score {score:.2f}: {'seen' if score > 0 else 'not seen'}")
    print(f"wrote to {out}: {', '.join(target.results)}")


def _object_score(prediction: MaskPrediction) -> dict[str, float]:
    """Return the object score by its name in the document; none of SAM."""
    scores = prediction.object_scores
    return {} if scores is None else {"object_score": scores[0].item()}


def _write_masks(prediction: MaskPrediction, target: _Target, out: Path) -> list[dict[str, Any]]:
    """Write the files of the masks, and return their records for the document."""
    masks, predicted_iou = prediction.masks[0].cpu(), prediction.iou_predictions[0].cpu().numpy()
    rles, size = encode(masks), (masks.shape[1], masks.shape[2])
    in_document = target.form if target.form is not None and target.form.is_json else FORMATS["rle"]
    records = encode_masks(in_document, MaskSet(rles, size), predicted_iou.tolist())
    if target.form is None:
        for name, mask in zip(target.masks, masks.numpy(), strict=True):
            with write_atomically(out / name) as partial:
                Image.fromarray(mask.astype(np.uint8) * 255).save(partial)
        return [{"file": name, **record} for name, record in zip(target.masks, records, strict=True)]
    arrays = {"predicted_iou": predicted_iou[None]}
    if prediction.object_scores is not None:
        arrays["object_scores"] = prediction.object_scores.cpu().numpy()
    for name in target.masks:
        best = [rles[int(predicted_iou.argmax())]]
        content = target.form.encode(MaskSet(best if target.form.best_only else rles, size, arrays))
        assert isinstance(content, bytes)
        with write_atomically(out / name) as partial:
            partial.write_bytes(content)
    return records


def _describe(model: PromptableModel, checkpoint: str | None) -> dict[str, Any]:
    return {
        "variant": model.name,
        "checkpoint": checkpoint or "embedded",
        "model_hash": model.model_hash,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": model.resolved_kernels,
        "torch": torch.__version__,
    }
