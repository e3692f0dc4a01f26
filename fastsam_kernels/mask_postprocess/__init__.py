"""From the decoder's logits to masks of the image: two operations on one map of logits to pixels."""

from .api import mask_statistics, packed_masks
from .resize_map import Resizing
from .statistics import MaskStatistics
from .words import above, pack_masks, unpack_masks

__all__ = ["MaskStatistics", "Resizing", "above", "mask_statistics", "pack_masks", "packed_masks", "unpack_masks"]
