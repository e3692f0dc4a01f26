"""Tracking with SAM 2 as the official video predictor does it: object by object, by the official methods."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import state as states
from .frame_steps import Answer, FrameSteps
from .prompts import frame_number, mask_of, points_of
from .state import Output, State


class VideoPredictor(FrameSteps):
    """SAM 2 with states of videos: prompts on frames, and objects that are tracked from there.

    Its official face is :class:`~sam.sam2.sam2_video_predictor.SAM2VideoPredictor`, in whose module programs find and
    replace what a predictor calls: the loader of frames, the progress bar, and what fills holes.

    Args:
        fill_hole_area: holes of up to so many low-resolution pixels are filled in masks; 0 fills none.
        non_overlap_masks: give each pixel of the masks that are returned to one object.
        clear_non_cond_mem_around_input: a prompt makes its object forget the tracked frames near it.
        add_all_frames_to_correct_as_cond: a frame that is corrected becomes one that memories never leave out.
        **kwargs: arguments of :class:`~sam.modeling.sam2_base.SAM2Base`.
    """

    def __init__(
        self,
        fill_hole_area: int = 0,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.fill_hole_area = fill_hole_area
        self.non_overlap_masks = non_overlap_masks
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond

    # What a face gives -------------------------------------------------------------------------------------

    def _load_frames(self, **arguments: Any) -> tuple[Any, int, int]:
        raise NotImplementedError

    def _progress(self, frames: Iterable[int]) -> Iterable[int]:
        return frames

    def _new_state(self, *arguments: Any) -> State:
        return states.new_state(*arguments)

    def _drop_object(self, state: State, obj_id: Hashable) -> None:
        states.drop_object(state, obj_id)

    def _downgrade(self, state: State, index: int, frame: int) -> None:
        states.downgrade(state["output_dict_per_obj"][index], frame, self._tracked_frames(state, index))

    def _tracked_frames(self, state: State, index: int) -> dict[int, dict[str, bool]]:
        return states.tracked_frames(state, index)

    # A video and its objects -------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(
        self,
        video_path: Any,
        offload_video_to_cpu: bool = False,
        offload_state_to_cpu: bool = False,
        async_loading_frames: bool = False,
    ) -> State:
        """Load a video and encode its first frame.

        Args:
            video_path: a folder of JPEG files, a video file, or the bytes of one.
            offload_video_to_cpu: keep the frames on the CPU.
            offload_state_to_cpu: keep memories and masks on the CPU.
            async_loading_frames: read a folder's files while the first frames are in use.

        Returns:
            the state, the official dictionary: see :mod:`sam.video.state`.

        Raises:
            NotImplementedError: neither a folder nor a video.
            OSError: an unreadable frame; the message names it.
        """
        images, height, width = self._load_frames(
            video_path=video_path,
            image_size=self.image_size,
            offload_video_to_cpu=offload_video_to_cpu,
            async_loading_frames=async_loading_frames,
            compute_device=self.device,
        )
        state = self._new_state(images, height, width, self.device, offload_video_to_cpu, offload_state_to_cpu)
        self._get_image_feature(state, frame_idx=0, batch_size=1)
        return state

    @torch.no_grad()
    def reset_state(self, inference_state: State) -> None:
        """Forget all objects, their prompts and results; the frames stay."""
        self._reset_tracking_results(inference_state)
        states.clear_objects(inference_state)

    def _reset_tracking_results(self, inference_state: State) -> None:
        states.clear_results(inference_state)

    @torch.no_grad()
    def remove_object(
        self, inference_state: State, obj_id: Hashable, strict: bool = False, need_output: bool = True
    ) -> tuple[list[Any], list[tuple[int, Tensor]]]:
        """Forget an object; while a pass is running, its next frames are without it.

        Args:
            inference_state: the state of the video.
            obj_id: the object.
            strict: refuse an unknown object, which else changes nothing.
            need_output: return masks.

        Returns:
            the ids that are left; where ``need_output``, each frame on which the object had a prompt with the masks
            [O, 1, H, W] of the others there.

        Raises:
            RuntimeError: an unknown object, where ``strict``.
        """
        updated: list[tuple[int, Tensor]] = []
        index = inference_state["obj_id_to_idx"].get(obj_id)
        if index is None:
            if strict:
                known = inference_state["obj_ids"]
                raise RuntimeError(f"cannot remove object {obj_id!r}: there is none; the objects are {known}")
            return list(inference_state["obj_ids"]), updated
        if len(inference_state["obj_id_to_idx"]) == 1:
            self.reset_state(inference_state)
            return list(inference_state["obj_ids"]), updated
        prompts = (inference_state[name][index] for name in ("point_inputs_per_obj", "mask_inputs_per_obj"))
        frames = sorted({frame for of_frames in prompts for frame in of_frames})
        for frame in frames:
            self.clear_all_prompts_in_frame(inference_state, frame, obj_id, need_output=False)
        self._drop_object(inference_state, obj_id)
        if need_output:
            updated = [(frame, self._masks_on(inference_state, frame)[2]) for frame in frames]
        return list(inference_state["obj_ids"]), updated

    # Prompts -----------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        """Prompt an object on a frame with points, a box or both.

        On a frame where the object has been tracked they correct its mask. A new ``obj_id`` is a new object; a refused
        call makes none.

        Args:
            inference_state: the state of the video.
            frame_idx: the frame.
            obj_id: any hashable.
            points: [N, 2] or [1, N, 2] x, y in pixels of the video.
            labels: [N] or [1, N], 1 on the object, 0 beside it.
            clear_old_points: forget earlier points of the object on this frame.
            normalize_coords: False where coordinates are in 0..1 already.
            box: x0, y0, x1, y1; needs ``clear_old_points``.

        Returns:
            the frame, the ids of all objects, and their logits on it [O, 1, H, W] float32: -1024 where one has none.

        Raises:
            ValueError: points without labels, no prompt, a box beside older points, a wrong shape, value or frame.
        """
        frame = frame_number(inference_state, frame_idx)
        coords, kinds = points_of(points, labels, box, clear_old_points)
        if normalize_coords:
            size = [inference_state["video_width"], inference_state["video_height"]]
            coords = coords / torch.tensor(size, device=coords.device)
        device = inference_state["device"]
        prompt = {"point_coords": (coords * self.image_size).to(device), "point_labels": kinds.to(device)}
        with states.undone_on_error(inference_state, obj_id):
            index = self._obj_id_to_idx(inference_state, obj_id)
            given = inference_state["point_inputs_per_obj"][index]
            old = None if clear_old_points else given.get(frame)
            if old is not None:
                prompt = {name: torch.cat([old[name], new], dim=1) for name, new in prompt.items()}
            is_cond = self._run_prompt(inference_state, frame, index, prompt, None)
        given[frame] = prompt
        inference_state["mask_inputs_per_obj"][index].pop(frame, None)
        return self._masks_on(inference_state, frame, is_cond)

    def add_new_points(self, *args: Any, **kwargs: Any) -> Answer:
        """Call :meth:`add_new_points_or_box`; officially deprecated."""
        return self.add_new_points_or_box(*args, **kwargs)

    @torch.no_grad()
    def add_new_mask(self, inference_state: State, frame_idx: int, obj_id: Hashable, mask: Any) -> Answer:
        """Give the mask [H, W] of an object on a frame; another size than the model's is resized.

        Returns:
            as :meth:`add_new_points_or_box`.

        Raises:
            ValueError: a wrong shape or frame.
        """
        frame = frame_number(inference_state, frame_idx)
        prompt = mask_of(mask, self.image_size, inference_state["device"])
        with states.undone_on_error(inference_state, obj_id):
            index = self._obj_id_to_idx(inference_state, obj_id)
            is_cond = self._run_prompt(inference_state, frame, index, None, prompt)
        inference_state["mask_inputs_per_obj"][index][frame] = prompt
        inference_state["point_inputs_per_obj"][index].pop(frame, None)
        return self._masks_on(inference_state, frame, is_cond)

    def _run_prompt(
        self,
        state: State,
        frame: int,
        index: int,
        points: Mapping[str, Tensor] | None,
        mask: Tensor | None,
    ) -> bool:
        """Predict an object on a frame where it is prompted, and keep that for the next pass.

        Its memory is made when the pass begins. Returns whether the frame is a conditioning one.
        """
        tracked = self._tracked_frames(state, index).get(frame)
        is_cond = tracked is None or self.add_all_frames_to_correct_as_cond
        kind = "cond_frame_outputs" if is_cond else "non_cond_frame_outputs"
        earlier = states.output_of(state, index, frame, kind) if points is not None else None
        logits = None if earlier is None else earlier["pred_masks"]
        if logits is not None:
            logits = logits.to(state["device"], non_blocking=True).clamp(-self.low_res_limit, self.low_res_limit)
        output, _ = self._run_single_frame_inference(
            inference_state=state,
            output_dict=state["output_dict_per_obj"][index],
            frame_idx=frame,
            batch_size=1,
            is_init_cond_frame=tracked is None,
            point_inputs=points,
            mask_inputs=mask,
            reverse=tracked is not None and tracked["reverse"],
            run_mem_encoder=False,
            prev_sam_mask_logits=logits,
        )
        state["temp_output_dict_per_obj"][index][kind][frame] = output
        return is_cond

    @torch.no_grad()
    def clear_all_prompts_in_frame(
        self, inference_state: State, frame_idx: int, obj_id: Hashable, need_output: bool = True
    ) -> Answer | None:
        """Forget the prompts of an object on a frame, which becomes a tracked one; unknown objects have none.

        Returns:
            as :meth:`add_new_points_or_box`; None without ``need_output``.
        """
        index = inference_state["obj_id_to_idx"].get(obj_id)
        if index is not None:
            for name in ("point_inputs_per_obj", "mask_inputs_per_obj"):
                inference_state[name][index].pop(frame_idx, None)
            for outputs in inference_state["temp_output_dict_per_obj"][index].values():
                outputs.pop(frame_idx, None)
            self._downgrade(inference_state, index, frame_idx)
        return self._masks_on(inference_state, frame_idx) if need_output else None

    # Tracking ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propagate_in_video_preflight(self, inference_state: State) -> None:
        """Make memories of the prompts since the last pass.

        Raises:
            RuntimeError: no object, or one without a prompt.
        """
        objects = self._get_obj_num(inference_state)
        if objects == 0:
            raise RuntimeError("No input points or masks are provided for any object; please add inputs first.")
        for index in range(objects):
            outputs = inference_state["output_dict_per_obj"][index]
            for kind in ("non_cond_frame_outputs", "cond_frame_outputs"):
                prompted = inference_state["temp_output_dict_per_obj"][index][kind]
                for frame, output in prompted.items():
                    if output["maskmem_features"] is None:
                        self._add_memory(inference_state, frame, output)
                    outputs[kind][frame] = output
                    if self.clear_non_cond_mem_around_input:
                        self._clear_obj_non_cond_mem_around_input(inference_state, frame, index)
                prompted.clear()
            if not outputs["cond_frame_outputs"]:
                obj_id = self._obj_idx_to_id(inference_state, index)
                raise RuntimeError(
                    f"No input points or masks are provided for object id {obj_id}; please add inputs first."
                )
            for frame in outputs["cond_frame_outputs"]:
                outputs["non_cond_frame_outputs"].pop(frame, None)

    def _add_memory(self, state: State, frame: int, output: Output) -> None:
        """Put the memory of a prompted frame into its output."""
        size = (self.image_size, self.image_size)
        masks = output["pred_masks"].to(state["device"])
        output["maskmem_features"], output["maskmem_pos_enc"] = self._run_memory_encoder(
            inference_state=state,
            frame_idx=frame,
            batch_size=1,
            high_res_masks=F.interpolate(masks, size=size, mode="bilinear", align_corners=False),
            object_score_logits=output["object_score_logits"],
            is_mask_from_pts=True,
        )

    @torch.no_grad()
    def propagate_in_video(
        self,
        inference_state: State,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
    ) -> Iterator[Answer]:
        """Track all objects from frame to frame.

        Args:
            inference_state: the state of the video. Frames may be appended and objects removed while it runs; objects
                that are added are tracked in the next pass.
            start_frame_idx: the first frame; by default the earliest one with a prompt.
            max_frame_num_to_track: so many frames, and one more, are tracked; by default all.
            reverse: towards the first frame; from there nothing is tracked.

        Yields:
            a frame, the ids of the objects, and their logits on it [O, 1, H, W] float32.

        Raises:
            RuntimeError: no object, or one without a prompt.
            ValueError: a negative frame.
        """
        state = inference_state
        self.propagate_in_video_preflight(state)
        ids = list(state["obj_ids"])
        order = _order(state, start_frame_idx, max_frame_num_to_track, reverse)
        self._warn_of_lost_corrections(state, order)
        for frame in self._progress(order):
            ids = [obj_id for obj_id in ids if obj_id in state["obj_id_to_idx"]]
            if not ids:
                return
            masks = self._track_objects(state, [self._obj_id_to_idx(state, obj_id) for obj_id in ids], frame, reverse)
            _, video_masks = self._get_orig_video_res_output(state, torch.cat(masks))
            yield frame, list(ids), video_masks

    def _warn_of_lost_corrections(self, state: State, order: range) -> None:
        """Warn of prompts on tracked frames that this pass tracks over again, as it officially does in silence."""
        lost = [
            (obj_id, frame)
            for obj_id, index in state["obj_id_to_idx"].items()
            for name in ("point_inputs_per_obj", "mask_inputs_per_obj")
            for frame in state[name][index]
            if frame in order and frame not in state["output_dict_per_obj"][index]["cond_frame_outputs"]
        ]
        if lost:
            listed = ", ".join(f"object {obj_id!r} on frame {frame}" for obj_id, frame in lost[:5])
            warnings.warn(
                f"corrections of tracked frames are tracked over again in this pass ({listed}); with "
                "add_all_frames_to_correct_as_cond=True they stay, and the other frames learn from them",
                stacklevel=3,
            )

    def _clear_non_cond_mem_around_input(self, inference_state: State, frame_idx: int) -> None:
        """Forget what was tracked of all objects on the frames around one."""
        for index in range(self._get_obj_num(inference_state)):
            self._clear_obj_non_cond_mem_around_input(inference_state, frame_idx, index)


def _order(state: State, start: int | None, count: int | None, reverse: bool) -> range:
    """Return the frames of a pass; ``count`` and one more, by default all."""
    if start is None:
        outputs = state["output_dict_per_obj"].values()
        start = min(frame for of_object in outputs for frame in of_object["cond_frame_outputs"])
    elif start < 0:
        raise ValueError(f"start_frame_idx must not be negative, got {start}")
    count = state["num_frames"] if count is None else count
    if reverse:
        return range(start, max(start - count, 0) - 1, -1) if start > 0 else range(0)
    return range(start, min(start + count, state["num_frames"] - 1) + 1)
