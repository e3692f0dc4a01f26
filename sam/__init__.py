"""Segment Anything, a drop-in for ``segment_anything``: the model, the predictor, batches, a command line."""

from . import automatic_mask_generator, modeling, predictor, utils
from .automatic_mask_generator import SamAutomaticMaskGenerator
from .build_sam import (
    build_sam,
    build_sam_nano,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    load_model,
    sam_model_registry,
)
from .checkpoint import CheckpointError, save_checkpoint
from .config import VARIANTS, SamConfig
from .drop_in import as_segment_anything
from .embedding import ImageEmbedding
from .masks.results import MaskPrediction
from .modeling import Sam
from .modeling.build import build_from_config
from .predictor import SamPredictor
from .prompts.prompt import Prompt
from .sessions.interactive import InteractiveSession
from .sessions.stream import encode_stream, predict_stream

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "ImageEmbedding",
    "InteractiveSession",
    "MaskPrediction",
    "Prompt",
    "Sam",
    "SamAutomaticMaskGenerator",
    "SamConfig",
    "SamPredictor",
    "as_segment_anything",
    "automatic_mask_generator",
    "build_from_config",
    "build_sam",
    "build_sam_nano",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "encode_stream",
    "load_model",
    "modeling",
    "predict_stream",
    "predictor",
    "sam_model_registry",
    "save_checkpoint",
    "utils",
]
