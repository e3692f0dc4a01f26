"""The report on a quantised model: measures beside those of bf16, gates, and pictures of the worst masks."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..amg.defaults import thresholds_of
from ..checks import require
from ..masks.overlay import draw_overlay
from ..modeling.promptable import PromptableModel
from ..prompts.prompt import Prompt
from ..system.atomic_write import write_atomically
from ..system.hardware import cpu_name
from .gates import GATES, Gate, Verdict, judge
from .measure import Measures, Sample, compare, measure
from .prompts import Answers, answer, boxes_of, grid_of_clicks

_PICTURES = 4
_COLUMNS = {
    "embedding, relative L2": "embedding",
    "SQNR, dB": "sqnr",
    "box masks, mean IoU": "box_iou",
    "5 %": "box_iou_p5",
    "least": "box_iou_least",
    "boundary IoU": "boundary_iou",
    "click masks, mean IoU": "click_iou",
    "best of three changed": "best_changed",
    "predicted IoU off by, mean": "drift",
    "most": "drift_most",
    "automatic, F1 at IoU 0.9": "automatic_f1",
    "count": "automatic_ratio",
    "crossed the threshold": "crossed",
}


class WorstMask(NamedTuple):
    """A mask of a box that differs, and where."""

    image: str
    prompt: Prompt
    iou: float
    ours: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Report:
    """The result of :func:`report`.

    Attributes:
        about: models, machine, versions and settings.
        rows: measures by the name of what was compared with the model: the scheme, and "bf16" alone.
        other_batch: distance of the quantised embedding from itself where images are encoded in other batches.
        verdicts: the gates.
        worst: the masks of boxes that differ most.
    """

    about: dict[str, Any]
    rows: dict[str, Measures]
    other_batch: float
    verdicts: list[Verdict]
    worst: list[WorstMask]

    @property
    def passed(self) -> bool:
        """Return whether every gate was passed."""
        return all(verdict.passed for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "passed": self.passed,
            "gates": [verdict.to_dict() for verdict in self.verdicts],
            "measures": {name: row.to_dict() for name, row in self.rows.items()},
            "other_batch": self.other_batch,
        }

    def to_markdown(self) -> str:
        """Return a page for people."""
        about, masks = self.about, next(iter(self.rows.values())).masks
        lines = [
            f"# Fidelity of {about['quantised']} to {about['model']}: {'passed' if self.passed else 'NOT PASSED'}",
            "",
            f"{about['images']} images, masks of {masks[0]} boxes and {masks[1] // 3} clicks, {masks[2]} automatic; "
            f"{about['machine']}, torch {about['torch']}, fastsam-kernels {about['fastsam-kernels']}, "
            f"{about['device']}, kernels {about['kernels']}.",
            "",
            "| measure | " + " | ".join(self.rows) + " |",
            "|---|" + "---:|" * len(self.rows),
        ]
        for title, name in _COLUMNS.items():
            values = (getattr(row, name) for row in self.rows.values())
            lines.append(f"| {title} | " + " | ".join(f"{value:.4g}" for value in values) + " |")
        lines += [
            "",
            f"The same images in other batches: {self.other_batch:.1e}.",
            "",
            "| gate | value | limit | |",
            "|---|---:|---:|---|",
        ]
        for verdict in self.verdicts:
            mark = "passed" if verdict.passed else "**not passed**"
            lines.append(f"| {verdict.name} | {verdict.value:.4g} | {verdict.limit:.4g} | {mark} |")
        lines += [""] + [f"![IoU {worst.iou:.4f}, {worst.image}]({_picture(i)})" for i, worst in enumerate(self.worst)]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, images: Mapping[str, np.ndarray]) -> None:
        """Write ``fidelity.json``, ``fidelity.md`` and a picture of each of the worst masks into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, worst in enumerate(self.worst):
            parts = np.stack([worst.truth & worst.ours, worst.truth & ~worst.ours, worst.ours & ~worst.truth])
            with write_atomically(folder / _picture(index)) as partial:
                draw_overlay(images[worst.image], parts, [worst.prompt]).save(partial)
        with write_atomically(folder / "fidelity.md") as partial:
            Path(partial).write_text(self.to_markdown())
        with write_atomically(folder / "fidelity.json") as partial:
            Path(partial).write_text(json.dumps(self.to_dict(), indent=1) + "\n")


