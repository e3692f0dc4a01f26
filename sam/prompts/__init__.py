"""Prompts: as people give them, checked, and as the decoder takes them, batched."""

from .batch import PromptBatch
from .prompt import Prompt

__all__ = ["Prompt", "PromptBatch"]
