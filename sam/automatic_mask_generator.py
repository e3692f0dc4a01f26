"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastsam_kernels import nms

from .amg.defaults import is_sam2
from .amg.generator import MaskGenerator
from .modeling.promptable import PromptableModel
from .predictor import SamPredictor, why_not_stock
from .system.methods import WrittenMethods
from .utils.amg import (
    MaskData,
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)


class SamAutomaticMaskGenerator(MaskGenerator):
    """Make masks of everything in an image from clicks on a grid, of the image and if asked of crops of it.

    What is confident, stable and new is kept. The official generator: same arguments, records and order. One generator
    may be used from several threads. Where a program has overridden or patched its methods, the functions of this
    module, its predictor, or how the model makes masks of logits, the official loop runs as it was changed; one
    predictor then serves one thread.

    Args:
        model: whose masks.
        points_per_side: clicks along a side of the grid; None when ``point_grids`` gives the clicks.
        points_per_batch: clicks decoded together.
        pred_iou_thresh: drop masks whose predicted IoU is at or below this; 0 keeps all. None takes what suits the
            model: for SAM the official 0.88, for SAM 2 the official 0.8, for the embedded nano 0.5.
        stability_score_thresh: drop masks whose stability is below this; 0 keeps all. None takes 0.95, for nano 0.8.
        stability_score_offset: how far stability moves the threshold, in logits.
        box_nms_thresh: IoU of boxes above which the worse of two masks of a crop is dropped.
        crop_n_layers: layers of crops to look at besides the whole image; layer i has 2^i crops per side.
        crop_nms_thresh: as ``box_nms_thresh``, between crops.
        crop_overlap_ratio: overlap of the first layer's crops, as a share of the image's shorter side.
        crop_n_points_downscale_factor: layer i has ``points_per_side`` / this^i clicks per side.
        point_grids: for each layer, clicks [N, 2] in the unit square, in place of ``points_per_side``.
        min_mask_region_area: fill holes and drop islands smaller than this, in pixels; 0 leaves them.
        output_mode: "binary_mask", "uncompressed_rle" or "coco_rle".
        max_memory: bytes, or a string like "2GB", for decoding clicks and making masks: beyond the model, the
            encoding of the image and the returned records. Clicks and masks are taken in chunks that fit. None
            takes chunks that suit most machines and refuses nothing; on a GPU they follow the memory that is free,
            and the last bits of results follow them.
        progress: True shows a bar on stderr; a function is called with the clicks done and their number in all
            after each batch, or after each image where the official loop runs.
        resize_on_device: see :meth:`sam.Sam.encode`.

    Raises:
        ValueError: both or none of ``points_per_side`` and ``point_grids``, a number out of its range or NaN, a
            layer without a click per side or without a grid, a grid that is not [N, 2], an unknown ``output_mode``,
            or a ``max_memory`` that is no size.
    """

    def __init__(
        self,
        model: PromptableModel,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Any] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        max_memory: int | str | None = None,
        progress: bool | Callable[[int, int], None] = False,
        resize_on_device: bool = False,
    ) -> None:
        super().__init__(
            _predictor_of(model),
            points_per_side=points_per_side,
            points_per_batch=points_per_batch,
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
            crop_n_layers=crop_n_layers,
            crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            point_grids=point_grids,
            min_mask_region_area=min_mask_region_area,
            output_mode=output_mode,
            max_memory=max_memory,
            progress=progress,
            resize_on_device=resize_on_device,
        )

    # The official loop, for what a program calls or has changed of it -------------------------------------------

    def _why_official(self) -> str | None:
        reason = self._what_was_changed()
        if reason is not None and is_sam2(self.predictor.model):
            raise ValueError(f"the official loop of SAM takes no SAM 2 model, and it should run because {reason}")
        return reason

    def _what_was_changed(self) -> str | None:
        if (name := _METHODS.replaced_in(self)) is not None:
            return f"{name} of the generator was replaced"
        changed = [name for name, function in _FUNCTIONS.items() if globals()[name] is not function]
        if changed:
            return f"{changed[0]} of sam.automatic_mask_generator was replaced"
        if not is_sam2(self.predictor.model):
            return why_not_stock(self.predictor)
        from .sam2 import sam2_image_predictor

        return sam2_image_predictor.why_not_stock(self.predictor)

    def _names(self) -> Mapping[str, Any]:
        return globals()

    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        """Return the masks of the crop x0, y0, x1, y1 of an image, best first and in the frame of the image."""
        x0, y0, x1, y1 = crop_box
        part = image[y0:y1, x0:x1, :]
        size = part.shape[:2]
        self.predictor.set_image(part)
        data = MaskData()
        clicks = self.point_grids[crop_layer_idx] * np.array(size)[None, ::-1]
        for (points,) in batch_iterator(self.points_per_batch, clicks):
            data.cat(self._process_batch(points, size, crop_box, orig_size))
        self.predictor.reset_image()
        data.filter(nms(data["boxes"], data["iou_preds"], self.box_nms_thresh, kernels=self.predictor.model.kernels))
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box] * len(data["rles"]), dtype=torch.int64, device="cpu").reshape(
            -1, 4
        )
        return data

    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Return the masks at clicks [P, 2] in pixels of the crop that is set, whose size is ``im_size``."""
        predictor, (height, width) = self.predictor, orig_size
        coords = torch.as_tensor(predictor.transform.apply_coords(points, im_size), device=predictor.device)
        labels = torch.ones(coords.shape[0], dtype=torch.int, device=coords.device)
        masks, iou, _ = predictor.predict_torch(
            coords[:, None, :], labels[:, None], multimask_output=True, return_logits=True
        )
        data = MaskData(
            masks=masks.flatten(0, 1),
            iou_preds=iou.flatten(0, 1),
            points=torch.from_numpy(points.repeat(masks.shape[1], axis=0)),
        )
        if self.pred_iou_thresh > 0.0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        threshold = predictor.model.mask_threshold
        data["stability_score"] = calculate_stability_score(data["masks"], threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0.0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        inside = ~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height])
        if not torch.all(inside):
            data.filter(inside)
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data


def _predictor_of(model: Any) -> Any:
    if is_sam2(model):
        from .sam2.sam2_image_predictor import SAM2ImagePredictor

        return SAM2ImagePredictor(model)
    return SamPredictor(model)


_METHODS = WrittenMethods(
    SamAutomaticMaskGenerator, "_generate_masks", "_process_crop", "_process_batch", "postprocess_small_regions"
)
# What the official loop calls by these names of this module.
_FUNCTIONS = {
    function.__name__: function
    for function in (
        *(generate_crop_boxes, batch_iterator, calculate_stability_score, batched_mask_to_box, is_box_near_crop_edge),
        *(uncrop_masks, mask_to_rle_pytorch, uncrop_boxes_xyxy, uncrop_points, coco_encode_rle, rle_to_mask),
        *(area_from_rle, box_xyxy_to_xywh),
    )
}
