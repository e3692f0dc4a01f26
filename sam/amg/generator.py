"""The base of the automatic mask generators of SAM and SAM 2: a grid of clicks, crops, batches of images, records."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..checks import naming, require
from ..embedding import ImageEmbedding
from ..images.prepare import CheckedImage
from ..inference.decode import shared_image
from ..prompts.checks import check_finite
from ..system.device_profile import device_profile
from ..utils.amg import MaskData, build_all_layer_point_grids
from .crop_pipeline import Criteria, Crop, masks_of_crop
from .defaults import thresholds_of
from .finders import Finder, any_confident_masks
from .grids import MAX_LAYERS, Box, check_range, crops_of, point_grid
from .memory_plan import Demands, MemoryPlan, parse_bytes
from .progress import Progress
from .records import OUTPUT_MODES, clean_regions, drop_duplicates_of_crops, records_of

_SHARING = 16  # clicks from which on it pays to project the image for all of them
logger = logging.getLogger("sam")
# Held by the official loop, in which a predictor holds the image: one pass of it at a time, in whatever thread.
_passes: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()


class MaskGenerator:
    """Makes masks of everything in an image from clicks on a grid, of the image and if asked of crops of it.

    Where a program has changed what the official generator calls, the official loop runs, which a subclass has; else
    all crops go through :mod:`sam.amg.crop_pipeline`.
    """

    # Of the class, for subclasses that do not call ``__init__``: what the official classes have no argument for.
    max_memory: int | None = None
    progress: bool | Callable[[int, int], None] = False
    resize_on_device: bool = False
    mask_data: type[MaskData] = MaskData
    predictor: Any

    def __init__(
        self,
        predictor: Any,
        *,
        points_per_side: int | None,
        points_per_batch: int,
        pred_iou_thresh: float | None,
        stability_score_thresh: float | None,
        stability_score_offset: float,
        box_nms_thresh: float,
        crop_n_layers: int,
        crop_nms_thresh: float,
        crop_overlap_ratio: float,
        crop_n_points_downscale_factor: int,
        point_grids: Sequence[Any] | None,
        min_mask_region_area: int,
        output_mode: str,
        max_memory: int | str | None,
        progress: bool | Callable[[int, int], None],
        resize_on_device: bool,
    ) -> None:
        """Check and keep the options, which the subclasses describe; ``predictor`` makes masks in the official loop."""
        given = {"pred_iou_thresh": pred_iou_thresh, "stability_score_thresh": stability_score_thresh}
        suited = thresholds_of(predictor.model)
        thresholds = {name: suited[name] if value is None else value for name, value in given.items()}
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {output_mode!r}")
        check_range("points_per_batch", points_per_batch, 1)
        check_range("crop_n_layers", crop_n_layers, 0, MAX_LAYERS)
        check_range("crop_overlap_ratio", crop_overlap_ratio, 0, 1)
        check_range("min_mask_region_area", min_mask_region_area, 0)
        for name, value in thresholds.items():
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
        self.predictor = predictor
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = thresholds["pred_iou_thresh"]
        self.stability_score_thresh = thresholds["stability_score_thresh"]
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
        """Run :meth:`generate` step by step, pausing after each batch of clicks so that the caller can do other work.

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
        self.check_takes_embeddings()
        self.predictor.model.check_embedding(image)
        height, width = image.geometry.original_size
        return self._steps(iter([image]), [((0, 0, width, height), 0)], (height, width))

    def check_takes_embeddings(self) -> None:
        """Raise ``ValueError`` where :meth:`steps` needs the image itself, and say why."""
        if self.crop_n_layers > 0:
            raise ValueError(f"crop_n_layers={self.crop_n_layers} needs the image, not its embedding")
        if (reason := self._why_official()) is not None:
            raise ValueError(f"the official loop needs the image, not its embedding; it runs because {reason}")

    def _checked(self, image: np.ndarray) -> np.ndarray:
        """Return an image that can be embedded as uint8; ``TypeError`` or ``ValueError`` of another."""
        return CheckedImage.of(image, self.predictor.model.image_geometry).pixels

    def _crops(self, size: Sequence[int]) -> list[tuple[Box, int]]:
        return crops_of(size, self.crop_n_layers, self.crop_overlap_ratio, self.predictor.model.image_geometry)

    @torch.no_grad()
    def _embeddings(self, parts: Sequence[np.ndarray]) -> Iterator[ImageEmbedding]:
        """Encode when they are asked for, several together where that pays."""
        model = self.predictor.model
        batch_size = device_profile(model.device).images_per_pass
        for start in range(0, len(parts), batch_size):
            batch = parts[start : start + batch_size]
            if len(batch) > 1 or self.resize_on_device:
                yield from model.encode(batch, resize_on_device=self.resize_on_device)
            else:
                predictor = copy(self.predictor)  # several threads may be here at once
                predictor.set_image(batch[0])
                yield predictor.embedding

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
        return records_of(self._finished(data), self.output_mode)

    def _masks_of(self, crop: Crop, layer: int) -> Generator[int, None, MaskData]:
        model = self.predictor.model
        height, width = crop.embedding.geometry.original_size
        clicks, demands = self._clicks(layer, (height, width)), self._demands()
        if demands.masks_per_click > 1 and not demands.asked_again and len(clicks) >= _SHARING:
            demands = replace(demands, low_rank=shared_image(model, crop.embedding))
        memory = MemoryPlan.plan(model, (height, width), self.points_per_batch, self.max_memory, demands)
        return masks_of_crop(model, crop, clicks, self._criteria(), memory, self._finder())

    def _clicks(self, layer: int, size: tuple[int, int]) -> np.ndarray:
        """Return the clicks [P, 2] of a layer in pixels of a crop of ``size`` (height, width)."""
        return self.point_grids[layer] * (size[1], size[0])

    def _criteria(self) -> Criteria:
        """Return the criteria by which masks stay."""
        return Criteria(
            self.pred_iou_thresh,
            self.stability_score_thresh,
            self.stability_score_offset,
            self.box_nms_thresh,
            self.predictor.model.mask_threshold,
        )

    def _finder(self) -> Finder:
        """Return the function that makes masks of clicks."""
        return any_confident_masks

    def _demands(self) -> Demands:
        """Return what the finder, and what comes after it, need memory for."""
        return Demands(cleans_masks=self.min_mask_region_area > 0)

    def _finished(self, data: MaskData) -> MaskData:
        """Return masks of all crops as they go into the records."""
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            model = self.predictor.model
            data = clean_regions(data, self.min_mask_region_area, threshold, model.device, model.kernels)
        return data

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Clean every mask of regions under ``min_area`` pixels, then drop what became a duplicate.

        Masks that were clean win over those that had to be changed. Needs SciPy on a CPU.
        """
        return clean_regions(mask_data, min_area, nms_thresh, torch.device("cpu"))

    # The official loop, for what a program calls or has changed of it -------------------------------------------

    @abstractmethod
    def _why_official(self) -> str | None:
        """Return what was changed, so that only the official loop answers as it should; None without anything."""

    @abstractmethod
    def _names(self) -> Mapping[str, Any]:
        """Return what the subclass's module has by name, where programs replace what the official loop calls."""

    @abstractmethod
    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        """Return the masks of the crop x0, y0, x1, y1 of an image, best first and in the frame of the image."""

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
        with _passes.setdefault(self.predictor, RLock()):
            data = self._officially_finished(self._generate_masks(image))
        yield sum(len(self.point_grids[layer]) for _, layer in self._crops(image.shape[:2]))
        return self._official_records(data)

    def _officially_finished(self, data: MaskData) -> MaskData:
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        return data

    def _official_records(self, data: MaskData) -> list[dict[str, Any]]:
        names = self._names()
        encode = {"coco_rle": names["coco_encode_rle"], "binary_mask": names["rle_to_mask"]}.get(
            self.output_mode, lambda rle: rle
        )
        corner_and_size = names["box_xyxy_to_xywh"]
        return [
            {
                "segmentation": encode(rle),
                "area": names["area_from_rle"](rle),
                "bbox": corner_and_size(data["boxes"][row]).tolist(),
                "predicted_iou": data["iou_preds"][row].item(),
                "point_coords": [data["points"][row].tolist()],
                "stability_score": data["stability_score"][row].item(),
                "crop_box": corner_and_size(data["crop_boxes"][row]).tolist(),
            }
            for row, rle in enumerate(data["rles"])
        ]

    def _generate_masks(self, image: np.ndarray) -> MaskData:
        """Return the masks of an image [H, W, 3] as arrays, best crop by crop."""
        model, size, data = self.predictor.model, image.shape[:2], self.mask_data()
        generate = self._names()["generate_crop_boxes"]
        crops = crops_of(size, self.crop_n_layers, self.crop_overlap_ratio, model.image_geometry, generate)
        for box, layer in crops:
            data.cat(self._process_crop(image, [*box], layer, size))
        if len(crops) > 1:
            drop_duplicates_of_crops(data, self.crop_nms_thresh, model.kernels)
        data.to_numpy()
        return data
