"""The first release's predictor of videos, all objects in one batch: ``sam2.sam2_video_predictor_legacy``.

The loader of frames, the progress bar and what fills holes are looked up in this module when they are called.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from ..video import state as states
from ..video.frame_steps import Answer
from ..video.state import Output, State
from . import sam2_video_predictor
from .utils.misc import concat_points, fill_holes_in_mask_scores, load_video_frames

__all__ = [
    "NO_OBJ_SCORE",
    "SAM2Base",
    "SAM2VideoPredictor",
    "concat_points",
    "fill_holes_in_mask_scores",
    "load_video_frames",
    "tqdm",
]
_KINDS = ("cond_frame_outputs", "non_cond_frame_outputs")


class SAM2VideoPredictor(sam2_video_predictor.SAM2VideoPredictor):
    """Track objects through a video as one batch: a frame with a prompt of one is a conditioning frame of all.

    No object is added after tracking began, until :meth:`reset_state`; what else is different is in the state:
    "output_dict" has the outputs of all objects [O, ...], of which those of "output_dict_per_obj" are views.

    Args:
        fill_hole_area, non_overlap_masks, add_all_frames_to_correct_as_cond: as of
            :class:`~sam.video.predictor.VideoPredictor`.
        clear_non_cond_mem_around_input: a prompt makes a lone object forget the tracked frames near it.
        clear_non_cond_mem_for_multi_obj: as well where there are several.
        **kwargs: arguments of :class:`~sam.modeling.sam2_base.SAM2Base`.
    """

    def __init__(
        self,
        fill_hole_area: int = 0,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        clear_non_cond_mem_for_multi_obj: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            fill_hole_area=fill_hole_area,
            non_overlap_masks=non_overlap_masks,
            clear_non_cond_mem_around_input=clear_non_cond_mem_around_input,
            add_all_frames_to_correct_as_cond=add_all_frames_to_correct_as_cond,
            **kwargs,
        )
        self.clear_non_cond_mem_for_multi_obj = clear_non_cond_mem_for_multi_obj

    def _load_frames(self, **arguments: Any) -> tuple[Any, int, int]:
        return load_video_frames(**arguments)

    def _progress(self, frames: Iterable[int]) -> Iterable[int]:
        return tqdm(frames, desc="propagate in video")

    def _fill_holes(self, masks: Tensor) -> Tensor:
        return fill_holes_in_mask_scores(masks, self.fill_hole_area)

    # A video and its objects -------------------------------------------------------------------------------

    def _new_state(self, *arguments: Any) -> State:
        """Return a state of the official keys of this predictor, in their order."""
        state = super()._new_state(*arguments)
        del state["frames_tracked_per_obj"]
        of_objects = {name: state.pop(name) for name in ("output_dict_per_obj", "temp_output_dict_per_obj")}
        state["output_dict"] = {kind: {} for kind in _KINDS}
        state.update(of_objects)
        state["consolidated_frame_inds"] = {kind: set() for kind in _KINDS}
        state["tracking_has_started"] = False
        state["frames_already_tracked"] = {}
        return state

    def _obj_id_to_idx(self, inference_state: State, obj_id: Hashable) -> int:
        """Return the index of an object; one that is new gets the next.

        Raises:
            RuntimeError: a new object after tracking began.
        """
        if inference_state["tracking_has_started"] and obj_id not in inference_state["obj_id_to_idx"]:
            known = inference_state["obj_ids"]
            raise RuntimeError(
                f"Cannot add new object id {obj_id} after tracking starts, the objects are {known}; call 'reset_state'"
            )
        return super()._obj_id_to_idx(inference_state, obj_id)

    def add_new_points_or_box(
        self,
        inference_state: State,
        frame_idx: int,
        obj_id: Hashable,
        points: Any = None,
        labels: Any = None,
        clear_old_points: bool = True,
        normalize_coords: bool = True,
        box: Any = None,
    ) -> Answer:
        """Prompt an object as :meth:`~sam.video.predictor.VideoPredictor.add_new_points_or_box` does.

        A box warns once tracking has begun, as it may not correct the mask that is there.
        """
        if box is not None and inference_state["tracking_has_started"]:
            warnings.warn(
                f"a box for object {obj_id!r} after tracking began may not correct its mask: "
                "correct it by points, or begin anew after 'reset_state'",
                stacklevel=2,
            )
        return super().add_new_points_or_box(
            inference_state, frame_idx, obj_id, points, labels, clear_old_points, normalize_coords, box
        )

    def _drop_object(self, state: State, obj_id: Hashable) -> None:
        gone = state["obj_id_to_idx"][obj_id]
        remaining = [index for index in range(self._get_obj_num(state)) if index != gone]
        super()._drop_object(state, obj_id)
        for kind, outputs in state["output_dict"].items():
            for frame, output in outputs.items():
                for name in ("maskmem_features", "pred_masks", "obj_ptr", "object_score_logits"):
                    output[name] = output[name][remaining]
                output["maskmem_pos_enc"] = [x[remaining] for x in output["maskmem_pos_enc"]]
                self._add_output_per_object(state, frame, output, kind)

    def _reset_tracking_results(self, inference_state: State) -> None:
        super()._reset_tracking_results(inference_state)
        for kind in _KINDS:
            inference_state["output_dict"][kind].clear()
            inference_state["consolidated_frame_inds"][kind].clear()
        inference_state["tracking_has_started"] = False
        inference_state["frames_already_tracked"].clear()

    def _downgrade(self, state: State, index: int, frame: int) -> None:
        """Make a frame one of tracked objects, where none of them has a prompt on it any more."""
        prompts = [*state["point_inputs_per_obj"].values(), *state["mask_inputs_per_obj"].values()]
        if any(frame in of_object for of_object in prompts):
            return
        for frames in state["consolidated_frame_inds"].values():
            frames.discard(frame)
        for outputs in (state["output_dict"], *state["output_dict_per_obj"].values()):
            states.downgrade(outputs, frame, state["frames_already_tracked"])
        if not state["output_dict"]["cond_frame_outputs"]:
            self._reset_tracking_results(state)

    def _tracked_frames(self, state: State, index: int) -> dict[int, dict[str, bool]]:
        return state["frames_already_tracked"]

    # Outputs of all objects --------------------------------------------------------------------------------

    def _prompted_masks(self, state: State, frame: int, is_cond: bool) -> Tensor:
        output = self._consolidate_temp_output_across_obj(state, frame, is_cond, False, True)
        return output["pred_masks_video_res"]

    def _consolidate_temp_output_across_obj(  # type: ignore[override]
        self,
        inference_state: State,
        frame_idx: int,
        is_cond: bool,
        run_mem_encoder: bool,
        consolidate_at_video_res: bool = False,
    ) -> Output:
        """Return the newest output of all objects on a frame, with its memory where ``run_mem_encoder``.

        An object that has none there gets logits of -1024, and with a memory the pointer of an empty mask.
        """
        output: Output = {"maskmem_features": None, "maskmem_pos_enc": None}
        output |= super()._consolidate_temp_output_across_obj(
            inference_state, frame_idx, is_cond, consolidate_at_video_res
        )
        objects, device = self._get_obj_num(inference_state), inference_state["device"]
        pointers = torch.full((objects, self.hidden_dim), NO_OBJ_SCORE, device=device)
        scores = torch.full((objects, 1), 10.0, device=device)
        empty = None
        for index in range(objects):
            own = states.output_of(inference_state, index, frame_idx, _KINDS[not is_cond])
            if own is not None:
                pointers[index], scores[index] = own["obj_ptr"][0], own["object_score_logits"][0]
            elif run_mem_encoder:
                empty = self._get_empty_mask_ptr(inference_state, frame_idx) if empty is None else empty
                pointers[index] = empty[0]
        output["obj_ptr"], output["object_score_logits"] = pointers, scores
        if run_mem_encoder:
            self._add_memory(inference_state, frame_idx, output)
        return output

    def _get_empty_mask_ptr(self, inference_state: State, frame_idx: int) -> Tensor:
        """Return the pointer [1, C] of an object whose mask on a frame is empty."""
        size = (1, 1, self.image_size, self.image_size)
        output, _ = self._run_single_frame_inference(
            inference_state=inference_state,
            output_dict={},
            frame_idx=frame_idx,
            batch_size=1,
            is_init_cond_frame=True,
            point_inputs=None,
            mask_inputs=torch.zeros(size, device=inference_state["device"]),
            reverse=False,
            run_mem_encoder=False,
        )
        pointer: Tensor = output["obj_ptr"]
        return pointer

    def _add_output_per_object(
        self, inference_state: State, frame_idx: int, current_out: Mapping[str, Any], storage_key: str
    ) -> None:
        """Give each object its part of an output, of the same memory."""
        for index, outputs in inference_state["output_dict_per_obj"].items():
            rows = slice(index, index + 1)
            outputs[storage_key][frame_idx] = {name: _rows(x, rows) for name, x in current_out.items()}

    # Tracking ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propagate_in_video_preflight(self, inference_state: State) -> None:
        """Make the outputs of all objects on the frames with prompts since the last pass, and memories of them.

        Raises:
            RuntimeError: no prompt at all.
        """
        state = inference_state
        outputs, consolidated = state["output_dict"], state["consolidated_frame_inds"]
        prompted = state["temp_output_dict_per_obj"].values()
        for kind in reversed(_KINDS):
            for frame in sorted({frame for of_object in prompted for frame in of_object[kind]}):
                consolidated[kind].add(frame)
                output = self._consolidate_temp_output_across_obj(state, frame, kind == _KINDS[0], True)
                outputs[kind][frame] = output
                self._add_output_per_object(state, frame, output, kind)
                if self._clears(state):
                    self._clear_non_cond_mem_around_input(state, frame)
            for of_object in prompted:
                of_object[kind].clear()
        for of_kinds in (outputs, *state["output_dict_per_obj"].values()):
            for frame in of_kinds["cond_frame_outputs"]:
                of_kinds["non_cond_frame_outputs"].pop(frame, None)
        consolidated["non_cond_frame_outputs"] -= consolidated["cond_frame_outputs"]
        if not outputs["cond_frame_outputs"]:
            raise RuntimeError("No points are provided; please add points first")
        state["tracking_has_started"] = True

    def _warn_of_lost_corrections(self, state: State, order: range) -> None:
        """Say nothing: a pass keeps them."""

    def _track_objects(self, state: State, indices: Sequence[int], frame: int, reverse: bool) -> list[Tensor]:
        """Return the low-resolution logits [1, 1, h, w] of all objects on a frame."""
        outputs = state["output_dict"]
        kept = [kind for kind in _KINDS if frame in state["consolidated_frame_inds"][kind] and frame in outputs[kind]]
        kind = kept[0] if kept else "non_cond_frame_outputs"
        if kept:
            output = outputs[kind][frame]
            if kind == "cond_frame_outputs" and self._clears(state):
                self._clear_non_cond_mem_around_input(state, frame)
        else:
            output, _ = self._run_single_frame_inference(
                inference_state=state,
                output_dict=outputs,
                frame_idx=frame,
                batch_size=self._get_obj_num(state),
                is_init_cond_frame=False,
                point_inputs=None,
                mask_inputs=None,
                reverse=reverse,
                run_mem_encoder=True,
            )
            outputs[kind][frame] = output
        self._add_output_per_object(state, frame, output, kind)
        state["frames_already_tracked"][frame] = {"reverse": reverse}
        masks: Tensor = output["pred_masks"].to(state["device"], non_blocking=True)
        return [masks[index : index + 1] for index in indices]

    def _clears(self, state: State) -> bool:
        return self.clear_non_cond_mem_around_input and (
            self.clear_non_cond_mem_for_multi_obj or self._get_obj_num(state) <= 1
        )

    def _clear_non_cond_mem_around_input(self, inference_state: State, frame_idx: int) -> None:
        """Forget what was tracked of all objects on the frames around one."""
        super()._clear_non_cond_mem_around_input(inference_state, frame_idx)
        for frame in self._frames_around(frame_idx):
            inference_state["output_dict"]["non_cond_frame_outputs"].pop(frame, None)


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, list):
        return [x[rows] for x in value]
    return None if value is None else value[rows]
