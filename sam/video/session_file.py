"""Sessions of tracking on disk: all that the next frame needs, so that a process may end and another go on."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..modeling.sam2_base import SAM2Base
from ..prompts.prompt import Prompt
from ..system.atomic_write import write_atomically
from .session import TrackingSession
from .tracked_object import TrackedObject

_FORMAT = 1
_OF_OBJECT = ("masks", "iou", "scores")


def save_session(session: TrackingSession, path: str | os.PathLike[str]) -> None:
    """Save a session; the file appears when it is whole.

    The features of the current frame are left out: in a session that was loaded it can not be prompted.

    Raises:
        ValueError: the id of an object is no text and no whole number.
    """
    for object_id in {*session._objects, *(each for frame in session._scheduled.values() for each in frame)}:
        if type(object_id) not in (int, str):
            raise ValueError(f"only objects whose ids are text or whole numbers are saved, got {object_id!r}")
    state = {
        "format": _FORMAT,
        "model_hash": session.model.model_hash,
        "frame": session.frame,
        "num_frames": session._num_frames,
        "reverse": session._reverse,
        "fill_hole_area": session._fill_hole_area,
        "size": session.size,
        "objects": [
            {"id": each.id, "outputs": each.outputs, **{name: getattr(each, name) for name in _OF_OBJECT}}
            for each in session._objects.values()
        ],
        "scheduled": {
            frame: {object_id: _prompt_state(prompt) for object_id, prompt in of_frame.items()}
            for frame, of_frame in session._scheduled.items()
        },
    }
    with write_atomically(path) as partial:
        torch.save(state, partial)


def load_session(path: str | os.PathLike[str], model: SAM2Base) -> TrackingSession:
    """Load a session that :func:`save_session` wrote, for the model that made it.

    Raises:
        ValueError: no such file, another format, or another model.
    """
    try:
        state = torch.load(path, map_location=model.device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is no saved session: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)} is no saved session of this version")
    if state["model_hash"] != model.model_hash:
        raise ValueError(f"the session was made by model {state['model_hash']}, not by this one, {model.model_hash}")
    options = {name: state[name] for name in ("num_frames", "reverse", "fill_hole_area")}
    session = TrackingSession(model, **options)
    session.frame, session.size = state["frame"], tuple(state["size"])
    for each in state["objects"]:
        session._objects[each["id"]] = TrackedObject(**each)
    for frame, of_frame in state["scheduled"].items():
        for object_id, prompt in of_frame.items():
            session.add(object_id, _prompt_from(prompt), frame)
    return session


def _prompt_state(prompt: Any) -> dict[str, Any]:
    if not isinstance(prompt, Prompt):
        return {"mask": prompt.cpu() if isinstance(prompt, Tensor) else torch.from_numpy(prompt != 0)}
    given = {"points": prompt.points, "labels": prompt.labels, "box": prompt.box}
    return {name: None if value is None else torch.from_numpy(value) for name, value in given.items()}


def _prompt_from(state: dict[str, Any]) -> Any:
    if "mask" in state:
        return state["mask"]
    return Prompt(**{name: None if value is None else value.cpu().numpy() for name, value in state.items()})
