"""Masks of objects in videos, from prompts on any frames: ``sam2.sam2_video_predictor``.

The loader of frames, the progress bar and what fills holes are looked up in this module when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from ..video.predictor import VideoPredictor
from .utils.misc import concat_points, fill_holes_in_mask_scores, load_video_frames

__all__ = [
    "NO_OBJ_SCORE",
    "SAM2Base",
    "SAM2VideoPredictor",
    "SAM2VideoPredictorVOS",
    "concat_points",
    "fill_holes_in_mask_scores",
    "load_video_frames",
    "tqdm",
]


class SAM2VideoPredictor(VideoPredictor):
    """Track objects through a video: see :class:`~sam.video.predictor.VideoPredictor`, whose methods these are."""

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> VideoPredictor:
        """Build a predictor of the Hugging Face hub, like "facebook/sam2.1-hiera-large".

        Args:
            model_id: name of the model on the hub.
            **kwargs: arguments of :func:`~sam.sam2.build_sam.build_sam2_video_predictor`.
        """
        from .build_sam import build_sam2_video_predictor_hf

        return build_sam2_video_predictor_hf(model_id, **kwargs)

    def _load_frames(self, **arguments: Any) -> tuple[Any, int, int]:
        return load_video_frames(**arguments)

    def _progress(self, frames: Iterable[int]) -> Iterable[int]:
        return tqdm(frames, desc="propagate in video")

    def _fill_holes(self, masks: Tensor) -> Tensor:
        return fill_holes_in_mask_scores(masks, self.fill_hole_area)


class SAM2VideoPredictorVOS(SAM2VideoPredictor):
    """Track with compiled memories, prompt encoder and mask decoder; compiling begins with their first calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compile_all_components()

    def _compile_all_components(self) -> None:
        """Compile the modules of a tracked frame; the number of memories may vary, other shapes are compiled each."""
        modules = (self.memory_encoder, self.memory_attention, self.sam_prompt_encoder, self.sam_mask_decoder)
        for module in modules:
            module.forward = _cloning(
                torch.compile(
                    module.forward, mode="max-autotune", fullgraph=True, dynamic=module is self.memory_attention
                )
            )

    def forward_image(self, img_batch: Tensor) -> dict[str, Any]:
        """Encode images as the parent does, in tensors that the next call leaves as they are."""
        return _cloned(super().forward_image(img_batch))


def _cloning(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that copies its result out of the memory of a CUDA graph, which the next replay overwrites."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _cloned(compiled(*args, **kwargs))

    return call


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _cloned(item) for name, item in value.items()}
    return type(value)(map(_cloned, value)) if isinstance(value, (list, tuple)) else value