@torch.no_grad()
def report(
    model: PromptableModel,
    quantized: PromptableModel,
    images: Mapping[str, np.ndarray],
    *,
    boxes: Mapping[str, Sequence[Prompt]] | None = None,
    gate: Gate | None = None,
    clicks_per_side: int = 4,
    points_per_side: int = 8,
    progress: Callable[[], object] = lambda: None,
) -> Report:
    """Measure how far a quantised model's answers are from the model's, beside those of the model in bf16.

    Prompts need no labels: a grid of clicks, the boxes of the masks that the model rates best for them unless others
    are given, and automatic masks. Images that the model knows nothing about say little.

    Args:
        model, quantized: as :func:`sam.quantize` takes and returns them.
        images: [H, W, 3] uint8 RGB by name.
        boxes: prompts of a box each, by the names of the images; None derives them.
        gate: its limits; None takes those of the scheme.
        clicks_per_side: clicks along a side of an image.
        points_per_side: clicks along a side for automatic masks.
        progress: called after each pass over an image, of three.

    Raises:
        ValueError: no image, or a model that is not quantised.
    """
    require("images", images, Mapping, "a mapping from names to images")
    if not images:
        raise ValueError("images must be at least one, got none")
    scheme = quantized.quantization
    if scheme is None:
        raise ValueError("the second model is not quantised: sam.quantize makes one that is")
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    threshold = thresholds_of(model)["pred_iou_thresh"]
    samples: dict[str, list[Sample]] = {scheme: [], "bf16": []}
    embeddings: list[Tensor] = []
    worst: list[WorstMask] = []
    for name, image in images.items():
        clicks = grid_of_clicks(image, clicks_per_side)
        asked = boxes_of(model, model.encode(image), clicks) if boxes is None else boxes[name]
        truth = answer(model, image, clicks, asked, points_per_side)
        progress()
        for row, each in ((scheme, quantized), ("bf16", narrow)):
            answers = answer(each, image, clicks, asked, points_per_side)
            samples[row].append(compare(truth, answers, threshold))
            if row == scheme:
                embeddings.append(answers.embedding)
                worst = _worst([*worst, *_masks_of_boxes(name, asked, samples[row][-1], truth, answers)])
            progress()
    rows = {name: measure(of_row) for name, of_row in samples.items()}
    settings = {"clicks_per_side": clicks_per_side, "points_per_side": points_per_side}
    return Report(
        _about(model, quantized, images, settings),
        rows,
        _other_batch(quantized, images, embeddings),
        judge(rows[scheme], rows["bf16"], gate or GATES[scheme]),
        worst,
    )


def _about(
    model: PromptableModel, quantized: PromptableModel, images: Mapping[str, np.ndarray], settings: dict[str, int]
) -> dict[str, Any]:
    on_gpu = model.device.type == "cuda"
    try:
        version = metadata.version("fastsam-kernels")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "model": model.name,
        "model_hash": model.model_hash,
        "quantised": quantized.name,
        "quantised_hash": quantized.model_hash,
        "scheme": quantized.quantization,
        "images": len(images),
        **settings,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernels": quantized.resolved_kernels,
        "machine": torch.cuda.get_device_name(model.device) if on_gpu else cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastsam-kernels": version,
    }


def _other_batch(quantized: PromptableModel, images: Mapping[str, np.ndarray], alone: list[Tensor]) -> float:
    """Return the largest distance of an embedding where images are encoded in pairs, the last ones first."""
    embeddings = quantized.encode(list(images.values())[::-1], batch_size=2)[::-1]
    pairs = zip(embeddings, alone, strict=True)
    return max(float((x.features.float().cpu() - a).norm() / a.norm()) for x, a in pairs)


def _masks_of_boxes(
    image: str, boxes: Sequence[Prompt], sample: Sample, truth: Answers, answers: Answers
) -> Iterator[WorstMask]:
    for row, iou in enumerate(sample.box_iou.tolist()):
        yield WorstMask(image, boxes[row], iou, answers.box_masks[row].numpy(), truth.box_masks[row].numpy())


def _worst(masks: list[WorstMask]) -> list[WorstMask]:
    chosen = sorted(masks, key=lambda mask: mask.iou)[:_PICTURES]
    return [mask._replace(ours=mask.ours.copy(), truth=mask.truth.copy()) for mask in chosen]  # views hold all others


def _picture(index: int) -> str:
    return f"worst_{index + 1}.png"
