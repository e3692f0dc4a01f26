"""The thresholds of automatic masks where nobody says any, for the generators, commands, the service and its page."""

from __future__ import annotations

from typing import Any

# The official generators'.
SAM_THRESHOLDS = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}
SAM2_THRESHOLDS = {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.95}
# The embedded model rates its own masks low: with SAM's thresholds next to nothing is left.
NANO_THRESHOLDS = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.8}


def is_sam2(model: Any) -> bool:
    """Tell whether a model, a program's own too, is one of SAM 2."""
    return bool(getattr(model, "stretches_images", False))


def thresholds_of(model: Any) -> dict[str, float]:
    """Return the thresholds that suit a model, by the names of the generator's arguments."""
    if is_sam2(model):
        return SAM2_THRESHOLDS
    is_nano = str(getattr(model, "name", "")).partition("-")[0] == "nano"  # quantised too
    return NANO_THRESHOLDS if is_nano else SAM_THRESHOLDS
