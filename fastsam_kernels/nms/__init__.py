"""Greedy non-maximum suppression of boxes."""

from .api import nms, ranked_nms

__all__ = ["nms", "ranked_nms"]
