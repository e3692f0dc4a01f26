"""Tracking frame by frame, in as much memory as the next frame needs: :class:`TrackingSession`."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import require
from ..masks.regions import fill_small_holes
from ..modeling.sam2_base import SAM2Base
from ..prompts.prompt import Prompt
from ..system.tensors import bytes_held
from .frames import VideoFrame, frame_of
from .object_batch import ObjectBatch, TrackedObjects, why_not_batched
from .prompts import check_prompt, mask_of, points_of
from .results import FrameResult, frame_result
from .tracked_object import TrackedObject

STREAM_LENGTH = 16  # frames by which pointers are timed where the length of a video is not known: as of any longer one
_MAPS = ("backbone_fpn", "vision_pos_enc")


@dataclass(frozen=True)
class _Features:
    """The current frame: maps of its grids, positions of the embedding, and both as the official calls take them."""

    backbone: dict[str, Any]
    tokens: list[Tensor]
    positions: list[Tensor]
    sizes: list[tuple[int, int]]


class TrackingSession:
    """Objects that are tracked through frames, which come one by one.

    Objects are added, corrected and removed at any time. What is kept is exactly what frames to come need: of each
    object the frames with its prompts, its last memories and its last pointers. So a stream runs in constant memory,
    and frames that went by cannot be prompted any more.

    Attributes:
        frame: the number of the current frame; None before the first.
        size: its (height, width); zeros before the first.
    """

    _memory_dtype = torch.bfloat16  # as officially, whatever the dtype of the model

    def __init__(
        self,
        model: SAM2Base,
        *,
        num_frames: int | None = None,
        reverse: bool = False,
        fill_hole_area: int = 8,
    ) -> None:
        """Begin before the first frame.

        Args:
            model: of SAM 2, with its memory.
            num_frames: of the video, where they are known; of fewer than 16 frames they matter.
            reverse: frames come from the last, ``num_frames`` - 1, to the first.
            fill_hole_area: holes of up to so many low-resolution pixels are filled; 0 fills none.

        Raises:
            TypeError: a model that cannot track.
            ValueError: ``reverse`` without ``num_frames``, or a negative area.
        """
        require("model", model, SAM2Base, "a model of SAM 2: the embedded model and SAM do not track")
        if not hasattr(model, "memory_attention"):
            raise TypeError(f"{model.name} is a SAM 2 without memory, of images alone: it cannot track")
        if reverse and num_frames is None:
            raise ValueError("tracking backwards needs num_frames")
        if fill_hole_area < 0:
            raise ValueError(f"fill_hole_area must be at least 0, got {fill_hole_area}")
        self.model: Any = model
        self.frame: int | None = None
        self._num_frames, self._reverse, self._fill_hole_area = num_frames, reverse, fill_hole_area
        self._objects: dict[Hashable, TrackedObject] = {}
        self._scheduled: dict[int, dict[Hashable, Any]] = {}
        self._features: _Features | None = None
        self.size = (0, 0)

    @property
    def objects(self) -> tuple[Hashable, ...]:
        """Return the ids of the objects, in the order in which they were added."""
        return tuple(self._objects)

    @property
    def next_frame(self) -> int:
        """Return the number of the frame that comes next."""
        if self.frame is None:
            assert not self._reverse or self._num_frames is not None
            return self._num_frames - 1 if self._reverse and self._num_frames else 0
        return self.frame - 1 if self._reverse else self.frame + 1

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors that the session holds; memory that several share counts once."""
        return bytes_held([self._features, self._scheduled, *self._objects.values()])

    @property
    def kept_prompts(self) -> list[tuple[Hashable, int]]:
        """Return object and frame of each prompt that the session keeps: those to come, and those it learnt from."""
        learnt = ((each.id, frame) for each in self._objects.values() for frame in each.outputs["cond_frame_outputs"])
        return [*learnt, *((each, frame) for frame, waiting in self._scheduled.items() for each in waiting)]

    def num_points(self, object_id: Hashable) -> int:
        """Return how many points an object has on the current frame; the corners of a box are two."""
        each = self._objects.get(object_id)
        return 0 if each is None or each.points is None else each.points["point_labels"].shape[1]

    def fork(self) -> TrackingSession:
        """Return a session that goes on from here by itself, and leaves this one as it is; tensors are shared."""
        other = copy.copy(self)
        other._objects = {object_id: each.copy() for object_id, each in self._objects.items()}
        other._scheduled = {frame: dict(prompts) for frame, prompts in self._scheduled.items()}
        return other

    # Prompts -----------------------------------------------------------------------------------------------

    def add(self, object_id: Hashable, prompt: Any, frame: int | None = None) -> FrameResult | None:
        """Prompt an object, which may be new.

        On the current frame the answer comes at once: clicks join those of the object on this frame, and correct the
        mask that is there. On a frame to come the prompt waits for it, and the object is learnt anew there.

        Args:
            object_id: any hashable.
            prompt: a :class:`sam.Prompt` of points, a box or both, or a mask [H, W].
            frame: by default the current one, or the first.

        Returns:
            all objects on the current frame; None for a frame to come.

        Raises:
            TypeError, ValueError: a bad prompt, or no frame of the video; nothing is changed.
            LookupError: a frame that was forgotten.
        """
        return self.add_all({object_id: prompt}, frame)

    def add_all(self, prompts: Mapping[Hashable, Any], frame: int | None = None) -> FrameResult | None:
        """Prompt several objects on one frame, each as :meth:`add` does, with one answer for all."""
        for prompt in prompts.values():
            check_prompt(prompt)
        frame = (self.next_frame if self.frame is None else self.frame) if frame is None else frame
        if frame != self.frame:
            if self._num_frames is not None and not 0 <= frame < self._num_frames:
                raise ValueError(f"frame {frame} cannot be prompted: the video has frames 0 to {self._num_frames - 1}")
            if (self.next_frame - frame) * (-1 if self._reverse else 1) > 0:
                raise LookupError(
                    f"frame {frame} cannot be prompted: the next one is {self.next_frame}, and frames that went by "
                    "were forgotten; SAM2VideoPredictor keeps all frames of a video"
                )
            self._scheduled.setdefault(frame, {}).update(prompts)
            return None
        if self._features is None:
            raise LookupError(f"frame {frame} was not saved with the session, so it cannot be prompted")
        self._prompt(prompts)
        return self.result()

    def remove(self, object_id: Hashable) -> None:
        """Forget an object and its prompts to come.

        Raises:
            KeyError: there is none of this id.
        """
        if object_id not in dict(self.kept_prompts):
            raise KeyError(f"there is no object {object_id!r}; the objects are {list(self._objects)}")
        for known in (self._objects, *self._scheduled.values()):
            known.pop(object_id, None)

    # Frames ------------------------------------------------------------------------------------------------

    def step(self, image: Any) -> FrameResult:
        """Track all objects on the next frame.

        Args:
            image: [H, W, 3] uint8 RGB, a file, or a :class:`~sam.video.frames.VideoFrame`.

        Raises:
            TypeError, ValueError, OSError: an image of another kind; nothing is changed.
            IndexError: the video has no more frames.
        """
        return step_together([self], [image])[0]

    def _begin(self, features: _Features, size: tuple[int, int]) -> list[TrackedObject]:
        """Go to the next frame; returns the objects that have no prompt there."""
        self.frame, self._features, self.size = self.next_frame, features, size
        self._forget()
        for each in self._objects.values():
            each.points = each.tracked = None
        prompts = self._scheduled.get(self.frame, {})
        return [each for each in self._objects.values() if each.id not in prompts]

    def _end(self) -> FrameResult:
        assert self.frame is not None
        self._prompt(self._scheduled.pop(self.frame, {}))
        return self.result()

    def _length(self) -> int:
        """Return how many frames there are, by which pointers are timed."""
        assert self.frame is not None
        return max(STREAM_LENGTH, self.frame + 1) if self._num_frames is None else self._num_frames

    def _keep(self, tracked: Sequence[TrackedObject], found: TrackedObjects) -> None:
        """Take what was found of objects without a prompt."""
        assert self.frame is not None
        found = found._replace(masks=fill_small_holes(found.masks, self._fill_hole_area))
        for each, own in zip(tracked, found.one_by_one(), strict=True):
            each.masks, each.iou, each.scores, each.tracked = own.masks, own.iou, own.scores, self.frame
            each.outputs["non_cond_frame_outputs"][self.frame] = {
                "maskmem_features": own.memories.to(self._memory_dtype),
                "maskmem_pos_enc": [own.positions],
                "obj_ptr": own.pointers,
            }

    def _prompt(self, prompts: Mapping[Hashable, Any]) -> None:
        """Predict objects on the current frame from prompts, and make their memories."""
        assert self.frame is not None
        for object_id, prompt in prompts.items():
            each = self._objects.get(object_id) or TrackedObject(object_id)
            points = mask = None
            if isinstance(prompt, Prompt):
                points = self._joined(each.points, prompt)
            else:
                mask = mask_of(prompt, self.model.image_size, self.model.device)
            # An object that is found here already is corrected, with its memories if it was found by them.
            here = each.tracked is not None or self.frame in each.outputs["cond_frame_outputs"]
            output, masks, iou = self._run(each, points, mask, each.masks if here else None)
            each.points, each.masks, each.iou, each.scores = points, masks, iou, output.pop("scores")
            kind = "cond_frame_outputs" if each.tracked is None else "non_cond_frame_outputs"
            each.outputs[kind][self.frame] = output
            self._objects[object_id] = each

    def _joined(self, points: Mapping[str, Tensor] | None, prompt: Prompt) -> dict[str, Tensor]:
        coords, labels = points_of(prompt.points, prompt.labels, prompt.box, prompt.box is not None or points is None)
        size = torch.tensor([self.size[1], self.size[0]])
        new = {"point_coords": coords / size * self.model.image_size, "point_labels": labels}
        new = {name: x.to(self.model.device) for name, x in new.items()}
        if points is None or prompt.box is not None:
            return new
        return {name: torch.cat([points[name], x], dim=1) for name, x in new.items()}

    @torch.no_grad()
    def _run(
        self, each: TrackedObject, points: dict[str, Tensor] | None, mask: Tensor | None, before: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Predict an object on the current frame by the official calls; returns its output, its logits and their IoU.

        The memory of a prompted frame is made of its mask, and not of its logits.
        """
        model, features, limit = self.model, self._features, self.model.low_res_limit
        assert features is not None
        _, answer, _, _ = model._track_step(
            self.frame,
            each.tracked is None,
            features.tokens,
            features.positions,
            features.sizes,
            points,
            mask,
            each.outputs,
            self._length(),
            self._reverse,
            None if before is None or mask is not None else before.clamp(-limit, limit),
        )
        masks = fill_small_holes(answer[3], self._fill_hole_area)
        large = F.interpolate(masks, (model.image_size,) * 2, mode="bilinear", align_corners=False)
        memory, positions = model._encode_new_memory(
            current_vision_feats=features.tokens,
            feat_sizes=features.sizes,
            pred_masks_high_res=torch.where(large > 0, 1024.0, -1024.0),
            object_score_logits=answer[6],
            is_mask_from_pts=True,
        )
        output = {"maskmem_features": memory.to(self._memory_dtype), "maskmem_pos_enc": positions, "obj_ptr": answer[5]}
        return {**output, "scores": answer[6]}, masks, answer[2].float().amax(dim=1)

    def _forget(self) -> None:
        """Drop what neither the current frame nor one to come will read."""
        assert self.frame is not None
        reach = self.model._memory_reach()
        pointers = max(self.model._pointer_limit(self._length()) - 1, reach)
        for each in self._objects.values():
            outputs = each.outputs["non_cond_frame_outputs"]
            for frame in list(outputs):
                away = abs(self.frame - frame)
                if away > pointers:
                    del outputs[frame]
                elif away > reach:
                    outputs[frame] = {"obj_ptr": outputs[frame]["obj_ptr"]}

    def result(self) -> FrameResult:
        """Return the last answers of all objects on the current frame; before the first raise ``LookupError``."""
        if self.frame is None:
            raise LookupError("no frame has been tracked yet")
        return frame_result(self.model, self.frame, list(self._objects.values()), self.size)


@torch.no_grad()
def step_together(sessions: Sequence[TrackingSession], images: Sequence[Any]) -> list[FrameResult]:
    """Track the next frame of several videos at once: their frames are one batch, and so are all their objects.

    Args:
        sessions: of one model, each once.
        images: a frame of each, as :meth:`TrackingSession.step` takes it.

    Returns:
        the result of each.

    Raises:
        ValueError: sessions of several models, or another number of images.
        TypeError, OSError, IndexError: as :meth:`TrackingSession.step`; no session is changed.
    """
    if len(sessions) != len(images) or len({id(session) for session in sessions}) != len(sessions):
        raise ValueError(f"{len(sessions)} sessions, each once, need as many images, got {len(images)}")
    if not sessions:
        return []
    model = sessions[0].model
    if any(session.model is not model for session in sessions):
        raise ValueError("sessions that are tracked together must be of one model")
    for session in sessions:
        if session._num_frames is not None and not 0 <= session.next_frame < session._num_frames:
            raise IndexError(f"the video has {session._num_frames} frames, and all of them were tracked")
    frames = [image if isinstance(image, VideoFrame) else frame_of(model, image) for image in images]
    backbone = encode_frames(model, frames)
    tracked = []
    for row, (session, frame) in enumerate(zip(sessions, frames, strict=True)):
        tracked.append(session._begin(_features(model, backbone, row), frame.size))
    _track(sessions, tracked, backbone)
    return [session._end() for session in sessions]


@torch.no_grad()
def encode_frames(model: Any, frames: Sequence[VideoFrame]) -> dict[str, list[Tensor]]:
    """Return maps and positions of all frames, as :meth:`SAM2Base.forward_image` does; of encoded ones, theirs."""
    encoded = [frame.backbone for frame in frames if frame.backbone is not None]
    if len(encoded) == len(frames):
        levels = {name: zip(*(each[name] for each in encoded), strict=True) for name in _MAPS}
        return {name: [torch.cat(maps) for maps in of_frames] for name, of_frames in levels.items()}
    return model.forward_image(torch.stack([frame.pixels for frame in frames]))


def encode_ahead(model: Any, frames: Sequence[VideoFrame]) -> list[VideoFrame]:
    """Return frames with their maps, made in one pass."""
    backbone = encode_frames(model, frames)
    return [frame._replace(backbone=_maps_of(backbone, row)) for row, frame in enumerate(frames)]


def _maps_of(backbone: Mapping[str, Any], row: int) -> dict[str, list[Tensor]]:
    return {name: [x[row : row + 1] for x in backbone[name]] for name in _MAPS}


def _features(model: Any, backbone: Mapping[str, Any], row: int) -> _Features:
    own = {name: [x.to(model.dtype) for x in maps] for name, maps in _maps_of(backbone, row).items()}
    return _Features(*model._prepare_backbone_features(own))


def _track(
    sessions: Sequence[TrackingSession], tracked: Sequence[Sequence[TrackedObject]], backbone: Mapping[str, Any]
) -> None:
    """Track the objects of each session that have no prompt on its current frame."""
    model = sessions[0].model
    if not any(tracked):
        return
    if why_not_batched(model) is not None:
        for session, objects in zip(sessions, tracked, strict=True):
            for each in objects:
                session._keep([each], _by_official_calls(session, each))
        return
    choices, lengths, rows = [], [], []
    for row, (session, objects) in enumerate(zip(sessions, tracked, strict=True)):
        for each in objects:
            choices.append(model._choose_memories(session.frame, each.outputs, session._length(), session._reverse))
            lengths.append(session._length())
            rows.append(row)
    maps = [x.to(model.dtype) for x in backbone["backbone_fpn"]]
    found = ObjectBatch(model).track(maps, backbone["vision_pos_enc"][-1][:1], choices, lengths, rows)
    start = 0
    for session, objects in zip(sessions, tracked, strict=True):
        session._keep(objects, found.rows(start, start + len(objects)))
        start += len(objects)


def _by_official_calls(session: TrackingSession, each: TrackedObject) -> TrackedObjects:
    model, features = session.model, session._features
    assert features is not None
    current, answer, _, _ = model._track_step(
        *(session.frame, False, features.tokens, features.positions, features.sizes, None, None),
        *(each.outputs, session._length(), session._reverse, None),
    )
    _, _, ious, masks, large, pointers, scores = answer
    model._encode_memory_in_output(features.tokens, features.sizes, None, True, large, scores, current)
    memories, positions = current["maskmem_features"], current["maskmem_pos_enc"]
    return TrackedObjects(masks, ious.amax(dim=1), scores, pointers, memories, positions[-1][:1])
