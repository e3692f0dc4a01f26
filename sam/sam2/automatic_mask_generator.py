"""``SAM2AutomaticMaskGenerator``: masks of everything in an image, as in the official package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import nms

from ..amg.crop_pipeline import Criteria
from ..amg.finders import Finder, any_confident_masks, cleaned_masks, confident_single_masks, refined_masks
from ..amg.generator import MaskGenerator
from ..amg.memory_plan import Demands
from ..system.methods import WrittenMethods
from ..utils import amg
from .sam2_image_predictor import SAM2ImagePredictor, why_not_stock
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


class SAM2AutomaticMaskGenerator(MaskGenerator):
    """Make masks of everything in an image from clicks on a grid, of the image and if asked of crops of it.

    The official generator: same arguments, records and order, but for what the predictor does on purpose. Where a
    program has overridden or patched its methods, the functions of this module or its predictor, the official loop runs
    as it was changed.

    Args:
        model: a SAM 2 model.
        points_per_side: clicks along a side of the grid; None when ``point_grids`` gives the clicks.
        points_per_batch: clicks decoded together.
        pred_iou_thresh: drop masks whose predicted IoU is at or below this; 0 keeps all.
        stability_score_thresh: drop masks whose stability is below this; 0 keeps all.
        stability_score_offset: how far stability moves the threshold, in logits.
        mask_threshold: logits above it are in the mask.
        box_nms_thresh: IoU of boxes above which the worse of two masks of a crop is dropped.
        crop_n_layers: layers of crops to look at besides the whole image; layer i has 2^i crops per side.
        crop_nms_thresh: as ``box_nms_thresh``, between crops.
        crop_overlap_ratio: overlap of the first layer's crops, as a share of the image's shorter side.
        crop_n_points_downscale_factor: layer i has ``points_per_side`` / this^i clicks per side.
        point_grids: for each layer, clicks [N, 2] in the unit square, in place of ``points_per_side``.
        min_mask_region_area: fill holes and wipe islands up to this, in pixels of the low-resolution logits; 0 leaves
            them.
        output_mode: "binary_mask", "uncompressed_rle" or "coco_rle".
        use_m2m: ask once more with each mask as a prompt beside its click.
        multimask_output: three masks per click; else one.
        max_memory, progress, resize_on_device: as of :class:`sam.SamAutomaticMaskGenerator`.

    Raises:
        TypeError: a keyword argument that there is none of; officially it would be ignored.
        ValueError: as :class:`sam.SamAutomaticMaskGenerator` does.
    """

    mask_data = MaskData

    def __init__(
        self,
        model: Any,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.8,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        mask_threshold: float = 0.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[Any] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        use_m2m: bool = False,
        multimask_output: bool = True,
        max_memory: int | str | None = None,
        progress: bool | Callable[[int, int], None] = False,
        resize_on_device: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(f"SAM2AutomaticMaskGenerator takes no {next(iter(kwargs))!r}")
        super().__init__(
            SAM2ImagePredictor(model, max_hole_area=min_mask_region_area, max_sprinkle_area=min_mask_region_area),
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
        self.mask_threshold = mask_threshold
        self.use_m2m = use_m2m
        self.multimask_output = multimask_output

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> SAM2AutomaticMaskGenerator:
        """Generate with a model of the Hugging Face hub; ``kwargs`` are of ``build_sam2`` and of this class.

        Raises:
            ImportError, ValueError: as :func:`sam.sam2.build_sam.build_sam2_hf` does.
            TypeError: an argument of neither.
        """
        from .build_sam import from_pretrained

        generator: SAM2AutomaticMaskGenerator = from_pretrained(cls, model_id, kwargs)
        return generator

    # What goes through the pipeline otherwise than of SAM -------------------------------------------------------

    def _clicks(self, layer: int, size: tuple[int, int]) -> np.ndarray:
        return super()._clicks(layer, size).astype(np.float32)

    def _criteria(self) -> Criteria:
        return Criteria(
            self.pred_iou_thresh,
            self.stability_score_thresh,
            self.stability_score_offset,
            self.box_nms_thresh,
            self.mask_threshold,
        )

    def _finder(self) -> Finder:
        find: Finder = any_confident_masks if self.multimask_output else confident_single_masks
        if self.use_m2m:
            find = partial(refined_masks, first=find)
        if self._cleans():
            find = partial(cleaned_masks, find=find, clean=self.predictor._transforms.cleaned)
        return find

    def _demands(self) -> Demands:
        return Demands(
            masks_per_click=3 if self.multimask_output else 1,
            asked_again=self.use_m2m,
            cleans_logits=self._cleans(),
        )

    def _cleans(self) -> bool:
        transforms = self.predictor._transforms
        return bool(transforms.max_hole_area > 0 or transforms.max_sprinkle_area > 0)

    def _finished(self, data: amg.MaskData) -> amg.MaskData:
        for name in ("boxes", "crop_boxes"):
            data[name] = data[name].float()  # as of the official records
        return data

    # The official loop, for what a program calls or has changed of it -------------------------------------------

    def _why_official(self) -> str | None:
        if (name := _METHODS.replaced_in(self)) is not None:
            return f"{name} of the generator was replaced"
        changed = [name for name, function in _FUNCTIONS.items() if globals()[name] is not function]
        if changed:
            return f"{changed[0]} of sam.sam2.automatic_mask_generator was replaced"
        return why_not_stock(self.predictor)

    def _names(self) -> Mapping[str, Any]:
        return globals()

    def _officially_finished(self, data: amg.MaskData) -> amg.MaskData:
        return data  # the predictor has cleaned the logits

    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> amg.MaskData:
        """Return the masks of the crop x0, y0, x1, y1 of an image, best first and in the frame of the image."""
        x0, y0, x1, y1 = crop_box
        part = image[y0:y1, x0:x1, :]
        size = part.shape[:2]
        self.predictor.set_image(part)
        data = MaskData()
        clicks = self.point_grids[crop_layer_idx] * np.array(size)[None, ::-1]
        for (points,) in batch_iterator(self.points_per_batch, clicks):
            data.cat(self._process_batch(points, size, crop_box, orig_size, normalize=True))
        self.predictor.reset_predictor()
        boxes = data["boxes"]
        keep = batched_nms(boxes.float(), data["iou_preds"], torch.zeros_like(boxes[:, 0]), self.box_nms_thresh)
        data.filter(keep)
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box] * len(data["rles"]), dtype=torch.int64).reshape(-1, 4)
        return data

    def _process_batch(
        self,
        points: np.ndarray,
        im_size: tuple[int, ...],
        crop_box: list[int],
        orig_size: tuple[int, ...],
        normalize: bool = False,
    ) -> amg.MaskData:
        """Return the masks at clicks [P, 2], in pixels of the crop that is set, whose size is ``im_size``.

        Without ``normalize`` clicks are in 0..1 of the crop.
        """
        height, width = orig_size
        clicks = torch.as_tensor(points, dtype=torch.float32, device=self.predictor.device)
        masks, iou, low_res = self.predictor._predict(
            *self._prompts(clicks, im_size, normalize), multimask_output=self.multimask_output, return_logits=True
        )
        data = MaskData(
            masks=masks.flatten(0, 1),
            iou_preds=iou.flatten(0, 1),
            points=clicks.repeat_interleave(masks.shape[1], dim=0),
            low_res_masks=low_res.flatten(0, 1),
        )
        if self.use_m2m:
            coords, labels = self._prompts(data["points"], im_size, normalize)
            masks, iou = self.refine_with_m2m(coords[:, 0], labels[:, 0], data["low_res_masks"], self.points_per_batch)
            data["masks"], data["iou_preds"] = masks.squeeze(1), iou.squeeze(1)
        if self.pred_iou_thresh > 0.0:
            data.filter(data["iou_preds"] > self.pred_iou_thresh)
        data["stability_score"] = calculate_stability_score(
            data["masks"], self.mask_threshold, self.stability_score_offset
        )
        if self.stability_score_thresh > 0.0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > self.mask_threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        inside = ~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height])
        if not torch.all(inside):
            data.filter(inside)
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data

    def _prompts(self, points: Tensor, size: tuple[int, ...], normalize: bool) -> tuple[Tensor, Tensor]:
        """Return clicks [P, 2] as prompts [P, 1, 2] in pixels of the model's square, and their labels [P, 1]."""
        coords = self.predictor._transforms.transform_coords(points, normalize=normalize, orig_hw=size)
        return coords[:, None], torch.ones(len(coords), 1, dtype=torch.int, device=coords.device)

    def refine_with_m2m(
        self, points: Tensor, point_labels: Tensor, low_res_masks: Tensor, points_per_batch: int
    ) -> tuple[Tensor, Tensor]:
        """Ask about clicks again, each with a mask of it as a prompt.

        Args:
            points: [P, 2] in pixels of the model's square.
            point_labels: [P].
            low_res_masks: logits [P, h, w].
            points_per_batch: prompts decoded together.

        Returns:
            logits [P, 1, H, W] at the size of the image that is set, and predicted IoU [P, 1].
        """
        answers = [
            self.predictor._predict(
                coords[:, None],
                labels[:, None],
                mask_input=low_res[:, None],
                multimask_output=False,
                return_logits=True,
            )
            for coords, labels, low_res in batch_iterator(points_per_batch, points, point_labels, low_res_masks)
        ]
        masks, iou, _ = zip(*answers, strict=True)
        return torch.cat(masks), torch.cat(iou)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes [N, 4] that overlap a better one of their group; return those that stay, best first.

    torchvision's function of this name, which the official generator calls with one group.
    """
    if idxs.numel() and bool((idxs != idxs[0]).any()):
        boxes = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
    return nms(boxes, scores, iou_threshold)


_METHODS = WrittenMethods(
    SAM2AutomaticMaskGenerator,
    *("_generate_masks", "_process_crop", "_process_batch", "postprocess_small_regions", "refine_with_m2m"),
)
# What the official loop calls by these names of this module.
_FUNCTIONS = {
    function.__name__: function
    for function in (
        *(generate_crop_boxes, batch_iterator, calculate_stability_score, batched_mask_to_box, is_box_near_crop_edge),
        *(uncrop_masks, mask_to_rle_pytorch, uncrop_boxes_xyxy, uncrop_points, coco_encode_rle, rle_to_mask),
        *(area_from_rle, box_xyxy_to_xywh, batched_nms),
    )
}
