"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch

from fastsam_kernels import nms

from .amg.crop_pipeline import Criteria, Crop, masks_of_crop
from .amg.grids import MAX_LAYERS, Box, check_range, crops_of, point_grid
from .amg.memory_plan import MemoryPlan, parse_bytes
from .amg.progress import Progress
from .amg.records import OUTPUT_MODES, clean_regions, drop_duplicates_of_crops, records_of
from .checks import naming, require
from .embedding import ImageEmbedding
from .images.prepare import CheckedImage
from .modeling import Sam
from .predictor import SamPredictor, why_not_stock
from .prompts.checks import check_finite
from .system.device_profile import device_profile
from .system.methods import WrittenMethods
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
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)

logger = logging.getLogger("sam")


class SamAutomaticMaskGenerator:
    """Make masks of everything in an image from clicks on a grid, of the image and if asked of crops of it.

    What is confident, stable and new is kept. The official generator: same arguments, records and order. One generator
    may be used from several threads. Where a program has overridden or patched its methods, the functions of this
    module, its predictor, or how the model makes masks of logits, the official loop runs as it was changed; one
    predictor then serves one thread.

    Args:
        model: whose masks.
        points_per_side: clicks along a side of the grid; None when ``point_grids`` gives the clicks.
        points_per_batch: clicks decoded together.
        pred_iou_thresh: drop masks whose predicted IoU is at or below this; 0 keeps all.
        stability_score_thresh: drop masks whose stability is below this; 0 keeps all.
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

    # Of the class, for subclasses that do not call ``__init__``: what the official class has no argument for.
    max_memory: int | None = None
    progress: bool | Callable[[int, int], None] = False
    resize_on_device: bool = False

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
        point_grids: Sequence[Any] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        max_memory: int | str | None = None,
        progress: bool | Callable[[int, int], None] = False,
        resize_on_device: bool = False,
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {output_mode!r}")
        check_range("points_per_batch", points_per_batch, 1)
        check_range("crop_n_layers", crop_n_layers, 0, MAX_LAYERS)
        check_range("crop_overlap_ratio", crop_overlap_ratio, 0, 1)
        check_range("min_mask_region_area", min_mask_region_area, 0)
        for name, value in (("pred_iou_thresh", pred_iou_thresh), ("stability_score_thresh", stability_score_thresh)):
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value}")
        finite = {"stability_score_offset": stability_score_offset, "box_nms_thresh": box_nms_thresh}
        for name, value in (finite | {"crop_nms_thresh": crop_nms_thresh}).items():
            check_finite(name, np.asarray(value))
        if points_per_side is not None:
            check_range("points_per_side", points_per_side, 1)
            scale = crop_n_points_downscale_factor
            if not scale > 0:  # NaN is not
                raise ValueError(f"crop_n_points_downscale_factor must be more than 0, got {scale}")
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, scale)
        assert point_grids is not None
        self.point_grids = [point_grid(points) for points in point_grids]
        if len(self.point_grids) <= crop_n_layers:
            raise ValueError(
                f"crop_n_layers={crop_n_layers} needs {crop_n_layers + 1} point_grids, got {len(self.point_grids)}"
            )
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
        self.progress = progress
        self.resize_on_device = resize_on_device
        self.max_memory = None if max_memory is None else parse_bytes(max_memory)

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Generate masks of everything in an image.

        Args:
            image: [H, W, 3] uint8 RGB, or floating-point in 0..1.

        Returns:
            one record per mask: segmentation ([H, W] bool, or an RLE), area (pixels), bbox (XYWH), predicted_iou,
            point_coords ([[x, y]], the click), stability_score, crop_box (XYWH, where the click was made).

        Raises:
            TypeError: another kind of image.
            ValueError: an image too long and thin to be resized; ``max_memory`` that a single click or mask does not
                fit; or ``max_memory`` or ``resize_on_device`` where the official loop runs, which has neither.
        """
        (records,) = self.generate_batch([image])
        return records

    def generate_batch(self, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Return the masks of images of any sizes, several of which, or of their crops, a GPU encodes together.

        Returns:
            the records of each image as from :meth:`generate`, in the order of the images.

        Raises:
            TypeError, ValueError: an image as :meth:`generate` refuses it, named by its place; nothing was encoded.
        """
        require("images", images, (Sequence, np.ndarray), "a list of arrays [H, W, 3]")
        checked, plans = [], []
        for index, image in enumerate(images):
            with naming(f"image {index}" if len(images) > 1 else None):
                checked.append(self._checked(image))
                plans.append(self._crops(checked[-1].shape[:2]))
        report = Progress(self.progress, sum(len(self.point_grids[layer]) for plan in plans for _, layer in plan))
        with report:
            if self._runs_officially():
                return [report.follow(self._official_steps(image)) for image in checked]
            pairs = list(zip(checked, plans, strict=True))
            embeddings = self._embeddings(
                [image[y0:y1, x0:x1] for image, plan in pairs for (x0, y0, x1, y1), _ in plan]
            )
            return [report.follow(self._steps(embeddings, plan, image.shape[:2])) for image, plan in pairs]

    def steps(self, image: np.ndarray | ImageEmbedding) -> Generator[int, None, list[dict[str, Any]]]:
        """Do :meth:`generate` in pieces, for who has other work between them: pause after each batch of clicks.

        An embedding serves in place of the image where no crops are asked for. Yields the number of clicks of the
        batch; the generator returns the records.

        Raises:
            TypeError, ValueError: an image as :meth:`generate` refuses it, or an embedding where there are crops to be
                encoded or the official loop runs, which starts from the image.
        """
        if not isinstance(image, ImageEmbedding):
            image = self._checked(image)
            size = image.shape[:2]
            plan = self._crops(size)
            if self._runs_officially():
                return self._official_steps(image)
            return self._steps(self._embeddings([image[y0:y1, x0:x1] for (x0, y0, x1, y1), _ in plan]), plan, size)
        if self.crop_n_layers > 0:
            raise ValueError(f"crop_n_layers={self.crop_n_layers} needs the image, got its embedding")
        if (reason := self._why_official()) is not None:
            raise ValueError(f"the official loop needs the image, got its embedding; it runs because {reason}")
        self.predictor.model.check_embedding(image)
        height, width = image.geometry.original_size
        return self._steps(iter([image]), [((0, 0, width, height), 0)], (height, width))

    def _checked(self, image: np.ndarray) -> np.ndarray:
        """Return an image that can be embedded as uint8; ``TypeError`` or ``ValueError`` of another."""
        return CheckedImage.of(image, self.predictor.model.image_geometry).pixels

    def _crops(self, size: Sequence[int]) -> list[tuple[Box, int]]:
        long_side = self.predictor.model.image_size
        return crops_of(size, self.crop_n_layers, self.crop_overlap_ratio, long_side)

    @torch.no_grad()
    def _embeddings(self, parts: Sequence[np.ndarray]) -> Iterator[ImageEmbedding]:
        """Encode when they are asked for, several together where that pays."""
        model = self.predictor.model
        predictor = copy(self.predictor)  # several threads may be here at once
        batch_size = device_profile(model.device).images_per_pass
        for start in range(0, len(parts), batch_size):
            batch = parts[start : start + batch_size]
            if len(batch) > 1 or self.resize_on_device:
                yield from model.encode(batch, resize_on_device=self.resize_on_device)
            else:
                predictor.set_image(batch[0])
                embedding = predictor.embedding
                predictor.reset_image()
                yield embedding

    @torch.no_grad()
    def _steps(
        self, embeddings: Iterator[ImageEmbedding], plan: list[tuple[Box, int]], size: Sequence[int]
    ) -> Generator[int, None, list[dict[str, Any]]]:
        """Yield clicks and return the records of an image whose crops are in ``plan`` and next in ``embeddings``."""
        model, data = self.predictor.model, MaskData()
        for (box, layer), embedding in zip(plan, embeddings, strict=False):
            data.cat((yield from self._masks_of(Crop(embedding, box, (size[0], size[1])), layer)))
        if len(plan) > 1:
            drop_duplicates_of_crops(data, self.crop_nms_thresh, model.kernels)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = clean_regions(data, self.min_mask_region_area, threshold, model.device, model.kernels)
        return records_of(data, self.output_mode)

    def _masks_of(self, crop: Crop, layer: int) -> Generator[int, None, MaskData]:
        model = self.predictor.model
        criteria = Criteria(
            self.pred_iou_thresh, self.stability_score_thresh, self.stability_score_offset, self.box_nms_thresh
        )
        height, width = crop.embedding.geometry.original_size
        memory = MemoryPlan.plan(model, (height, width), self.points_per_batch, self.max_memory)
        return masks_of_crop(model, crop, self.point_grids[layer] * (width, height), criteria, memory)

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Clean every mask of regions under ``min_area`` pixels, then drop what became a duplicate.

        Masks that were clean win over those that had to be changed. Needs SciPy on a CPU.
        """
        return clean_regions(mask_data, min_area, nms_thresh, torch.device("cpu"))

    # The official loop, for what a program calls or has changed of it -------------------------------------------

    def _why_official(self) -> str | None:
        """Return what was changed, so that only the official loop answers as it should; None without anything."""
        if (name := _METHODS.replaced_in(self)) is not None:
            return f"{name} of the generator was replaced"
        changed = [name for name, function in _FUNCTIONS.items() if globals()[name] is not function]
        if changed:
            return f"{changed[0]} of sam.automatic_mask_generator was replaced"
        return why_not_stock(self.predictor)

    def _runs_officially(self) -> bool:
        reason = self._why_official()
        if reason is None:
            return False
        given = {"max_memory": self.max_memory is not None, "resize_on_device": self.resize_on_device}
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(f"{name} does not apply to the official loop, which runs because {reason}")
        logger.info("automatic masks are made by the official loop, because %s", reason)
        return True

    @torch.no_grad()
    def _official_steps(self, image: np.ndarray) -> Generator[int, None, list[dict[str, Any]]]:
        data = self._generate_masks(image)
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        yield sum(len(self.point_grids[layer]) for _, layer in self._crops(image.shape[:2]))
        return self._official_records(data)

    def _official_records(self, data: MaskData) -> list[dict[str, Any]]:
        encode = {"coco_rle": coco_encode_rle, "binary_mask": rle_to_mask}.get(self.output_mode, lambda rle: rle)
        return [
            {
                "segmentation": encode(rle),
                "area": area_from_rle(rle),
                "bbox": box_xyxy_to_xywh(data["boxes"][row]).tolist(),
                "predicted_iou": data["iou_preds"][row].item(),
                "point_coords": [data["points"][row].tolist()],
                "stability_score": data["stability_score"][row].item(),
                "crop_box": box_xyxy_to_xywh(data["crop_boxes"][row]).tolist(),
            }
            for row, rle in enumerate(data["rles"])
        ]

    def _generate_masks(self, image: np.ndarray) -> MaskData:
        """Return the masks of an image [H, W, 3] as arrays, best crop by crop."""
        size, data, long_side = image.shape[:2], MaskData(), self.predictor.model.image_size
        crops = crops_of(size, self.crop_n_layers, self.crop_overlap_ratio, long_side, generate_crop_boxes)
        for box, layer in crops:
            data.cat(self._process_crop(image, [*box], layer, size))
        if len(crops) > 1:
            drop_duplicates_of_crops(data, self.crop_nms_thresh, self.predictor.model.kernels)
        data.to_numpy()
        return data

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
