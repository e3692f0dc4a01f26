"""Verify that a model on this machine tracks as the formulas say, in the budgets of :mod:`sam.verify`.

Single steps start from the same memories: those of the truth, as it keeps them. Then a whole video is tracked, where
each model goes on from memories of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastsam_kernels.numerics import Budget, relative_error

from .modeling.promptable import PromptableModel
from .prompts.prompt import Prompt
from .verify import Check, Models, drawn_image, least_iou
from .video.frames import frame_of
from .video.session import TrackingSession

_STEP_FRAMES = 4  # of which the last is the one that is compared
DRIFT_FRAMES = 20
# A CPU tracks so many tokens of frames; a frame of 1024 px in fp64 takes it a while.
_CPU_TOKENS, _LEAST_DRIFT = DRIFT_FRAMES * 32**2, 5


class FrameDrift(NamedTuple):
    """Holds a frame of a video: ``error`` and ``noise`` as of a :class:`Check`, the smallest IoU, the objects seen."""

    error: float
    noise: float
    mask_iou: float
    seen: int


@dataclass(frozen=True)
class Drift(Check):
    """Hold the comparison of a video, of its frames together and of each.

    Attributes:
        frames: those that are tracked, in their order.
    """

    frames: tuple[FrameDrift, ...] = ()

    @property
    def growth(self) -> float:
        """Return the factor by which the error grows from a frame to the next, of the line through its logarithms."""
        logs = np.log([max(frame.error, np.finfo(float).eps) for frame in self.frames])
        return float(np.exp(np.polyfit(range(len(logs)), logs, 1)[0])) if len(logs) > 1 else 1.0

    def to_dict(self) -> dict[str, Any]:
        frames = [frame._asdict() for frame in self.frames]
        return {**super().to_dict(), "frames": frames, "growth": self.growth}


def drift_frames(model: PromptableModel) -> int:
    """Return over how many frames drift is measured: 20, on a CPU fewer where frames are larger than 512 px."""
    if model.device.type != "cpu":
        return DRIFT_FRAMES
    return max(_LEAST_DRIFT, min(DRIFT_FRAMES, _CPU_TOKENS // (model.image_size // 16) ** 2))


@torch.no_grad()
def verify_video(
    model: PromptableModel, frames: Sequence[np.ndarray] | None = None, drift: int | None = None
) -> Iterator[Check]:
    """Compare memories, a tracked frame and a tracked video with plain PyTorch in fp64, and yield the results.

    Args:
        model: of SAM 2, with its memory.
        frames: at least two, [H, W, 3] uint8 RGB, of which the first ``drift`` are the video; None draws some.
        drift: frames of the video, at least two; by default :func:`drift_frames`.

    Yields:
        one check per comparison, the last one a :class:`Drift`; the model is right where all have ``passed``.

    Raises:
        TypeError: a model that cannot track.
        ValueError: fewer than two frames.
    """
    count = drift_frames(model) if drift is None else drift
    for number in (count, _STEP_FRAMES if frames is None else len(frames)):
        if number < 2:
            raise ValueError(f"a frame is tracked from those before it: at least two are needed, got {number}")
    video = drawn_frames(model.image_size, max(count, _STEP_FRAMES)) if frames is None else frames
    _begun(model, video)  # says what cannot track
    models = Models.of(model)
    yield from _step_checks(models, video[:_STEP_FRAMES])
    yield compare_videos(models, video[:count])


def _step_checks(models: Models, frames: Sequence[np.ndarray]) -> Iterator[Check]:
    """Compare memories, and a tracked frame of several objects, that start from the memories of the truth."""
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


def compare_videos(models: Models, frames: Sequence[np.ndarray]) -> Drift:
    """Track a video with each model; of its error and its noise those of the worst object count.

    Memories are as wide as the model: bf16, in which they are kept else, rounds either way and would hide the rest.
    Logits are cut as officially at 32, or those of absent objects would outweigh all others.
    """
    limit: Any = models.ours.low_res_limit

    def tracked(model: Any) -> Tensor:
        session = _begun(model, frames)
        session._memory_dtype = model.dtype
        logits = [session.step(frame).low_res_logits.double().clamp(-limit, limit) for frame in frames]
        return torch.stack(logits[1:])  # the first one has the prompts

    result, plain, truth = map(tracked, (models.ours, models.plain, models.truth))

    def worst(logits: Tensor, rows: slice | int = slice(None)) -> float:
        objects = range(truth.shape[1])
        return max(relative_error(logits[rows, index], truth[rows, index]) for index in objects)

    rows = range(len(truth))
    seen = (truth > -limit).flatten(2).any(2).sum(1).tolist()
    of_frames = tuple(
        FrameDrift(worst(result, row), worst(plain, row), least_iou(result[row], truth[row]), seen[row]) for row in rows
    )
    error, noise = worst(result), worst(plain)
    case = f"{len(frames)} frames of {models.ours.image_size} px"
    budget = Budget(noise, models.ours.dtype).limit
    least = min(frame.mask_iou for frame in of_frames)
    return Drift("tracked video", case, error, noise, budget, least, of_frames)


def drawn_frames(side: int, count: int) -> list[np.ndarray]:
    """Draw a landscape that goes by, frames [H, W, 3] uint8, the same everywhere."""
    return [np.roll(drawn_image(side), index * side // 32, axis=1) for index in range(count)]


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
