"""Text prompts: labels to masks, with a detector of the user's choice before the model."""

from .detections import Detections, Detector
from .grounding_dino import GroundingDino
from .load import load_detector
from .owl import Owl
from .segment import TextMasks, segment

__all__ = ["Detections", "Detector", "GroundingDino", "Owl", "TextMasks", "load_detector", "segment"]
