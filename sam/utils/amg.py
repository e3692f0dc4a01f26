"""The helper functions of automatic masks: ``segment_anything.utils.amg``.

Boxes are x0, y0, x1, y1 in pixels unless named XYWH; sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Generator, ItemsView
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import require
from ..masks import regions, rle_encode
from ..masks import rle as run_lengths


class MaskData:
    """Lists, arrays and tensors of the same length under names: a small table of masks."""

    def __init__(self, **kwargs: Any) -> None:
        self._stats: dict[str, Any] = {}
        for key, value in kwargs.items():
            self[key] = value

    def __setitem__(self, key: str, item: Any) -> None:
        if not isinstance(item, list | np.ndarray | Tensor):
            raise TypeError(f"MaskData holds lists, numpy arrays and tensors; {key!r} is a {type(item).__name__}")
        self._stats[key] = item

    def __delitem__(self, key: str) -> None:
        del self._stats[key]

    def __getitem__(self, key: str) -> Any:
        return self._stats[key]

    def items(self) -> ItemsView[str, Any]:
        return self._stats.items()

    def filter(self, keep: Tensor) -> None:
        """Keep the rows that ``keep`` names, by a boolean mask or by index."""
        require("keep", keep, Tensor, "a torch.Tensor of booleans or indices")
        for key, value in self._stats.items():
            if isinstance(value, Tensor):
                self._stats[key] = value[keep.to(value.device)]
            elif isinstance(value, np.ndarray):
                self._stats[key] = value[keep.detach().cpu().numpy()]
            else:
                rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
                self._stats[key] = [value[row] for row in rows.tolist()]

    def cat(self, new_stats: MaskData) -> None:
        """Append the rows of ``new_stats``."""
        require("new_stats", new_stats, MaskData, "a MaskData")
        for key, value in new_stats.items():
            ours = self._stats.get(key)
            if ours is None:
                self._stats[key] = value.clone() if isinstance(value, Tensor) else value.copy()
            elif isinstance(value, Tensor):
                self._stats[key] = torch.cat([ours, value])
            elif isinstance(value, np.ndarray):
                self._stats[key] = np.concatenate([ours, value])
            else:
                self._stats[key] = ours + value

    def to_numpy(self) -> None:
        for key, value in self._stats.items():
            if isinstance(value, Tensor):
                self._stats[key] = value.detach().cpu().numpy()


def is_box_near_crop_edge(boxes: Tensor, crop_box: list[int], orig_box: list[int], atol: float = 20.0) -> Tensor:
    """Return [N], whether a box in a crop's frame is within ``atol`` px of an edge of the crop but not of the image."""
    require("boxes", boxes, Tensor, "a torch.Tensor [N, 4]")
    near = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for side, (of_crop, of_image) in enumerate(zip(crop_box, orig_box, strict=True)):
        placed = (boxes[:, side] + crop_box[side % 2]).float()
        near |= ((placed - of_crop).abs() <= atol) & ~((placed - of_image).abs() <= atol)
    return near


def box_xyxy_to_xywh(box_xyxy: Any) -> Any:
    """Convert corners to corner and size: a tensor or an array [..., 4], or the four numbers of one box as a list."""
    if isinstance(box_xyxy, Tensor | np.ndarray):
        box_xywh: Any = box_xyxy.clone() if isinstance(box_xyxy, Tensor) else box_xyxy.copy()
        box_xywh[..., 2:] -= box_xyxy[..., :2]
        return box_xywh
    x0, y0, x1, y1 = box_xyxy
    return type(box_xyxy)([x0, y0, x1 - x0, y1 - y0])


def batch_iterator(batch_size: int, *args: Any) -> Generator[list[Any], None, None]:
    """Yield slices of ``batch_size`` rows of all ``args`` together; the last may be shorter."""
    if not args or any(len(arg) != len(args[0]) for arg in args):
        raise ValueError(f"batches need inputs of one length, got {[len(arg) for arg in args]}")
    for start in range(0, len(args[0]), batch_size):
        yield [arg[start : start + batch_size] for arg in args]


def mask_to_rle_pytorch(tensor: Tensor) -> list[dict[str, Any]]:
    """Encode masks [N, H, W] bool as uncompressed COCO RLEs."""
    require("masks", tensor, Tensor, "a torch.Tensor [N, H, W] of bool")
    return rle_encode.encode(tensor)


