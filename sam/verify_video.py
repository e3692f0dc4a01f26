"""Verify that a model on this machine tracks as the formulas say, in the budgets of :mod:`sam.verify`.

What differs from frame to frame starts from the same memories: those of the truth, as it keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .modeling.promptable import PromptableModel
from .prompts.prompt import Prompt
from .verify import Check, Models, drawn_image
from .video.frames import frame_of
from .video.session import TrackingSession

_FRAMES = 4


@torch.no_grad()
def verify_video(model: PromptableModel, frames: Sequence[np.ndarray] | None = None) -> Iterator[Check]:
    """Compare memories, and a tracked frame of several objects, with plain PyTorch in fp64, and yield the results.

    Args:
        model: of SAM 2, with its memory.
        frames: at least two, [H, W, 3] uint8 RGB; None draws some.

    Yields:
        one check per comparison; the model is right where all have ``passed``.

    Raises:
        TypeError: a model that cannot track.
        ValueError: fewer than two frames.
    """
    frames = drawn_frames(model.image_size) if frames is None else frames
    if len(frames) < 2:
        raise ValueError(f"a frame is tracked from those before it: at least two are needed, got {len(frames)}")
    _begun(model, frames)  # says what cannot track
    models = Models.of(model)
    truth: Any = models.truth
    session = _begun(truth, frames)
    for frame in frames[:-1]:
        session.step(frame)
    earlier = {
        name: {kind: dict(outputs) for kind, outputs in each.outputs.items()} for name, each in session._objects.items()
    }
    asked: list[dict[str, Any]] = []
    hook = truth.memory_attention.register_forward_pre_hook(
        lambda module, given, named: asked.append(named), with_kwargs=True
    )
    try:
        logits = session.step(frames[-1]).low_res_logits
    finally:
        hook.remove()
    for name, given in zip(earlier, asked, strict=True):

        def learnt(m: Any, given: dict[str, Any] = given) -> Tensor:
            result: Tensor = m.memory_attention(**_in(m.dtype, given))
            return result

        yield models.compare("memory attention", str(name), learnt)
    yield models.compare("memory encoder", "all objects", _memories(truth, frames[-1], logits))

    def tracked(m: Any) -> Tensor:
        own = _begun(m, frames)
        own.step(frames[0])
        for name, each in own._objects.items():
            each.outputs = _in(m.dtype, earlier[name])
        own.frame = len(frames) - 2
        return own.step(frames[-1]).low_res_logits

    yield models.compare("tracked frame", "all objects", tracked, masks=True)


def drawn_frames(side: int) -> list[np.ndarray]:
    """Draw a landscape that goes by, frames [H, W, 3] uint8, the same everywhere."""
    return [np.roll(drawn_image(side), index * side // 32, axis=1) for index in range(_FRAMES)]


def _begun(model: Any, frames: Sequence[np.ndarray]) -> TrackingSession:
    """Return a session with two objects to come on the first frame."""
    session = TrackingSession(model, num_frames=len(frames), fill_hole_area=0)
    height, width = frames[0].shape[:2]
    session.add("click", Prompt([[0.4 * width, 0.4 * height]], [1]))
    session.add("box", Prompt(box=[0.2 * width, 0.2 * height, 0.7 * width, 0.8 * height]))
    return session


def _memories(truth: Any, frame: np.ndarray, logits: Tensor) -> Callable[[Any], Tensor]:
    """Return a function of a model that remembers masks with logits [O, h, w] on a frame."""
    features = truth.forward_image(frame_of(truth, frame).pixels[None])["backbone_fpn"][-1]
    masks = F.interpolate(logits[:, None].double(), (truth.image_size,) * 2, mode="bilinear").sigmoid()
    masks = masks * truth.sigmoid_scale_for_mem_enc + truth.sigmoid_bias_for_mem_enc

    def run(m: Any) -> Tensor:
        shared = features.to(m.dtype).expand(len(masks), -1, -1, -1)
        memory: Tensor = m.memory_encoder(shared, masks.to(m.dtype), skip_mask_sigmoid=True)["vision_features"]
        return memory

    return run


def _in(dtype: torch.dtype, values: Any) -> Any:
    """Return tensors of floats anywhere in ``values`` in ``dtype``."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values)
