"""Evaluate weights on held-out scenes with prompts as people give them, beside two baselines without a network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..build_sam import load_model
from ..checkpoint import read_checkpoint
from ..images.prepare import resize_image
from ..masks.overlay import draw_overlay
from ..modeling.promptable import PromptableModel
from ..prompts.labels import LABEL_FOREGROUND, LABEL_PADDING
from ..prompts.prompt import Prompt
from ..prompts.tensors import box_labels
from ..system.atomic_write import write_atomically
from ..system.device_profile import device_profile
from .crops import CropModel
from .losses import mask_iou
from .prompts import append_clicks, random_clicks, tight_boxes, upsample
from .provenance import machine, revision
from .scenes import Scene, held_out_scene

MIN_PIXELS = 100  # visible pixels of an object that is prompted for
LARGE = 0.05  # share of the picture from which an object is large
CORRECTIONS = 3
_DISC_RADII = np.geomspace(3, 220, 40)
_SCENES_PER_TASK = 5  # that a process takes at a time

ROWS = {
    "click": "click, mask of highest predicted IoU",
    "click_best": "click, best of the three masks",
    "random_click": "click anywhere on the object, highest predicted IoU",
    "box": "box, single mask",
    "corrected": f"after {CORRECTIONS} corrective clicks, logits fed back",
    "disc": "baseline: best fixed disc at the click",
    "filled_box": "baseline: the filled box",
}


@dataclass
class Scores:
    """Collect the IoU of every object per kind of prompt, and |predicted - true| IoU of 4 masks per object."""

    ious: dict[str, list[float]] = field(default_factory=dict)
    iou_error: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)  # of the picture

    def add(self, name: str, values: Any) -> None:
        self.ious.setdefault(name, []).extend(float(value) for value in values)

    def extend(self, other: Scores) -> None:
        for name, values in other.ious.items():
            self.add(name, values)
        self.iou_error.extend(other.iou_error)
        self.share.extend(other.share)

    def table(self) -> dict[str, dict[str, float | None]]:
        """Return means over all objects and over the large ones, None where there is none, in ``ROWS``'s order."""
        large = np.array(self.share) >= LARGE
        table: dict[str, dict[str, float | None]] = {}
        for name in ROWS:
            values = np.array(self.ious[name])
            if name == "disc":  # [N, radii]: the radius that is best over all objects
                values = values.reshape(len(self.share), len(_DISC_RADII))
                values = values[:, values.mean(0).argmax()]
            table[name] = {
                "mean": float(values.mean()),
                "good": float((values >= 0.75).mean()),
                "large": float(values[large].mean()) if large.any() else None,
            }
        return table


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of the pixel of a mask, not empty, farthest from the background and the picture's border."""
    from scipy.ndimage import distance_transform_edt

    x0, y0, x1, y1 = _tight_box(mask)
    inside = np.pad(mask[y0:y1, x0:x1], 1)
    y, x = np.unravel_index(distance_transform_edt(inside).argmax(), inside.shape)
    return x0 + int(x) - 1, y0 + int(y) - 1


def disc_ious(mask: np.ndarray, center: tuple[int, int]) -> np.ndarray:
    """Return the IoU of ``mask`` with discs of ``_DISC_RADII`` at ``center``, cut off at the picture's border."""
    height, width = mask.shape
    x, y = center
    ring = _rings(max(mask.shape))
    reach = len(ring) // 2
    ring = ring[reach - y : reach - y + height, reach - x : reach - x + width]
    bins = len(_DISC_RADII) + 1
    disc = np.bincount(ring.ravel(), minlength=bins).cumsum()[:-1]
    overlap = np.bincount(ring[mask], minlength=bins).cumsum()[:-1]
    return overlap / (disc + mask.sum() - overlap)


@lru_cache
def _rings(reach: int) -> np.ndarray:
    """Return the index of the first disc that covers each of [2 * reach - 1, 2 * reach - 1] pixels about its centre."""
    offset = np.arange(1 - reach, reach)
    return np.searchsorted(_DISC_RADII, np.hypot(offset[None, :], offset[:, None])).astype(np.uint8)


