"""Positional encodings: ``sam2.modeling.position_encoding``."""

from ...modeling.position_encoding import PositionEmbeddingSine, apply_rotary_enc, compute_axial_cis
from ...modeling.prompt_encoder import PositionEmbeddingRandom

__all__ = ["PositionEmbeddingRandom", "PositionEmbeddingSine", "apply_rotary_enc", "compute_axial_cis"]
