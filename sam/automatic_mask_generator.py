"""``SamAutomaticMaskGenerator``: masks of everything in an image, from a grid of clicks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsam_kernels import Resizing, mask_statistics, nms, packed_masks

from . import rle as run_lengths
from .embedding import ImageEmbedding
from .memory import MaskMemory, parse_bytes
from .modeling import Sam
from .postprocess import remove_small_regions
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
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_points,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
_CROPS_AT_ONCE = 8  # a pass of the encoder on a GPU


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
        *,
        max_memory: int | str | None = None,
        progress: bool | Callable[[int, int], None] = False,
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
            progress: True shows a bar on stderr; a function is called with the clicks done and their number in all
                after each batch.

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
        self.progress = progress
        self.max_memory = None if max_memory is None else parse_bytes(max_memory)

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
        (records,) = self.generate_batch([image])
        return records

    @torch.no_grad()
    def generate_batch(self, images: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        """``generate`` for images of any sizes, several of which, or of their crops, are encoded together on a GPU.

        Returns:
            the records of each image, in the order of the images.

        Raises:
            TypeError, ValueError: an image of another kind, named by its place; nothing was encoded.
        """
        crops: list[np.ndarray] = []
        plans: list[list[tuple[list[int], int]]] = []
        for index, image in enumerate(images):
            try:
                validate_image(image)
            except (TypeError, ValueError) as error:
                raise type(error)(f"image {index}: {error}" if len(images) > 1 else str(error)) from None
            plans.append(self._crops(image.shape[:2]))
            crops += [image[y0:y1, x0:x1] for (x0, y0, x1, y1), _ in plans[-1]]
        embeddings = self._embeddings(crops)
        report = _Progress(self.progress, sum(len(self.point_grids[layer]) for plan in plans for _, layer in plan))
        results = []
        for image, plan in zip(images, plans, strict=True):
            steps = self._steps(embeddings, plan, image.shape[:2])
            results.append(report.drain(steps))
        report.close()
        return results

    @torch.no_grad()
    def steps(self, image: np.ndarray | ImageEmbedding) -> Generator[int, None, list[dict[str, Any]]]:
        """``generate`` in pieces, for who has other work between them: it pauses after each batch of clicks.

        An embedding serves in place of the image where no crops are asked for. Yields the number of clicks of the
        batch; the generator returns the records.

        Raises:
            TypeError, ValueError: another kind of image, or an embedding where there are crops to be encoded.
        """
        if isinstance(image, ImageEmbedding):
            if len(self.point_grids) > 1:
                raise ValueError(f"crop_n_layers={len(self.point_grids) - 1} needs the image, got its embedding")
            self.predictor.model._check_embedding(image)
            size = image.geometry.original_size
            return (yield from self._steps(iter([image]), self._crops(size), size))
        height, width = validate_image(image).shape[:2]
        plan = self._crops((height, width))
        embeddings = self._embeddings([image[y0:y1, x0:x1] for (x0, y0, x1, y1), _ in plan])
        return (yield from self._steps(embeddings, plan, (height, width)))

    def _crops(self, size: tuple[int, ...]) -> list[tuple[list[int], int]]:
        """Boxes in an image of ``size`` that clicks are made in, and the layer of each."""
        return list(zip(*generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio), strict=True))

    def _embeddings(self, crops: Sequence[np.ndarray]) -> Iterator[ImageEmbedding]:
        """Encode when they are asked for, several together where that pays."""
        predictor, model = self.predictor, self.predictor.model
        at_once = 1 if model.device.type == "cpu" else _CROPS_AT_ONCE
        for start in range(0, len(crops), at_once):
            some = crops[start : start + at_once]
            if len(some) > 1:
                yield from model.encode(some)
            else:
                predictor.set_image(some[0])
                embedding = predictor.embedding
                predictor.reset_image()
                yield embedding

    def _steps(
        self, embeddings: Iterator[ImageEmbedding], plan: list[tuple[list[int], int]], size: tuple[int, ...]
    ) -> Generator[int, None, list[dict[str, Any]]]:
        """The records of an image of ``size`` whose crops are in ``plan`` and come next from ``embeddings``."""
        data = MaskData()
        for crop_box, layer in plan:
            data.cat((yield from self._process_crop(next(embeddings), crop_box, layer, size)))
        if len(plan) > 1:
            x0, y0, x1, y1 = data["crop_boxes"].unbind(1)
            smaller_first = 1 / ((x1 - x0) * (y1 - y0))
            data.filter(self._suppress(data["boxes"], smaller_first.to(data["boxes"].device), self.crop_nms_thresh))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        return self._records(data)

    def _records(self, data: MaskData) -> list[dict[str, Any]]:
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

    def _process_crop(
        self, embedding: ImageEmbedding, crop_box: list[int], crop_layer_idx: int, orig_size: tuple[int, ...]
    ) -> Generator[int, None, MaskData]:
        geometry, model = embedding.geometry, self.predictor.model
        height, width = geometry.original_size
        resizing = Resizing(geometry.image_size, geometry.input_size, geometry.original_size)
        memory = MaskMemory.plan(model, (height, width), self.points_per_batch, self.max_memory)

        def encode(masks: list[Any]) -> list[Any]:
            return self._encode(masks, resizing, crop_box, orig_size, memory.masks_at_once)

        clicks = self.point_grids[crop_layer_idx] * (width, height)
        data = MaskData()
        masks: list[Any] = []  # logits of low resolution, or the RLE once there were too many of them
        held, done = 0, 0
        for (points,) in batch_iterator(memory.points_at_once, clicks):
            batch, low_res = self._process_batch(points, embedding, resizing, crop_box, orig_size)
            batch["clicks"] += done
            done += len(points)
            data.cat(batch)
            masks.extend(low_res)
            held += low_res.nbytes
            if held > memory.held_bytes:
                masks, held = encode(masks), 0
            yield len(points)
        keep = self._suppress(data["boxes"], data["iou_preds"], self.box_nms_thresh)
        data.filter(keep)
        data["rles"] = encode([masks[index] for index in keep.tolist()])
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(torch.as_tensor(clicks)[data["clicks"].cpu()], crop_box)
        data["crop_boxes"] = torch.tensor([crop_box] * len(keep), dtype=torch.int64).reshape(-1, 4)
        del data["clicks"]
        return data

    def _process_batch(
        self,
        points: np.ndarray,
        embedding: ImageEmbedding,
        resizing: Resizing,
        crop_box: list[int],
        orig_size: tuple[int, ...],
    ) -> tuple[MaskData, Tensor]:
        """Decode some clicks: masks [N, h, w], of low resolution, of those worth keeping, and what is known of them.

        On a GPU the host waits twice, to know how many are left: after the predicted IoU, which decides before
        anything is computed at full size, and after stability, which decides before a mask is made.
        """
        model = self.predictor.model
        low_res, iou, clicks = self._confident(points, embedding)
        statistics = mask_statistics(
            low_res,
            resizing,
            threshold=model.mask_threshold,
            offset=self.stability_score_offset,
            kernels=model.kernels,
        )
        height, width = orig_size
        good = ~is_box_near_crop_edge(statistics.boxes, crop_box, [0, 0, width, height])
        if self.stability_score_thresh > 0:
            good &= statistics.stability >= self.stability_score_thresh
        rows = good.nonzero()[:, 0]
        data = MaskData(
            iou_preds=iou[rows],
            stability_score=statistics.stability[rows],
            boxes=statistics.boxes[rows],
            clicks=clicks[rows],
        )
        return data, low_res[rows]

    def _confident(self, points: np.ndarray, embedding: ImageEmbedding) -> tuple[Tensor, Tensor, Tensor]:
        """Of the masks at clicks [P, 2], those of enough predicted IoU: logits [N, h, w], IoU [N], their click [N]."""
        predictor, model = self.predictor, self.predictor.model
        size = embedding.geometry.original_size
        coords = torch.as_tensor(predictor.transform.apply_coords(points, size))[:, None]
        batch = PromptBatch.from_tensors((coords, torch.ones(coords.shape[:2])), None, None, model.device)
        low_res, iou = model.decode([embedding], batch, multimask_output=True)
        clicks = torch.arange(len(points), device=iou.device).repeat_interleave(iou.shape[1])
        low_res, iou = low_res.flatten(0, 1), iou.flatten()
        if self.pred_iou_thresh <= 0:
            return low_res, iou, clicks
        rows = (iou > self.pred_iou_thresh).nonzero()[:, 0]
        return low_res[rows], iou[rows], clicks[rows]

    def _suppress(self, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        return nms(boxes, scores, threshold, kernels=self.predictor.model.kernels)

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

        Masks that were clean win over those that had to be changed. Needs SciPy on a CPU.
        """
        if not mask_data["rles"]:
            return mask_data
        rles, boxes = list(mask_data["rles"]), mask_data["boxes"].clone()
        untouched = torch.ones(len(rles), device=boxes.device)
        for index, rle in enumerate(rles):
            mask = torch.from_numpy(rle_to_mask(rle))[None].to(boxes.device)
            mask, filled = remove_small_regions(mask, min_area, "holes")
            mask, dropped = remove_small_regions(mask, min_area, "islands")
            if filled or dropped:
                untouched[index] = 0
                (rles[index],) = mask_to_rle_pytorch(mask)
                boxes[index] = batched_mask_to_box(mask)[0]
        mask_data["rles"], mask_data["boxes"] = rles, boxes
        mask_data.filter(nms(boxes, untouched, nms_thresh))
        return mask_data


class _Progress:
    """Tells of clicks that are done: a bar on stderr, a function, or nothing."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self._call = progress if callable(progress) else None
        self._bar = tqdm(total=total, desc="clicks", leave=False) if progress is True else None
        self._done, self._total = 0, total

    def drain(self, steps: Generator[int, None, Any]) -> Any:
        """Run to the end; what the generator returns."""
        try:
            while True:
                count = next(steps)
                self._done += count
                if self._bar is not None:
                    self._bar.update(count)
                if self._call is not None:
                    self._call(self._done, self._total)
        except StopIteration as stop:
            return stop.value

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
