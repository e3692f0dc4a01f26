"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastsam_kernels import choice_for, nms

from .amg.crop_pipeline import Criteria, Crop, masks_of_crop
from .amg.memory_plan import MaskMemory, parse_bytes
from .checks import naming, require
from .embedding import ImageEmbedding
from .images.geometry import resized_size
from .images.prepare import CheckedImage
from .masks import rle as run_lengths
from .masks.upscale import remove_small_regions
from .modeling import Sam
from .predictor import SamPredictor
from .prompts.checks import check_finite
from .system.device_profile import device_profile
from .utils.amg import (
    MaskData,
    area_from_rle,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    generate_crop_boxes,
    mask_to_rle_pytorch,
    rle_to_mask,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# No image has a side of more than 2^30 pixels; how many layers one has room for is known when it comes.
_MOST_LAYERS = 30


class SamAutomaticMaskGenerator:
    """Clicks on a grid, of the image and if asked of crops of it; keeps what is confident, stable and new.

    The official generator: same arguments, records and order. One generator may be used from several threads.
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
        """Take the official arguments and some of ours.

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
                takes chunks that suit most machines and refuses nothing; on a GPU they follow the memory that is free,
                and the last bits of results follow them.
            progress: True shows a bar on stderr; a function is called with the clicks done and their number in all
                after each batch.
            resize_on_device: see :meth:`sam.Sam.encode`.

        Raises:
            ValueError: both or none of ``points_per_side`` and ``point_grids``, a number out of its range or NaN, a
                layer without a click a side or without a grid, a grid that is not [N, 2], an unknown ``output_mode``,
                or a ``max_memory`` that is no size; from ``generate``, one that a single click or mask does not fit.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("exactly one of points_per_side and point_grids must be given")
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_OUTPUT_MODES)}, got {output_mode!r}")
        _check_range("points_per_batch", points_per_batch, 1)
        _check_range("crop_n_layers", crop_n_layers, 0, _MOST_LAYERS)
        _check_range("crop_overlap_ratio", crop_overlap_ratio, 0, 1)
        _check_range("min_mask_region_area", min_mask_region_area, 0)
        for name, value in (("pred_iou_thresh", pred_iou_thresh), ("stability_score_thresh", stability_score_thresh)):
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value}")
        check_finite("stability_score_offset", np.asarray(stability_score_offset))
        check_finite("box_nms_thresh", np.asarray(box_nms_thresh))
        check_finite("crop_nms_thresh", np.asarray(crop_nms_thresh))
        if points_per_side is not None:
            _check_range("points_per_side", points_per_side, 1)
            if not crop_n_points_downscale_factor > 0:  # NaN is not
                raise ValueError(
                    f"crop_n_points_downscale_factor must be more than 0, got {crop_n_points_downscale_factor}"
                )
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        assert point_grids is not None
        self.point_grids = [_grid(points) for points in point_grids]
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
        """Masks of everything in an image.

        Args:
            image: [H, W, 3] uint8 RGB, or floating-point in 0..1.

        Returns:
            a record a mask: segmentation ([H, W] bool, or an RLE), area (pixels), bbox (XYWH), predicted_iou,
            point_coords ([[x, y]], the click), stability_score, crop_box (XYWH, where the click was made).

        Raises:
            TypeError, ValueError: another kind of image, or one too long and thin to be resized.
        """
        (records,) = self.generate_batch([image])
        return records

    def generate_batch(self, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        """``generate`` for images of any sizes, several of which, or of their crops, are encoded together on a GPU.

        Returns:
            the records of each image, in the order of the images.

        Raises:
            TypeError, ValueError: an image as ``generate`` refuses it, named by its place; nothing was encoded.
        """
        require("images", images, (Sequence, np.ndarray), "a list of arrays [H, W, 3]")
        checked, plans = [], []
        for index, image in enumerate(images):
            with naming(f"image {index}" if len(images) > 1 else None):
                checked.append(self._checked(image))
                plans.append(self._crop_boxes(checked[-1].shape[:2]))
        images = checked
        parts = [image[y0:y1, x0:x1] for image, plan in zip(images, plans, strict=True) for (x0, y0, x1, y1), _ in plan]
        embeddings = self._embeddings(parts)
        report = _Progress(self.progress, sum(len(self.point_grids[layer]) for plan in plans for _, layer in plan))
        with report:
            return [
                report.follow(self._steps(embeddings, plan, image.shape[:2]))
                for image, plan in zip(images, plans, strict=True)
            ]

    def steps(self, image: np.ndarray | ImageEmbedding) -> Generator[int, None, list[dict[str, Any]]]:
        """``generate`` in pieces, for who has other work between them: it pauses after each batch of clicks.

        An embedding serves in place of the image where no crops are asked for. Yields the number of clicks of the
        batch; the generator returns the records.

        Raises:
            TypeError, ValueError: an image as ``generate`` refuses it, or an embedding where there are crops to be
                encoded.
        """
        if not isinstance(image, ImageEmbedding):
            image = self._checked(image)
            size = image.shape[:2]
            plan = self._crop_boxes(size)
            return self._steps(self._embeddings([image[y0:y1, x0:x1] for (x0, y0, x1, y1), _ in plan]), plan, size)
        if self.crop_n_layers > 0:
            raise ValueError(f"crop_n_layers={self.crop_n_layers} needs the image, got its embedding")
        self.predictor.model.check_embedding(image)
        height, width = image.geometry.original_size
        return self._steps(iter([image]), [((0, 0, width, height), 0)], (height, width))

    def _checked(self, image: np.ndarray) -> np.ndarray:
        """Return an image that can be embedded as uint8; ``TypeError`` or ``ValueError`` of another."""
        return CheckedImage.of(image, self.predictor.model.image_geometry).pixels

    def _crop_boxes(self, size: tuple[int, ...]) -> list[tuple[tuple[int, int, int, int], int]]:
        """Boxes in an image of ``size`` that clicks are made in, and the layer of each.

        None without a pixel, before or after the resize.

        Raises:
            ValueError: so many layers that the last one's crops are smaller than a pixel. One layer is always allowed.
        """
        height, width = size
        limit = max(1, max(size).bit_length() - 1)
        if self.crop_n_layers > limit:
            raise ValueError(
                f"crop_n_layers must be at most {limit} for an image of {width}x{height}, got {self.crop_n_layers}: "
                "the crops of a further layer are smaller than a pixel"
            )
        long_side = self.predictor.model.image_encoder.img_size

        def shows(x0: int, y0: int, x1: int, y1: int) -> bool:
            return x0 < x1 and y0 < y1 and min(resized_size(y1 - y0, x1 - x0, long_side)) > 0

        boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        crops = zip(boxes, layers, strict=True)
        return [((x0, y0, x1, y1), layer) for (x0, y0, x1, y1), layer in crops if shows(x0, y0, x1, y1)]

    @torch.no_grad()
    def _embeddings(self, parts: Sequence[np.ndarray]) -> Iterator[ImageEmbedding]:
        """Encode when they are asked for, several together where that pays."""
        model = self.predictor.model
        # Several threads may be here at once, so each call has a predictor of its own, unless a user patched the one.
        predictor = self.predictor if "set_image" in vars(self.predictor) else copy(self.predictor)
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
        self,
        embeddings: Iterator[ImageEmbedding],
        plan: list[tuple[tuple[int, int, int, int], int]],
        size: tuple[int, ...],
    ) -> Generator[int, None, list[dict[str, Any]]]:
        """The records of an image of ``size`` whose crops are in ``plan`` and come next from ``embeddings``."""
        model = self.predictor.model
        criteria = Criteria(
            self.pred_iou_thresh, self.stability_score_thresh, self.stability_score_offset, self.box_nms_thresh
        )
        data = MaskData()
        for (box, layer), embedding in zip(plan, embeddings, strict=False):
            crop = Crop(embedding, box, (size[0], size[1]))
            height, width = embedding.geometry.original_size
            memory = MaskMemory.plan(model, (height, width), self.points_per_batch, self.max_memory)
            clicks = self.point_grids[layer] * (width, height)
            data.cat((yield from masks_of_crop(model, crop, clicks, criteria, memory)))
        if len(plan) > 1:
            x0, y0, x1, y1 = data["crop_boxes"].unbind(1)
            smaller_first = 1 / ((x1 - x0) * (y1 - y0)).float()
            data.filter(nms(data["boxes"], smaller_first, self.crop_nms_thresh, kernels=_on_the_host(model.kernels)))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = _clean(data, self.min_mask_region_area, threshold, model.device, model.kernels)
        return self._records(data)

    def _records(self, data: MaskData) -> list[dict[str, Any]]:
        columns = {
            "segmentation": self._segmentations(data["rles"]),
            "area": [area_from_rle(rle) for rle in data["rles"]],
            "bbox": box_xyxy_to_xywh(data["boxes"]).tolist(),
            "predicted_iou": data["iou_preds"].tolist(),
            "point_coords": data["points"][:, None].tolist(),
            "stability_score": data["stability_score"].tolist(),
            "crop_box": box_xyxy_to_xywh(data["crop_boxes"]).tolist(),
        }
        return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]

    def _segmentations(self, rles: list[dict[str, Any]]) -> list[Any]:
        if self.output_mode == "binary_mask":
            return [rle_to_mask(rle) for rle in rles]
        if self.output_mode == "uncompressed_rle":
            return rles
        strings = run_lengths.compress_all([rle["counts"] for rle in rles])
        return [{"size": rle["size"], "counts": string} for rle, string in zip(rles, strings, strict=True)]

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Clean every mask of regions under ``min_area`` pixels, then drop what became a duplicate.

        Masks that were clean win over those that had to be changed. Needs SciPy on a CPU.
        """
        return _clean(mask_data, min_area, nms_thresh, torch.device("cpu"))


def _check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``least <= value <= most``, which NaN never is."""
    if not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _grid(points: Any) -> np.ndarray:
    """Clicks [N, 2] in the unit square as an array."""
    grid = np.asarray(points, dtype=np.float64)
    if grid.shape == (0,):
        return grid.reshape(0, 2)
    if grid.ndim != 2 or grid.shape[1] != 2:
        raise ValueError(f"each of point_grids must be [N, 2], got {list(grid.shape)}")
    check_finite("point_grids", grid)
    return grid


