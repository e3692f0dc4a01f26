"""The frames of a video that a frame of SAM 2 attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

Outputs = Mapping[int, Mapping[str, Any]]


class MemoryChoice(NamedTuple):
    """The memories that a frame attends to.

    Attributes:
        maps: the slot of time of each map of memory, and the output that holds it; conditioning frames first.
        pointers: the distance of each object pointer [B, C], and the pointer.
    """

    maps: list[tuple[int, Mapping[str, Any]]]
    pointers: list[tuple[int, Tensor]]


def select_closest_cond_frames(
    frame_idx: int, cond_frame_outputs: Outputs, max_cond_frame_num: int
) -> tuple[Outputs, Outputs]:
    """Choose conditioning frames: the last before ``frame_idx``, the first from it on, then the nearest ones.

    Args:
        frame_idx: the frame that attends to them.
        cond_frame_outputs: outputs of conditioning frames, by frame number.
        max_cond_frame_num: at least 2; -1 chooses all.

    Returns:
        those chosen, and the others.
    """
    if max_cond_frame_num == -1 or len(cond_frame_outputs) <= max_cond_frame_num:
        return cond_frame_outputs, {}
    if max_cond_frame_num < 2:
        raise ValueError(f"at least 2 conditioning frames must be allowed, got {max_cond_frame_num}")
    before = max((t for t in cond_frame_outputs if t < frame_idx), default=None)
    after = min((t for t in cond_frame_outputs if t >= frame_idx), default=None)
    frames = [t for t in (before, after) if t is not None]
    nearest = sorted((t for t in cond_frame_outputs if t not in frames), key=lambda t: abs(t - frame_idx))
    frames += nearest[: max_cond_frame_num - len(frames)]
    chosen = {t: cond_frame_outputs[t] for t in frames}
    return chosen, {t: output for t, output in cond_frame_outputs.items() if t not in chosen}


def output_of(frame: int, tracked: tuple[Outputs, Outputs]) -> Mapping[str, Any] | None:
    """Return the output of a tracked frame, or of a conditioning one that was not chosen; None without either."""
    output = tracked[0].get(frame)
    return tracked[1].get(frame) if output is None else output


def frame_at(frame_idx: int, distance: int, stride: int, track_in_reverse: bool) -> int:
    """Return the frame of a slot of memory: the last one, or of every ``stride``-th that many before it."""
    if distance == 1:
        return frame_idx + 1 if track_in_reverse else frame_idx - 1
    if track_in_reverse:
        return -(-(frame_idx + 2) // stride) * stride + (distance - 2) * stride
    return ((frame_idx - 2) // stride) * stride - (distance - 2) * stride
