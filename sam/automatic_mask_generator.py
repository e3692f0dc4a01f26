"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import Resizing, mask_statistics, nms, packed_masks

from . import rle as run_lengths
from .memory import MaskMemory, parse_bytes
from .modeling import Sam
from .predictor import SamPredictor
from .preprocess import validate_image
from .prompts import PromptBatch
from .utils.amg import (
    MaskData,
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_points,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


class SamAutomaticMaskGenerator:
    """Clicks on a grid, of the image and if asked of crops of it; keeps what is confident, stable and new.

    The official generator: same arguments, records and order.
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        max_memory: int | str | None = None,
    ) -> None:
        """
        Args:
            model: whose masks.
            points_per_side: clicks along a side of the grid; None when ``point_grids`` gives the clicks.
            points_per_batch: clicks decoded together.
            pred_iou_thresh: masks of a predicted IoU up to this go.
            stability_score_thresh: masks of a lower stability go.
            stability_score_offset: how far stability moves the threshold, in logits.
            box_nms_thresh: IoU of boxes above which the worse of two masks of a crop goes.
            crop_n_layers: layers of crops to look at besides the whole image; layer i has 2^i crops a side.
            crop_nms_thresh: as ``box_nms_thresh``, between crops.
            crop_overlap_ratio: overlap of the first layer's crops, as a share of the image's shorter side.
            crop_n_points_downscale_factor: layer i has ``points_per_side`` / this^i clicks a side.
            point_grids: for each layer, clicks [N, 2] in the unit square, in place of ``points_per_side``.
            min_mask_region_area: fill holes and drop islands smaller than this, in pixels; 0 leaves them.
            output_mode: "binary_mask", "uncompressed_rle" or "coco_rle".
            max_memory: bytes, or a string like "2GB", for decoding clicks and making masks: beyond the model, the
                encoding of the image and the returned records. Clicks and masks are taken in chunks that fit. None
                takes chunks that suit most machines and refuses nothing.

        Raises:
            ValueError: both or none of ``points_per_side`` and ``point_grids``, an unknown ``output_mode``, or a
                ``max_memory`` that is no size; from ``generate``, one that a single click or mask does not fit.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_OUTPUT_MODES)}, got {output_mode!r}")
        if point_grids is None:
            assert points_per_side is not None
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        self.point_grids = point_grids
        self.predictor = SamPredictor(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.max_memory = None if max_memory is None else parse_bytes(max_memory)

    @torch.no_grad()
    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Masks of everything in an image.

        Args:
            image: [H, W, 3] uint8 RGB.

        Returns:
            a record a mask: segmentation ([H, W] bool, or an RLE), area (pixels), bbox (XYWH), predicted_iou,
            point_coords ([[x, y]], the click), stability_score, crop_box (XYWH, where the click was made).

        Raises:
            TypeError, ValueError: another kind of image.
        """
        data = self._generate_masks(validate_image(image))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        boxes, crop_boxes = data["boxes"].cpu(), data["crop_boxes"].cpu()
        for corners in (boxes, crop_boxes):
            corners[:, 2:] -= corners[:, :2]
        columns = {
            "segmentation": self._segmentations(data["rles"]),
            "area": [area_from_rle(rle) for rle in data["rles"]],
            "bbox": boxes.tolist(),
            "predicted_iou": data["iou_preds"].tolist(),
            "point_coords": data["points"][:, None].tolist(),
            "stability_score": data["stability_score"].tolist(),
            "crop_box": crop_boxes.tolist(),
        }
        return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]

    def _segmentations(self, rles: list[dict[str, Any]]) -> list[Any]:
        if self.output_mode == "binary_mask":
            return [rle_to_mask(rle) for rle in rles]
        if self.output_mode == "uncompressed_rle":
            return rles
        strings = run_lengths.compress_all([rle["counts"] for rle in rles])
        return [{"size": rle["size"], "counts": string} for rle, string in zip(rles, strings, strict=True)]

    def _generate_masks(self, image: np.ndarray) -> MaskData:
        size = image.shape[:2]
        crop_boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        data = MaskData()
        for crop_box, layer in zip(crop_boxes, layers, strict=True):
            data.cat(self._process_crop(image, crop_box, layer, size))
        if len(crop_boxes) > 1:
            x0, y0, x1, y1 = data["crop_boxes"].unbind(1)
            smaller_first = 1 / ((x1 - x0) * (y1 - y0))
            data.filter(nms(data["boxes"], smaller_first, self.crop_nms_thresh))
        return data

    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        x0, y0, x1, y1 = crop_box
        size = (y1 - y0, x1 - x0)
        self.predictor.set_image(image[y0:y1, x0:x1])
        geometry = self.predictor.embedding.geometry
        resizing = Resizing(geometry.image_size, geometry.input_size, geometry.original_size)
        memory = MaskMemory.plan(self.predictor.model, size, self.points_per_batch, self.max_memory)

        def encode(masks: list[Any]) -> list[Any]:
            return self._encode(masks, resizing, crop_box, orig_size, memory.masks_at_once)

        clicks = self.point_grids[crop_layer_idx] * (size[1], size[0])
        data = MaskData()
        masks: list[Any] = []  # logits of low resolution, or the RLE once there were too many of them
        held = 0
        for (points,) in batch_iterator(memory.points_at_once, clicks):
            batch, low_res = self._process_batch(points, resizing, crop_box, orig_size)
            data.cat(batch)
            masks.extend(low_res)
            held += low_res.nbytes
            if held > memory.held_bytes:
                masks, held = encode(masks), 0
        self.predictor.reset_image()
        keep = nms(data["boxes"], data["iou_preds"], self.box_nms_thresh)
        data.filter(keep)
        data["rles"] = encode([masks[index] for index in keep.tolist()])
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box] * len(keep), dtype=torch.int64).reshape(-1, 4)
        return data

    def _process_batch(
        self, points: np.ndarray, resizing: Resizing, crop_box: list[int], orig_size: tuple[int, ...]
    ) -> tuple[MaskData, Tensor]:
        """Decode some clicks; masks [N, h, w], of low resolution, of those worth keeping, and what is known of them.

        The predicted IoU decides before anything is computed at full size, and stability before a mask is made.
        """
        predictor, model = self.predictor, self.predictor.model
        coords = torch.as_tensor(predictor.transform.apply_coords(points, resizing.output_size))[:, None]
        batch = PromptBatch.from_tensors((coords, torch.ones(coords.shape[:2])), None, None, model.device)
        low_res, iou = model.decode([predictor.embedding], batch, multimask_output=True)
        clicks = torch.as_tensor(points).repeat_interleave(iou.shape[1], dim=0)
        data = MaskData(low_res=low_res.flatten(0, 1), iou_preds=iou.flatten(), points=clicks)
        del low_res
        if self.pred_iou_thresh > 0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        statistics = mask_statistics(
            data["low_res"],
            resizing,
            threshold=model.mask_threshold,
            offset=self.stability_score_offset,
            kernels=model.kernels,
        )
        data["stability_score"] = statistics.stability
        data["boxes"] = statistics.boxes
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        height, width = orig_size
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        low_res = data["low_res"]
        del data["low_res"]
        return data, low_res

    def _encode(
        self, masks: list[Any], resizing: Resizing, crop_box: list[int], orig_size: tuple[int, ...], at_once: int
    ) -> list[dict[str, Any]]:
        """RLEs, in the whole image, of logits [h, w] of a crop; what is an RLE already stays."""
        model = self.predictor.model
        encoded = list(masks)
        waiting = [index for index, mask in enumerate(masks) if isinstance(mask, Tensor)]
        for start in range(0, len(waiting), at_once):
            some = waiting[start : start + at_once]
            logits = torch.stack([masks[index] for index in some])
            packed = packed_masks(logits, resizing, threshold=model.mask_threshold, kernels=model.kernels)
            corner, full_size = (crop_box[0], crop_box[1]), (orig_size[0], orig_size[1])
            rles = run_lengths.encode_packed(packed, resizing.output_size, corner, full_size)
            for index, rle in zip(some, rles, strict=True):
                encoded[index] = rle
        return encoded

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Clean every mask of regions under ``min_area`` pixels, then drop what became a duplicate.

        Masks that were clean win over those that had to be changed. Needs SciPy.
        """
        if not mask_data["rles"]:
            return mask_data
        rles, boxes, untouched = list(mask_data["rles"]), mask_data["boxes"].clone(), []
        for index, rle in enumerate(rles):
            mask, filled = remove_small_regions(rle_to_mask(rle), min_area, mode="holes")
            mask, dropped = remove_small_regions(mask, min_area, mode="islands")
            untouched.append(float(not (filled or dropped)))
            if filled or dropped:
                changed = torch.from_numpy(mask)[None]
                (rles[index],) = mask_to_rle_pytorch(changed)
                boxes[index] = batched_mask_to_box(changed)[0]
        mask_data["rles"], mask_data["boxes"] = rles, boxes
        keep = nms(boxes, torch.tensor(untouched, device=boxes.device), nms_thresh)
        mask_data.filter(keep)
        return mask_data