def _on_the_host(kernels: str) -> str:
    """Return what ``kernels`` of a model means for boxes that are on the host already."""
    return "reference" if choice_for(kernels, "nms") == "reference" else "torch"


def _clean(data: MaskData, min_area: int, nms_thresh: float, device: torch.device, kernels: str = "auto") -> MaskData:
    """Do ``postprocess_small_regions`` with the components found on ``device``."""
    if not data["rles"]:
        return data
    rles, boxes = list(data["rles"]), data["boxes"].clone()
    untouched = torch.ones(len(rles), dtype=torch.float32, device=boxes.device)
    for index, rle in enumerate(rles):
        mask = torch.from_numpy(rle_to_mask(rle))[None].to(device)
        mask, filled = remove_small_regions(mask, min_area, "holes", kernels)
        mask, dropped = remove_small_regions(mask, min_area, "islands", kernels)
        if filled or dropped:
            untouched[index] = 0
            (rles[index],) = mask_to_rle_pytorch(mask)
            boxes[index] = batched_mask_to_box(mask)[0]
    data["rles"], data["boxes"] = rles, boxes
    data.filter(nms(boxes, untouched, nms_thresh, kernels=_on_the_host(kernels)))
    return data


class _Progress:
    """Tells of clicks that are done: a bar on stderr, a function, or nothing."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self._call = progress if callable(progress) else None
        self._bar = tqdm(total=total, desc="clicks", leave=False) if progress is True else None
        self._done, self._total = 0, total

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def follow(self, steps: Generator[int, None, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Go through to the end; what the generator returns."""
        while True:
            try:
                count = next(steps)
            except StopIteration as stop:
                return stop.value
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            if self._call is not None:
                self._call(self._done, self._total)
