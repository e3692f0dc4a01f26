"""Thresholds of automatic masks that suit a model, where they are not those of SAM: the generator's defaults."""

from __future__ import annotations

# The embedded model rates its own masks low: with SAM's thresholds next to nothing is left.
NANO_THRESHOLDS = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.8}
# The official generator's.
SAM2_THRESHOLDS = {"pred_iou_thresh": 0.8}


def thresholds_for(variant: str) -> dict[str, float]:
    """Return the thresholds that suit a variant, those of SAM left out."""
    if variant == "nano":
        return NANO_THRESHOLDS
    return SAM2_THRESHOLDS if variant.startswith("sam2") else {}
