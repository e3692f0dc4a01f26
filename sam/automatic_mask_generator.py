"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import nms

from .embedding import ImageEmbedding
from .modeling import Sam
from .postprocess import upscale_masks
from .predictor import SamPredictor
from .preprocess import ImageGeometry, validate_image
from .prompts import PromptBatch
from .utils.amg import (
    MaskData,
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
_MASKS_AT_ONCE = 16  # full-size float logits that exist at a time


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

        Raises:
            ValueError: both or none of ``points_per_side`` and ``point_grids``, or an unknown ``output_mode``.
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
        steps = self.steps(validate_image(image))
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value

    @torch.no_grad()
    def steps(self, image: np.ndarray | ImageEmbedding) -> Generator[None, None, list[dict[str, Any]]]:
        """``generate`` in pieces, for who has other work between them: it pauses after each batch of clicks.

        An embedding serves in place of the image where no crops are asked for. The generator returns the records.

        Raises:
            ValueError: an embedding, and crops to be encoded.
        """
        if isinstance(image, ImageEmbedding) and len(self.point_grids) > 1:
            raise ValueError(f"crop_n_layers={len(self.point_grids) - 1} needs the image, got its embedding")
        data = yield from self._generate_masks(image)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        output = {
            "binary_mask": rle_to_mask,
            "uncompressed_rle": lambda rle: rle,
            "coco_rle": coco_encode_rle,
        }[self.output_mode]
        return [
            {
                "segmentation": output(rle),
                "area": area_from_rle(rle),
                "bbox": box_xyxy_to_xywh(data["boxes"][index]).tolist(),
                "predicted_iou": data["iou_preds"][index].item(),
                "point_coords": [data["points"][index].tolist()],
                "stability_score": data["stability_score"][index].item(),
                "crop_box": box_xyxy_to_xywh(data["crop_boxes"][index]).tolist(),
            }
            for index, rle in enumerate(data["rles"])
        ]

    def _generate_masks(self, image: np.ndarray | ImageEmbedding) -> Generator[None, None, MaskData]:
        size = image.geometry.original_size if isinstance(image, ImageEmbedding) else image.shape[:2]
        crop_boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        data = MaskData()
        for crop_box, layer in zip(crop_boxes, layers, strict=True):
            data.cat((yield from self._process_crop(image, crop_box, layer, size)))
        if len(crop_boxes) > 1:
            x0, y0, x1, y1 = data["crop_boxes"].unbind(1)
            smaller_first = 1 / ((x1 - x0) * (y1 - y0))
            data.filter(nms(data["boxes"], smaller_first, self.crop_nms_thresh))
        return data

    def _process_crop(
        self, image: np.ndarray | ImageEmbedding, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> Generator[None, None, MaskData]:
        x0, y0, x1, y1 = crop_box
        size = (y1 - y0, x1 - x0)
        if isinstance(image, ImageEmbedding):
            self._set_embedding(image)
        else:
            self.predictor.set_image(image[y0:y1, x0:x1])
        clicks = self.point_grids[crop_layer_idx] * (size[1], size[0])
        data = MaskData()
        for (points,) in batch_iterator(self.points_per_batch, clicks):
            data.cat(self._process_batch(points, size, crop_box, orig_size))
            yield
        self.predictor.reset_image()
        data.filter(nms(data["boxes"], data["iou_preds"], self.box_nms_thresh))
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box] * len(data["rles"]), dtype=torch.int64).reshape(-1, 4)
        return data

    def _set_embedding(self, embedding: ImageEmbedding) -> None:
        predictor = self.predictor
        predictor.model._check_embedding(embedding)
        predictor.reset_image()
        predictor.original_size, predictor.input_size = embedding.geometry.original_size, embedding.geometry.input_size
        predictor.features, predictor._handle, predictor.is_image_set = embedding.features, embedding, True

    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Decode some clicks; the predicted IoU decides before any mask is made large."""
        predictor, model = self.predictor, self.predictor.model
        coords = torch.as_tensor(predictor.transform.apply_coords(points, im_size))[:, None]
        batch = PromptBatch.from_tensors((coords, torch.ones(coords.shape[:2])), None, None, model.device)
        embedding = predictor.embedding
        low_res, iou = model.decode([embedding], batch, multimask_output=True)
        clicks = torch.as_tensor(points).repeat_interleave(iou.shape[1], dim=0)
        data = MaskData(low_res=low_res.flatten(0, 1), iou_preds=iou.flatten(), points=clicks)
        if self.pred_iou_thresh > 0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)

        pieces = [
            self._full_size(piece, embedding.geometry, crop_box, orig_size)
            for piece in data["low_res"].split(_MASKS_AT_ONCE)
        ]
        del data["low_res"]
        data["stability_score"] = torch.cat([piece["stability_score"] for piece in pieces])
        data["boxes"] = torch.cat([piece["boxes"] for piece in pieces])
        data["rles"] = [rle for piece in pieces for rle in piece["rles"]]
        if self.stability_score_thresh > 0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        height, width = orig_size
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        return data

    def _full_size(
        self, low_res: Tensor, geometry: ImageGeometry, crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Stability, box and RLE of masks [N, h, w] of the crop that ``geometry`` describes."""
        threshold = self.predictor.model.mask_threshold
        logits = upscale_masks(low_res[:, None], geometry)[:, 0]
        masks = logits > threshold
        return MaskData(
            stability_score=calculate_stability_score(logits, threshold, self.stability_score_offset),
            boxes=batched_mask_to_box(masks),
            rles=mask_to_rle_pytorch(uncrop_masks(masks, crop_box, *orig_size)),
        )

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Clean every mask of regions under ``min_area`` pixels, then drop what became a duplicate.

        Masks that were clean win over those that had to be changed. Needs SciPy.
        """
        if not mask_data["rles"]:
            return mask_data
        masks, untouched = [], []
        for rle in mask_data["rles"]:
            mask, filled = remove_small_regions(rle_to_mask(rle), min_area, mode="holes")
            mask, dropped = remove_small_regions(mask, min_area, mode="islands")
            masks.append(torch.from_numpy(mask))
            untouched.append(float(not (filled or dropped)))
        boxes = batched_mask_to_box(torch.stack(masks))
        keep = nms(boxes, torch.tensor(untouched), nms_thresh)
        for index in keep.tolist():
            if not untouched[index]:
                (mask_data["rles"][index],) = mask_to_rle_pytorch(masks[index][None])
                mask_data["boxes"][index] = boxes[index]
        mask_data.filter(keep)
        return mask_data
