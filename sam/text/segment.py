"""Labels to masks of many images: boxes of a detector, each a prompt of one call of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import naming, require, require_model
from ..embedding import ImageEmbedding
from ..images.prepare import CheckedImage
from ..masks.results import MaskPrediction
from ..modeling.promptable import PromptableModel
from ..prompts.prompt import Prompt
from .detections import (
    Detections,
    Detector,
    above,
    centred_within,
    clipped,
    distinct_masks,
    ordered,
    suppressed,
    unbeaten,
)
from .labels import Thresholds, check_labels, check_share


@dataclass(frozen=True, eq=False)
class TextMasks:
    """The N objects of an image's labels, by label and then by falling score.

    Attributes:
        embedding: the image's handle, for clicks that correct a mask.
        labels: N labels, as they were given.
        label_ids: [N] int64, their places in the image's list.
        boxes: [N, 4] fp32 as x0, y0, x1, y1 in pixels, as the detector found them, inside the image.
        scores: [N] fp32, the detector's own; how it makes them is the detector's to say.
        masks: [N, H, W] bool.
        predicted_iou: [N] fp32, the model's own estimate of each mask's IoU; no score has a part in it.
        low_res_logits: [N, 1, h, w] fp32; each is a ``mask_input`` of a next prompt.
        object_scores: [N] fp32 logits of SAM 2; None of SAM.
    """

    embedding: ImageEmbedding
    labels: list[str]
    label_ids: Tensor
    boxes: Tensor
    scores: Tensor
    masks: Tensor
    predicted_iou: Tensor
    low_res_logits: Tensor
    object_scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def segment(
    model: PromptableModel,
    detector: Detector,
    images: Sequence[np.ndarray],
    labels: Sequence[Sequence[str]],
    *,
    threshold: float = 0.3,
    thresholds: Mapping[str, float] | None = None,
    nms_thresh: float = 0.5,
    agnostic_nms: bool = False,
    mask_nms_thresh: float | None = None,
    negative_labels: Sequence[str] = (),
    within: Sequence[Sequence[float] | None] | None = None,
) -> list[TextMasks]:
    """Find the objects that labels name, and segment each.

    The detector looks first, then each image is encoded once, and all boxes of all images go through the model in one
    call. An image without objects has empty arrays.

    Args:
        model: SAM or SAM 2.
        detector: of :func:`load_detector`, or an object with a method like :meth:`Detector.detect`.
        images: [H, W, 3] uint8 RGB, or floating-point in 0..1, of any sizes.
        labels: a list for each image. Case and spaces do not count.
        threshold: boxes of a higher score are kept.
        thresholds: of some labels, in place of ``threshold``.
        nms_thresh: a box goes where its IoU with a better one of its label is above that; 1 keeps all.
        agnostic_nms: the better box may have any label.
        mask_nms_thresh: masks go likewise, by the IoU of masks; None keeps all.
        negative_labels: looked for in every image too, and never in a result; a box goes where one of theirs has the
            higher score and overlaps it by more than ``nms_thresh``.
        within: a box as x0, y0, x1, y1 for each image, or None; objects whose box has its centre in there are kept.

    Returns:
        one result an image, in the order of the images.

    Raises:
        TypeError: an image, a label, a number of another kind, or a detector without ``detect``.
        ValueError: an image that cannot be taken; no label for an image, or one without text, twice the same or not
            taken by the detector; a threshold outside 0..1, or of a label that no image has. Nothing was detected then.
    """
    require_model(model)
    require("detector", detector, Detector, "a detector, an object with a method detect")
    pixels = _checked_images(model, images)
    if mask_nms_thresh is not None:
        check_share("mask_nms_thresh", mask_nms_thresh)
    limits = Thresholds(threshold, thresholds)
    search = _Search.of(labels, negative_labels, within, len(pixels), limits, check_share("nms_thresh", nms_thresh))
    found = search.run(detector, pixels, agnostic_nms)

    embeddings = model.encode(pixels)
    prompts = [[Prompt(box=box) for box in each.boxes.numpy()] for each in found]
    results = []
    for embedding, each, masks, given in zip(
        embeddings, found, model.predict(embeddings, prompts, multimask_output=False), labels, strict=True
    ):
        rows = torch.arange(len(each))
        if mask_nms_thresh is not None:
            rows = distinct_masks(masks.masks[:, 0], each.scores, each.label_ids, mask_nms_thresh, agnostic_nms)
        results.append(_result(embedding, each[rows], masks, rows.to(model.device), given))
    return results


def _result(
    embedding: ImageEmbedding, found: Detections, masks: MaskPrediction, rows: Tensor, labels: Sequence[str]
) -> TextMasks:
    """Return what is left of one image's masks, all of it on their device."""
    return TextMasks(
        embedding,
        [labels[label] for label in found.label_ids.tolist()],
        found.label_ids.to(rows.device),
        found.boxes.to(rows.device),
        found.scores.to(rows.device),
        masks.masks[rows, 0],
        masks.iou_predictions[rows, 0],
        masks.low_res_logits[rows],
        None if masks.object_scores is None else masks.object_scores[rows],
    )


