"""Prompts to tokens: ``sam2.modeling.sam.prompt_encoder``."""

from ....modeling.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
from ..sam2_utils import LayerNorm2d

__all__ = ["LayerNorm2d", "PositionEmbeddingRandom", "PromptEncoder"]