def rle_to_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode an uncompressed COCO RLE to [H, W] bool."""
    require("rle", rle, dict, "a dictionary of size and counts")
    return run_lengths.decode(rle)


def area_from_rle(rle: dict[str, Any]) -> int:
    """Count the mask pixels of an uncompressed RLE."""
    require("rle", rle, dict, "a dictionary of size and counts")
    return run_lengths.area(rle)


def coco_encode_rle(uncompressed_rle: dict[str, Any]) -> dict[str, Any]:
    """Compress an uncompressed RLE, its counts to a string."""
    require("uncompressed_rle", uncompressed_rle, dict, "a dictionary of size and counts")
    return {"size": uncompressed_rle["size"], "counts": run_lengths.compress(uncompressed_rle["counts"])}


def calculate_stability_score(masks: Tensor, mask_threshold: float, threshold_offset: float) -> Tensor:
    """Compute the IoU of the masks [..., H, W] cut from the logits a little above and below the threshold."""
    require("masks", masks, Tensor, "a torch.Tensor [..., H, W] of logits")
    # The higher cut lies inside the lower one, so these are intersection and union.
    inside = (masks > mask_threshold + threshold_offset).sum(dim=(-1, -2), dtype=torch.int32)
    outside = (masks > mask_threshold - threshold_offset).sum(dim=(-1, -2), dtype=torch.int32)
    return inside.float() / outside.float()


def build_point_grid(n_per_side: int) -> np.ndarray:
    """Return [n * n, 2] centres (x, y) of an even grid over the unit square, row by row.

    Raises:
        ValueError: less than one a side.
    """
    require("n_per_side", n_per_side, (int, np.integer), "an int")
    if n_per_side < 1:
        raise ValueError(f"a grid must have at least 1 point a side, got {n_per_side}")
    offset = 1 / (2 * n_per_side)
    side = np.linspace(offset, 1 - offset, n_per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def build_all_layer_point_grids(n_per_side: int, n_layers: int, scale_per_layer: int) -> list[np.ndarray]:
    """Return the grid of the whole image and of each layer of crops, thinner by ``scale_per_layer`` per layer."""
    return [build_point_grid(int(n_per_side / scale_per_layer**layer)) for layer in range(n_layers + 1)]


def generate_crop_boxes(
    im_size: tuple[int, ...], n_layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """Return the whole image and, for layer i, 2^i x 2^i overlapping crops of it.

    Returns:
        boxes, and the layer of each.
    """
    height, width = im_size
    crop_boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / per_side))
        crop_w, crop_h = (math.ceil((overlap * (per_side - 1) + length) / per_side) for length in (width, height))
        starts_x, starts_y = ([(length - overlap) * index for index in range(per_side)] for length in (crop_w, crop_h))
        for x0, y0 in product(starts_x, starts_y):
            crop_boxes.append([x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)])
            layers.append(layer)
    return crop_boxes, layers


def uncrop_boxes_xyxy(boxes: Tensor, crop_box: list[int]) -> Tensor:
    """Move boxes [..., 4] from a crop's frame to the image's."""
    require("boxes", boxes, Tensor, "a torch.Tensor [..., 4]")
    x0, y0 = crop_box[:2]
    return boxes + torch.tensor([x0, y0, x0, y0], device=boxes.device)


def uncrop_points(points: Tensor, crop_box: list[int]) -> Tensor:
    """Move points [..., 2] from a crop's frame to the image's."""
    require("points", points, Tensor, "a torch.Tensor [..., 2]")
    return points + torch.tensor(crop_box[:2], device=points.device)


def uncrop_masks(masks: Tensor, crop_box: list[int], orig_h: int, orig_w: int) -> Tensor:
    """Place masks [..., crop height, crop width] in an empty image."""
    require("masks", masks, Tensor, "a torch.Tensor [..., H, W]")
    x0, y0, x1, y1 = crop_box
    if (x0, y0, x1, y1) == (0, 0, orig_w, orig_h):
        return masks
    return torch.nn.functional.pad(masks, (x0, orig_w - x1, y0, orig_h - y1), value=0)


def remove_small_regions(mask: np.ndarray, area_thresh: float, mode: str) -> tuple[np.ndarray, bool]:
    """Fill holes or drop islands of fewer than ``area_thresh`` pixels, 8-connected.

    When every island is that small the largest stays. Needs SciPy (``pip install fastsam-kernels[amg]``).

    Returns:
        the mask [H, W], and whether it changed.
    """
    masks = torch.from_numpy(np.array(mask, dtype=bool))[None]
    cleaned, changed = regions.remove_small_regions(masks, area_thresh, mode, kernels="torch")
    return cleaned[0].numpy(), bool(changed)


def batched_mask_to_box(masks: Tensor) -> Tensor:
    """Return boxes [..., 4] around masks [..., H, W], last row and column included; zeros for an empty mask."""
    require("masks", masks, Tensor, "a torch.Tensor [..., H, W] of bool")
    if masks.numel() == 0:
        return torch.zeros(*masks.shape[:-2], 4, dtype=torch.float32, device=masks.device)
    rows, columns = masks.any(dim=-1), masks.any(dim=-2)

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        first = line.int().argmax(dim=-1)
        return first, line.shape[-1] - 1 - line.flip(-1).int().argmax(dim=-1)

    (top, bottom), (left, right) = ends(rows), ends(columns)
    return torch.stack([left, top, right, bottom], dim=-1) * rows.any(dim=-1, keepdim=True)