@dataclass(frozen=True)
class _Search:
    """A checked search for boxes.

    Attributes:
        labels: of each image, the negative ones last.
        negative: number of these.
        regions: a box for each image that the objects' centres lie in, or None.
    """

    labels: list[list[str]]
    negative: int
    regions: list[Any]
    limits: Thresholds
    nms_thresh: float

    @classmethod
    def of(cls, labels: Any, negative: Any, within: Any, images: int, limits: Thresholds, nms_thresh: float) -> _Search:
        asked, unwanted = _checked_labels(labels, images, negative)
        limits.check_known(asked)
        return cls(asked, unwanted, _checked_regions(within, images), limits, nms_thresh)

    def run(self, detector: Detector, images: list[np.ndarray], agnostic: bool) -> list[Detections]:
        """Return what is left of each image's detections, ordered."""
        lowest = min([self.limits.default, *self.limits.own.values()])
        found = detector.detect(images, self.labels, lowest)
        if len(found) != len(images):
            raise ValueError(f"the detector gave {len(found)} results for {len(images)} images")
        results = []
        for image, of_image, labels, region in zip(images, found, self.labels, self.regions, strict=True):
            left = above(clipped(_on_the_host(of_image), image.shape[:2]), self.limits.of(labels))
            left = unbeaten(left, torch.arange(len(labels)) >= len(labels) - self.negative, self.nms_thresh)
            left = left if region is None else centred_within(left, region)
            results.append(ordered(suppressed(left, self.nms_thresh, agnostic)))
        return results


def _on_the_host(found: Detections) -> Detections:
    return Detections(found.boxes.float().cpu(), found.scores.float().cpu(), found.label_ids.long().cpu())


def _checked_images(model: PromptableModel, images: Any) -> list[np.ndarray]:
    if isinstance(images, np.ndarray):
        raise TypeError("images must be a list of images, got a single one")
    require("images", images, Sequence, "a list of images")
    checked = []
    for index, image in enumerate(images):
        with naming(f"images[{index}]"):
            checked.append(CheckedImage.of(image, model.image_geometry).pixels)
    return checked


def _checked_labels(labels: Any, images: int, negative: Any) -> tuple[list[list[str]], int]:
    """Return the labels that each image is searched for, the negative ones last, and the number of these."""
    if isinstance(labels, str) or not isinstance(labels, Sequence) or any(isinstance(each, str) for each in labels):
        raise TypeError(f"labels must be a list of labels for each image, got {labels!r:.80}")
    if len(labels) != images:
        raise ValueError(f"{images} images need as many lists of labels, got {len(labels)}")
    unwanted = check_labels("negative_labels", negative) if len(negative) else []
    asked = []
    for index, own in enumerate(labels):
        wanted = check_labels(f"labels[{index}]", own)
        for label in unwanted:
            if label in wanted:
                raise ValueError(f"negative_labels has {label!r}, which labels[{index}] asks for")
        asked.append([*wanted, *unwanted])
    return asked, len(unwanted)


def _checked_regions(within: Any, images: int) -> list[Any]:
    if within is None:
        return [None] * images
    require("within", within, Sequence, "a list of boxes, or None, for each image")
    if len(within) != images:
        raise ValueError(f"{images} images need as many boxes in within, got {len(within)}")
    regions: list[Any] = []
    for index, box in enumerate(within):
        with naming(f"within[{index}]"):
            regions.append(None if box is None else Prompt(box=box).box)
    return regions