def filled_box_iou(mask: np.ndarray) -> float:
    """Return the IoU of ``mask`` with its tight box, filled: the share of the box that the object covers."""
    x0, y0, x1, y1 = _tight_box(mask)
    return float(mask.sum() / ((x1 - x0) * (y1 - y0)))


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@torch.inference_mode()
def score_scene(model: PromptableModel, scene: Scene, index: int, scores: Scores) -> None:
    """Segment every object of ``scene`` from every kind of prompt, and add the scores."""
    masks = scene.masks(MIN_PIXELS)
    if not len(masks):
        return
    device = model.device
    crop = CropModel(model, model.image_size)
    pixels = torch.from_numpy(scene.image).to(device).permute(2, 0, 1).float()
    features = crop.encode(((pixels - model.pixel_mean) / model.pixel_std)[None])
    generator = torch.Generator(device).manual_seed(index)
    scores.share.extend((masks.mean((1, 2))).tolist())
    chunk_size = device_profile(device).scored_prompts
    for start in range(0, len(masks), chunk_size):
        chunk = masks[start : start + chunk_size]
        _score_objects(crop, features, chunk, torch.from_numpy(chunk).to(device), generator, scores)


def _score_objects(
    crop: CropModel, features: Tensor, masks: np.ndarray, truth: Tensor, generator: torch.Generator, scores: Scores
) -> None:
    device, count = truth.device, len(masks)
    centers = [deepest_point(mask) for mask in masks]
    scores.add("disc", np.concatenate([disc_ious(m, c) for m, c in zip(masks, centers, strict=True)]))
    scores.add("filled_box", [filled_box_iou(mask) for mask in masks])

    def click_prompts(clicks: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([LABEL_FOREGROUND, LABEL_PADDING], device=device).expand(count, 2)
        return torch.stack([clicks, torch.zeros_like(clicks)], 1), labels

    def predict(
        coords: Tensor, labels: Tensor, mask_slice: slice, mask_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [N, M, h, w], predicted IoU [N, M] and true IoU [N, M] of the masks of ``mask_slice``."""
        images = torch.zeros(count, dtype=torch.int64, device=device)
        logits, predicted = crop.decode(features, coords, labels, images, mask_inputs)
        logits, predicted = logits[:, mask_slice].float(), predicted[:, mask_slice].float()
        return logits, predicted, mask_iou(logits, truth)

    rows, single, alternatives = torch.arange(count, device=device), slice(0, 1), slice(1, None)
    coords, labels = click_prompts(_points(centers, device))
    logits, predicted, true = predict(coords, labels, alternatives)
    chosen = predicted.argmax(1)
    scores.add("click", true[rows, chosen])
    scores.add("click_best", true.amax(1))
    scores.iou_error.extend((predicted - true).abs().flatten().tolist())

    shown = logits[rows, chosen]
    for _ in range(CORRECTIONS):
        wrong = ((upsample(shown, crop.size) > 0) != truth).cpu().numpy()
        clicks = [deepest_point(w if w.any() else m) for w, m in zip(wrong, masks, strict=True)]
        coords, labels = append_clicks(coords, labels, _points(clicks, device), truth)
        logits, _, true = predict(coords, labels, single, shown)
        shown = logits[:, 0]
    scores.add("corrected", true[:, 0])

    _, predicted, true = predict(*click_prompts(random_clicks(truth, generator)), alternatives)
    scores.add("random_click", true[rows, predicted.argmax(1)])

    corners = tight_boxes(truth).view(count, 2, 2)
    _, predicted, true = predict(corners, box_labels(corners), single)
    scores.add("box", true[:, 0])
    scores.iou_error.extend((predicted - true).abs()[:, 0].tolist())


def _points(positions: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.tensor(positions, dtype=torch.float32, device=device)


def score_scenes(model: PromptableModel, indices: Iterable[int]) -> Scores:
    """Score all objects of held-out scenes."""
    scores = Scores()
    for index in indices:
        score_scene(model, held_out_scene(index), index, scores)
    return scores


_worker_model: PromptableModel | None = None  # of a process that scores


def _start_worker(checkpoint: Path) -> None:
    global _worker_model
    torch.set_num_threads(1)
    _worker_model = load_model(checkpoint, device="cpu", kernels="torch")


def _work(indices: range) -> Scores:
    assert _worker_model is not None
    return score_scenes(_worker_model, indices)


def evaluate(checkpoint: Path, scenes: int, device: torch.device, workers: int = 0) -> dict[str, Any]:
    """Return the table over the first ``scenes`` held-out scenes, and its provenance.

    Args:
        workers: processes of one thread each that share the scenes on a CPU; 0 for this one.
    """
    start, scores = time.perf_counter(), Scores()
    shares = [range(first, min(first + _SCENES_PER_TASK, scenes)) for first in range(0, scenes, _SCENES_PER_TASK)]
    if workers and device.type == "cpu":
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(checkpoint,))
        with pool:
            for partial in tqdm(pool.map(_work, shares), total=len(shares), disable=None):
                scores.extend(partial)
    else:
        model = load_model(checkpoint, device=device, kernels="torch")
        for share in tqdm(shares, disable=None):
            scores.extend(score_scenes(model, share))
    if not scores.share:
        raise ValueError(f"no object of {MIN_PIXELS} px in {scenes} scenes")
    return {
        "scenes": scenes,
        "objects": len(scores.share),
        "large objects": int((np.array(scores.share) >= LARGE).sum()),
        "table": scores.table(),
        "iou_error": float(np.mean(scores.iou_error)),
        "evaluation": {
            "seconds": round(time.perf_counter() - start, 1),
            "machine": machine(device),
            "processes": max(workers, 1),
            "revision": revision(),
            "torch": torch.__version__,
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"{result['objects']} objects of {MIN_PIXELS} px or more in {result['scenes']} held-out drawn scenes "
        f"of 512 px, {result['large objects']} of them over {LARGE:.0%} of the picture; parts count as objects. "
        "A click is on the deepest point of the object.",
        "",
        "| prompt | mean IoU | IoU >= 0.75 | mean IoU of large objects |",
        "|---|---|---|---|",
    ]
    for name, row in result["table"].items():
        large = "-" if row["large"] is None else f"{row['large']:.3f}"
        lines.append(f"| {ROWS[name]} | {row['mean']:.3f} | {row['good']:.0%} | {large} |")
    lines += ["", f"Mean absolute error of the predicted IoU: {result['iou_error']:.3f}.", ""]
    lines += [f"- {name}: {value}" for name, value in result["weights"].items()]
    lines += [f"- evaluation {name}: {value}" for name, value in result["evaluation"].items()]
    return "\n".join(lines) + "\n"


def evaluate_checkpoint(checkpoint: Path, scenes: int, device: torch.device, out: Path, workers: int = 0) -> str:
    """Measure ``checkpoint``; write ``<name>.evaluation.json``, ``.md``, ``.png`` into ``out``; return the Markdown."""
    result = evaluate(checkpoint, scenes, device, workers)
    model = load_model(checkpoint, device=device, kernels="torch")
    metadata = read_checkpoint(checkpoint).metadata
    result["weights"] = {"file": checkpoint.name, "model hash": model.model_hash, **metadata}
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    for suffix, content in (("json", json.dumps(result, indent=2) + "\n"), ("md", text)):
        with write_atomically(out / f"{checkpoint.stem}.evaluation.{suffix}") as partial:
            partial.write_text(content)
    with write_atomically(out / f"{checkpoint.stem}.evaluation.png") as partial:
        contact_sheet(model).save(partial)
    return text


def contact_sheet(model: PromptableModel, scenes: int = 12, columns: int = 4, tile: int = 256) -> Image.Image:
    """Draw held-out scenes in a grid, with masks of three objects each from a click, a click anywhere and a box."""
    sheet = Image.new("RGB", (columns * tile, -(-scenes // columns) * tile))
    for index in range(scenes):
        scene = held_out_scene(index)
        truth = scene.masks(MIN_PIXELS)
        rng = np.random.default_rng(index)
        picked = truth[rng.permutation(len(truth))[:3]]
        prompts, shown = [], []
        embedding = model.encode(scene.image)
        for kind, mask in enumerate(picked):
            if kind == 2:
                prompts.append(Prompt(box=_tight_box(mask)))
            else:
                points = np.argwhere(mask)[:, ::-1]
                place = deepest_point(mask) if kind == 0 else tuple(points[rng.integers(len(points))])
                prompts.append(Prompt(points=[place], labels=[1]))
        for prompt in prompts:
            answer = model.predict(embedding, [prompt], multimask_output=prompt.box is None)
            shown.append(answer.masks[0, int(answer.iou_predictions[0].argmax())].cpu().numpy())
        masks = np.stack(shown) if shown else np.zeros((0, *scene.ids.shape), bool)
        picture = np.asarray(draw_overlay(scene.image, masks, prompts))
        place = (index % columns * tile, index // columns * tile)
        sheet.paste(Image.fromarray(resize_image(picture, (tile, tile))), place)
    return sheet
