"""What users of SAM 2 report on videos: each kind of report in more ways than one."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_sam2_video import _without_bars, apart, begin, track
from test_sam2_video_programs import BOX, CLICK, FRAMES, KINDS, SIZE, Features, built, encoded, own_state, predictor
from torch import Tensor

from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip, start
from fastsam_kernels.numerics import relative_error
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

__all__ = ["_without_bars", "built", "encoded", "predictor"]
OTHER: dict[str, Any] = {"points": [[100, 20], [40, 60]], "labels": [0, 1]}
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[20:60, 30:90] = True
# Of bf16, in which memories are kept; another prompt or memory gives 1e-2 and more.
SAME = 1e-3
Scene = list[tuple[int, str]]


def give(predictor: Any, state: Any, frame: int, obj_id: Any, kind: str) -> Tensor:
    """Prompt an object; returns its own logits."""
    if kind == "mask":
        answer = predictor.add_new_mask(state, frame, obj_id, MASK)
    else:
        given = {"click": CLICK, "box": BOX, "clicks": OTHER}[kind]
        answer = predictor.add_new_points_or_box(state, frame, obj_id, **given)
    masks: Tensor = answer[2][state["obj_id_to_idx"][obj_id]]
    return masks


def prompted(predictor: Any, features: Features, *scene: tuple[int, str]) -> dict[str, Any]:
    """A state whose objects are called by their number, each with a prompt on a frame."""
    state = own_state(features)
    for obj_id, (frame, kind) in enumerate(scene):
        give(predictor, state, frame, obj_id, kind)
    return state


def of(found: dict[int, Tensor], row: int) -> dict[int, Tensor]:
    return {frame: masks[row] for frame, masks in found.items()}


# Several objects -------------------------------------------------------------------------------------------------


SCENES: dict[str, tuple[Scene, dict[str, Any]]] = {
    "a mask later": ([(0, "click"), (2, "mask")], {}),
    "three": ([(1, "box"), (0, "click"), (3, "mask")], {}),
    "backwards": ([(4, "click"), (2, "box")], {"start_frame_idx": 4, "reverse": True}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_objects_that_begin_on_different_frames(predictor: SAM2VideoPredictor, encoded: Features, scene: str) -> None:
    """Each is tracked as if it were alone, and on its frame it has the answer to its prompt."""
    objects, options = SCENES[scene]
    found = track(predictor, prompted(predictor, encoded, *objects), **options)
    assert len(found) == FRAMES
    for row, (frame, kind) in enumerate(objects):
        alone = prompted(predictor, encoded, (frame, kind))
        answer = give(predictor, copy.copy(own_state(encoded)), frame, 0, kind)
        assert apart(of(found, row), of(track(predictor, alone, **{"start_frame_idx": 0, **options}), 0)) < SAME
        assert relative_error(found[frame][row], answer) < 1e-6


@pytest.mark.parametrize(("frame", "kind"), [(3, "mask"), (1, "box"), (4, "clicks")])
def test_an_object_that_is_added_after_tracking(
    predictor: SAM2VideoPredictor, encoded: Features, frame: int, kind: str
) -> None:
    """In the middle of a pass, which goes on without it; from the next pass on it is tracked as if alone."""
    state, counts = prompted(predictor, encoded, (0, "click")), []
    for tracked, ids, masks in predictor.propagate_in_video(state):
        counts.append((len(ids), len(masks)))
        if tracked == 2:
            give(predictor, state, frame, "late", kind)
    assert counts == [(1, 1)] * FRAMES
    found = track(predictor, state)
    late = prompted(predictor, encoded, (frame, kind))
    assert apart(of(found, 1), of(track(predictor, late, start_frame_idx=0), 0)) < SAME
    assert apart(of(found, 0), of(track(predictor, prompted(predictor, encoded, (0, "click"))), 0)) < SAME


REMOVED: dict[str, tuple[list[int], bool]] = {
    "the first": ([0], False),
    "two of three": ([0, 2], False),
    "the last one, backwards": ([2], True),
    "all": ([1, 0, 2], False),
}


@pytest.mark.parametrize("which", REMOVED)
def test_objects_that_are_removed_in_the_loop(predictor: SAM2VideoPredictor, encoded: Features, which: str) -> None:
    """Those that stay go on as if alone; without any the pass ends."""
    gone, reverse = REMOVED[which]
    first = FRAMES - 1 if reverse else 0
    kinds = ["click", "box", "mask"]
    state, found, ids_of = prompted(predictor, encoded, *((first, kind) for kind in kinds)), {}, {}
    for frame, ids, masks in predictor.propagate_in_video(state, reverse=reverse):
        found[frame], ids_of[frame] = masks, ids
        if frame == 2:
            for obj_id in gone:
                predictor.remove_object(state, obj_id)
    stays = [obj_id for obj_id in range(3) if obj_id not in gone]
    order = range(FRAMES)[:: -1 if reverse else 1]
    tracked = order if stays else order[:3]
    assert list(ids_of.items()) == [(t, [0, 1, 2] if abs(t - first) <= 2 else stays) for t in tracked]
    for row, obj_id in enumerate(stays):
        alone = prompted(predictor, encoded, (first, kinds[obj_id]))
        rows = {t: masks[obj_id if len(masks) == 3 else row] for t, masks in found.items()}
        assert apart(rows, of(track(predictor, alone, reverse=reverse), 0)) < SAME


def test_lists_of_ids_are_the_callers_own(predictor: SAM2VideoPredictor, encoded: Features) -> None:
    """Objects that come, go or are forgotten change none that was handed out, and who edits one changes no state."""
    state = prompted(predictor, encoded, (0, "click"), (0, "box"))
    handed = [ids for _, ids, _ in predictor.propagate_in_video(state)]
    handed.append(predictor.add_new_mask(state, 0, "new", MASK)[1])
    handed.append(predictor.remove_object(state, 0)[0])
    answer = predictor.clear_all_prompts_in_frame(state, 0, "new")
    assert answer is not None
    handed.append(answer[1])
    assert handed == [[0, 1]] * FRAMES + [[0, 1, "new"], [1, "new"], [1, "new"]]
    for ids in handed:
        ids.append("of the caller")
    give(predictor, state, 0, "new", "click")
    seen = []
    for _, ids, _ in predictor.propagate_in_video(state):
        seen.append(list(ids))
        ids.clear()
    assert seen == [[1, "new"]] * FRAMES
    predictor.reset_state(state)
    assert handed[-1] == [1, "new", "of the caller"]


# Corrections -----------------------------------------------------------------------------------------------------


def test_corrections_that_the_next_pass_drops(predictor: SAM2VideoPredictor, encoded: Features) -> None:
    """Each is named; what a pass does not come by stays, and so says nothing."""
    state = prompted(predictor, encoded, (0, "click"), (0, "box"))
    before = track(predictor, state)
    give(predictor, state, 2, 0, "mask")
    give(predictor, state, 3, 1, "clicks")
    words = r"corrections of tracked frames .* \(object 1 on frame 3, object 0 on frame 2\)|"
    words += r"corrections of tracked frames .* \(object 0 on frame 2, object 1 on frame 3\)"
    with pytest.warns(UserWarning, match=words):
        assert apart(track(predictor, state), before) < SAME
    state = prompted(predictor, encoded, (4, "click"))
    backwards = track(predictor, state, reverse=True)
    corrected = give(predictor, state, 3, 0, "box")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = track(predictor, state, start_frame_idx=2, reverse=True)
    kept = state["output_dict_per_obj"][0][KINDS[1]][3]["pred_masks"]
    assert torch.equal(predictor._get_orig_video_res_output(state, kept)[1][0], corrected)
    assert relative_error(after[2], backwards[2]) > 1e-4  # it is remembered
    with pytest.warns(UserWarning, match="object 0 on frame 3"):
        track(predictor, state, reverse=True)


@pytest.mark.parametrize(
    ("kinds", "reverse"), [({2: "box"}, False), ({1: "mask", 3: "click"}, False), ({2: "mask"}, True)]
)
def test_corrections_that_stay(
    predictor: SAM2VideoPredictor, encoded: Features, kinds: dict[int, str], reverse: bool
) -> None:
    """They are on their frames, the other frames follow, and the other object is left alone."""
    predictor.add_all_frames_to_correct_as_cond = True
    first = FRAMES - 1 if reverse else 0
    state = prompted(predictor, encoded, (first, "mask"), (first, "clicks"))
    before = track(predictor, state, reverse=reverse)
    answers = {frame: give(predictor, state, frame, 1, kind) for frame, kind in kinds.items()}
    after = track(predictor, state, start_frame_idx=first, reverse=reverse)
    assert apart(of(after, 0), of(before, 0)) < SAME
    for frame in after:
        if frame in answers:
            assert relative_error(after[frame][1], answers[frame]) < 1e-6
        elif frame != first:
            assert relative_error(after[frame][1], before[frame][1]) > 1e-4


@pytest.mark.parametrize("kind", ["mask", "click"])
def test_memories_around_a_prompt_of_one_object(predictor: SAM2VideoPredictor, encoded: Features, kind: str) -> None:
    """Only those of this object are forgotten, as far as memories reach, and as if it were done by hand."""
    predictor.add_all_frames_to_correct_as_cond = True
    predictor.num_maskmem = 2
    runs = []
    for by_hand in (False, True):
        predictor.clear_non_cond_mem_around_input = False
        state = prompted(predictor, encoded, (0, "click"), (0, "box"))
        track(predictor, state)
        predictor.clear_non_cond_mem_around_input = not by_hand
        give(predictor, state, 4, 1, kind)
        if by_hand:
            for frame in (2, 3):
                del state["output_dict_per_obj"][1][KINDS[1]][frame]
        predictor.propagate_in_video_preflight(state)
        kept = [list(state["output_dict_per_obj"][index][KINDS[1]]) for index in range(2)]
        assert kept == [[1, 2, 3, 4], [1]]
        runs.append(track(predictor, state, start_frame_idx=3))
    assert apart(*runs) == 0


# Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", [[(1, "mask")], [(1, "box"), (1, "click")], [(1, "clicks"), (3, "mask")]])
def test_backwards_is_forwards_on_the_mirrored_clip(predictor: SAM2VideoPredictor, scene: Scene) -> None:
    def both(images: Tensor, scene: Scene, frame: int, reverse: bool) -> list[dict[int, Tensor]]:
        state = start(predictor, images)
        for obj_id, (prompt_frame, kind) in enumerate(scene):
            give(predictor, state, prompt_frame, obj_id, kind)
        return [track(predictor, state, start_frame_idx=frame, reverse=side) for side in (reverse, not reverse)]

    last = FRAMES - 1
    images, mirrored = clip(SIZE, FRAMES), [(last - frame, kind) for frame, kind in scene]
    theirs = both(images.flip(0), mirrored, last - 1, False)
    for ours, other in zip(both(images, scene, 1, True), theirs, strict=True):
        assert apart(ours, {last - frame: x for frame, x in other.items()}) < SAME


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("more", [0, 1])
def test_a_pass_in_pieces_is_one_pass(
    predictor: SAM2VideoPredictor, encoded: Features, reverse: bool, more: int
) -> None:
    """Of two objects, either way; between the pieces passes are begun and dropped."""
    first, step = (FRAMES - 1, -1) if reverse else (0, 1)
    scene = (first, "click"), (first, "mask")
    truth = track(predictor, prompted(predictor, encoded, *scene), reverse=reverse)
    state, found = prompted(predictor, encoded, *scene), {}
    for piece in range(0, FRAMES, more + 1):
        start_at = first + step * piece
        predictor.propagate_in_video(state, start_at, reverse=reverse).close()
        found |= track(predictor, state, start_frame_idx=start_at, max_frame_num_to_track=more, reverse=reverse)
    if reverse:  # from the first frame nothing is tracked backwards
        assert (0 in found) == (more > 0 and FRAMES % (more + 1) == 0)
    assert apart(found, {frame: truth[frame] for frame in found}) == 0
    assert len(found) >= FRAMES - reverse


def test_videos_of_several_sizes_in_threads(predictor: SAM2VideoPredictor) -> None:
    """Three states of one predictor, with prompts of other kinds: each gives what it gives alone."""

    def make(index: int) -> dict[str, Any]:
        state = start(predictor, clip(SIZE, FRAMES - index).flip(0))
        state["video_height"], state["video_width"] = HEIGHT + 7 * index, WIDTH - 5 * index
        for obj_id, kind in enumerate(("click", "box", "mask")[index:]):
            give(predictor, state, 0, obj_id, kind)
        return state

    truth = [track(predictor, make(index)) for index in range(3)]
    states, found = [make(index) for index in range(3)], dict[int, dict[int, Tensor]]()
    ready = threading.Barrier(3)

    def work(index: int) -> None:
        ready.wait()
        found[index] = track(predictor, states[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [apart(found[index], truth[index]) for index in range(3)] == [0.0] * 3


@pytest.mark.parametrize(
    "kinds", [["click", "clicks"], ["box", "click"], ["mask", "clicks"], ["click", "click", "clicks"]]
)
def test_a_clip_of_one_frame_is_refined(predictor: SAM2VideoPredictor, encoded: Features, kinds: list[str]) -> None:
    """As the first frame of a longer one."""

    def refined(frames: int) -> list[Tensor]:
        state = own_state({frame: encoded[frame] for frame in range(frames)})
        answers = [give(predictor, state, 0, 1, kinds[0])]
        for kind in kinds[1:]:
            assert list(track(predictor, state, max_frame_num_to_track=0)) == [0]
            more = {"click": {"points": [[110, 70]], "labels": [1]}, "clicks": OTHER}[kind]
            answers.append(predictor.add_new_points_or_box(state, 0, 1, **more, clear_old_points=False)[2][0])
        return answers

    one, two = refined(1), refined(2)
    assert max(map(relative_error, one, two)) < 1e-6
    assert all(masks.max() > -1024 for masks in one)
    assert relative_error(one[-1], one[0]) > 1e-4


# Dtypes and tensors ----------------------------------------------------------------------------------------------


NARROW: dict[str, tuple[torch.dtype, bool, float]] = {
    "fp64": (torch.float64, False, 1e-2),
    "bf16 under autocast": (torch.bfloat16, True, 0.3),
    "fp16": (torch.float16, False, 0.1),
    "fp32 under autocast": (torch.float32, True, 0.3),
}


@pytest.mark.parametrize("how", NARROW)
def test_models_of_other_dtypes_track(predictor: SAM2VideoPredictor, encoded: Features, how: str) -> None:
    """An object of a click, and one of a mask that begins later; the answers are fp32."""
    dtype, autocast, limit = NARROW[how]

    def run(model: Any) -> dict[int, Tensor]:
        state = start(model, clip(SIZE, 4))
        give(model, state, 0, "a", "click")
        give(model, state, 2, "b", "mask")
        return track(model, state)

    truth = run(predictor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = run(copy.deepcopy(predictor).to(dtype))
    assert {masks.dtype for masks in found.values()} == {torch.float32}
    assert 0 < apart(found, truth) < limit


TENSORS: dict[str, Callable[[Any, Any], Tensor]] = {
    "of a mask that is given": lambda p, state: p.add_new_mask(state, 0, 2, MASK)[2],
    "of a correction": lambda p, state: p.add_new_points_or_box(state, 2, 0, **OTHER)[2],
    "of a frame without prompts": lambda p, state: p.clear_all_prompts_in_frame(state, 0, 0)[2],
    "of an object that goes": lambda p, state: p.remove_object(state, 0)[1][0][1],
    "of one frame": lambda p, state: next(p.propagate_in_video(state))[2],
}


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("what", TENSORS)
def test_answers_may_be_edited_and_put_into_a_loss(
    predictor: SAM2VideoPredictor, encoded: Features, what: str, free: bool
) -> None:
    predictor.non_overlap_masks = not free
    state = prompted(predictor, encoded, (0, "click"), (0, "box"))
    state["video_height"] = state["video_width"] = SIZE // 4  # nothing is resized
    track(predictor, state)
    masks = TENSORS[what](predictor, state)
    kept = [output["pred_masks"].clone() for output in _outputs(state)]
    assert not masks.is_inference()
    weight = torch.ones(1, requires_grad=True)
    (masks * weight).sum().backward()
    masks[masks < 0] = 7
    assert all(torch.equal(output["pred_masks"], x) for output, x in zip(_outputs(state), kept, strict=True))


def _outputs(state: dict[str, Any]) -> list[dict[str, Any]]:
    of_objects = [
        state[name][index] for name in ("output_dict_per_obj", "temp_output_dict_per_obj") for index in state[name]
    ]
    return [output for outputs in of_objects for kind in KINDS for output in outputs[kind].values()]


# Prompts ---------------------------------------------------------------------------------------------------------


POINTS: dict[str, dict[str, Any]] = {
    "tuples": {"points": ((30, 40), (100, 20)), "labels": (1, 0)},
    "wide arrays": {"points": np.array([[30.0, 40], [100, 20]]), "labels": np.array([1, 0], np.int64)},
    "tensors": {"points": torch.tensor([[30, 40], [100, 20]]), "labels": torch.tensor([True, False])},
    "a batch of one": {"points": np.array([[[30, 40], [100, 20]]], np.float32), "labels": np.array([[1, 0]])},
    "parts of the frame": {
        "points": [[30 / WIDTH, 40 / HEIGHT], [100 / WIDTH, 20 / HEIGHT]],
        "labels": [1, 0],
        "normalize_coords": False,
    },
}
BOXES: dict[str, dict[str, Any]] = {
    "an array of wide numbers": {"box": np.array([60.0, 40, 110, 80])},
    "a box in a list": {"box": [[60, 40, 110, 80]]},
    "corners": {"points": [[60, 40], [110, 80]], "labels": [2, 3]},
    "corners in an array": {"box": np.array([[60, 40], [110, 80]], np.float32)},
}


@pytest.mark.parametrize("form", [*POINTS, *BOXES])
def test_prompts_in_every_form(predictor: SAM2VideoPredictor, form: str) -> None:
    """Also by the name that the first release had."""
    plain = {"points": [[30, 40], [100, 20]], "labels": [1, 0]} if form in POINTS else BOX
    given = POINTS.get(form) or BOXES[form]
    state = begin(predictor)
    for obj_id, (name, prompt) in enumerate((("new_points_or_box", plain), ("new_points", given))):
        call = getattr(predictor, f"add_{name}")
        frame, ids, masks = call(inference_state=state, frame_idx=1, obj_id=obj_id, **prompt)
        assert (frame, ids) == (1, [*range(obj_id + 1)])
    assert relative_error(masks[1], masks[0]) < 1e-6
