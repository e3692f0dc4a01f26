"""The state of a video that is tracked: the official plain dictionary, which programs make, read and edit themselves.

Objects have an id, which callers choose, and an index from 0 on, by which the state keeps what is theirs. An output
is what a frame left of an object: maskmem_features, maskmem_pos_enc, pred_masks, obj_ptr, object_score_logits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = dict[str, Any]
Output = dict[str, Any]

# Where a state keeps what is of one object, by its index.
_OF_OBJECTS = (
    *("point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj"),
    *("temp_output_dict_per_obj", "frames_tracked_per_obj"),
)


def new_state(
    images: Any,
    video_height: int,
    video_width: int,
    device: torch.device,
    offload_video_to_cpu: bool,
    offload_state_to_cpu: bool,
) -> State:
    """Return the state of a video without objects, its keys in the official order.

    Args:
        images: [T, 3, S, S], or anything that has a length and gives a frame by its number.
        video_height, video_width: size of the masks that are returned.
        device: device of the model.
        offload_video_to_cpu, offload_state_to_cpu: the arguments of :meth:`VideoPredictor.init_state`.
    """
    return {
        "images": images,
        "num_frames": len(images),
        "offload_video_to_cpu": offload_video_to_cpu,
        "offload_state_to_cpu": offload_state_to_cpu,
        "video_height": video_height,
        "video_width": video_width,
        "device": device,
        "storage_device": torch.device("cpu") if offload_state_to_cpu else device,
        "point_inputs_per_obj": {},
        "mask_inputs_per_obj": {},
        "cached_features": {},
        "constants": {},
        "obj_id_to_idx": OrderedDict(),
        "obj_idx_to_id": OrderedDict(),
        "obj_ids": [],
        "output_dict_per_obj": {},
        "temp_output_dict_per_obj": {},
        "frames_tracked_per_obj": {},
    }


def add_object(state: State, obj_id: Hashable) -> int:
    """Give an object the next index and empty records; returns the index."""
    index = len(state["obj_id_to_idx"])
    state["obj_id_to_idx"][obj_id] = index
    state["obj_idx_to_id"][index] = obj_id
    state["obj_ids"] = list(state["obj_id_to_idx"])
    for name in ("point_inputs_per_obj", "mask_inputs_per_obj"):
        state[name][index] = {}
    for name in ("output_dict_per_obj", "temp_output_dict_per_obj"):
        state[name][index] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    if "frames_tracked_per_obj" in state:
        tracked_frames(state, index)
    return index


def drop_object(state: State, obj_id: Hashable) -> None:
    """Forget an object; the indices of later ones move down."""
    gone = state["obj_id_to_idx"][obj_id]
    ids = [other for other in state["obj_id_to_idx"] if other != obj_id]
    state["obj_id_to_idx"] = OrderedDict((other, index) for index, other in enumerate(ids))
    state["obj_idx_to_id"] = OrderedDict(enumerate(ids))
    state["obj_ids"] = ids
    for name in _OF_OBJECTS:
        records = state.get(name, {})
        remaining = [(index - (index > gone), record) for index, record in sorted(records.items()) if index != gone]
        records.clear()
        records.update(remaining)


@contextmanager
def undone_on_error(state: State, obj_id: Hashable) -> Iterator[None]:
    """Drop an object that was new before a failure, so that a refused call leaves none behind."""
    was_known = obj_id in state["obj_id_to_idx"]
    try:
        yield
    except BaseException:
        if not was_known and obj_id in state["obj_id_to_idx"]:
            drop_object(state, obj_id)
        raise


def clear_objects(state: State) -> None:
    """Forget all objects; frames and constants stay. Lists of ids that were handed out stay as they are."""
    for name in ("obj_id_to_idx", "obj_idx_to_id"):
        state[name].clear()
    state["obj_ids"] = []
    for name in _OF_OBJECTS:
        state.get(name, {}).clear()


def clear_results(state: State) -> None:
    """Forget the prompts and the results of all objects, which stay."""
    for name in _OF_OBJECTS:
        for record in state.get(name, {}).values():
            if "cond_frame_outputs" in record:
                record["cond_frame_outputs"].clear()
                record["non_cond_frame_outputs"].clear()
            else:
                record.clear()


def tracked_frames(state: State, index: int) -> dict[int, dict[str, bool]]:
    """Return {frame: {"reverse": bool}} of an object; states made for the first release have no such record."""
    return state.setdefault("frames_tracked_per_obj", {}).setdefault(index, {})


def output_of(state: State, index: int, frame: int, temporary_kind: str) -> Output | None:
    """Return the newest output of an object on a frame: of a prompt not yet tracked from, else what is kept."""
    output = state["temp_output_dict_per_obj"][index][temporary_kind].get(frame)
    outputs = state["output_dict_per_obj"][index]
    for kind in ("cond_frame_outputs", "non_cond_frame_outputs"):
        if output is None:
            output = outputs[kind].get(frame)
    return output


def downgrade(outputs: Output, frame: int, tracked: dict[int, Any]) -> None:
    """Make the output of a conditioning frame one of a tracked frame, as it has no prompt any more."""
    output = outputs["cond_frame_outputs"].pop(frame, None)
    if output is not None:
        outputs["non_cond_frame_outputs"][frame] = output
        tracked.pop(frame, None)
