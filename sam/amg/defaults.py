"""Thresholds of automatic masks that suit the embedded model."""

# It rates its own masks low: with SAM's thresholds, the generator's defaults, next to nothing is left.
NANO_THRESHOLDS = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.8}
