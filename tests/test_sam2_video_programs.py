"""Programs around ``sam2`` on videos: the states, loops and dtypes of annotation tools, trackers and streams."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL_2, draw_weights_that_see, random_image
from test_sam2_video import _without_bars, apart, begin, clicked, track
from torch import Tensor

from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip, start
from fastsam_kernels.numerics import relative_error
from sam.modeling.build import sam2_arguments
from sam.sam2.sam2_image_predictor import SAM2ImagePredictor
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor

__all__ = ["_without_bars"]
FRAMES, SIZE = 5, SMALL_2.image_size
CLICK: dict[str, Any] = {"points": [[30, 40]], "labels": [1]}
BOX: dict[str, Any] = {"box": [60, 40, 110, 80]}
KINDS = ("cond_frame_outputs", "non_cond_frame_outputs")


@pytest.fixture(scope="module")
def built() -> SAM2VideoPredictor:
    """Every memory and every pointer counts: attention to them is rather even."""
    made = draw_weights_that_see(SAM2VideoPredictor(**sam2_arguments(SMALL_2)).eval())
    for name, weight in made.memory_attention.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(0.5)
    return made


@pytest.fixture
def predictor(built: SAM2VideoPredictor) -> SAM2VideoPredictor:
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def truth(built: SAM2VideoPredictor) -> dict[int, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sam.sam2.sam2_video_predictor.tqdm", lambda frames, desc: frames)
        return track(built, clicked(built))


def watched(predictor: Any) -> Any:
    """Have a hook, with which the official calls run object by object."""
    predictor.memory_attention.register_forward_hook(lambda *_: None)
    return predictor


# Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_official_calls", [False, True])
@pytest.mark.parametrize("objects", [1, 2])
def test_autocast_that_is_entered_and_never_left(
    predictor: SAM2VideoPredictor, objects: int, by_official_calls: bool
) -> None:
    """As demos begin: what is kept, and what is returned, has the official dtypes."""
    predictor = watched(predictor) if by_official_calls else predictor
    scopes = [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()]
    for scope in scopes:
        scope.__enter__()  # type: ignore[attr-defined]
    try:
        state = clicked(predictor)
        mask = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
        returned = [predictor.add_new_mask(state, 0, "whole", mask)[2]] if objects == 2 else []
        returned += track(predictor, state).values()
    finally:
        for scope in reversed(scopes):
            scope.__exit__(None, None, None)
    assert {x.dtype for x in returned} == {torch.float32}
    narrow, wide = torch.bfloat16, torch.float32
    for index in range(objects):
        for kind, frame in zip(KINDS, (0, 3), strict=True):
            output = state["output_dict_per_obj"][index][kind][frame]
            dtypes = {name: output[name].dtype for name in output if name != "maskmem_pos_enc"}
            # A mask that is given makes its score itself.
            score = wide if index and frame == 0 else narrow
            of_memory = {"maskmem_features": narrow, "pred_masks": wide, "obj_ptr": wide}
            assert dtypes == {**of_memory, "object_score_logits": score}
            assert output["maskmem_pos_enc"][0].dtype == narrow
    image, features = state["cached_features"][FRAMES - 1]
    dtypes_of = {name: [x.dtype for x in features[name]] for name in ("backbone_fpn", "vision_pos_enc")}
    assert (image.dtype, features["vision_features"].dtype) == (wide, wide)
    assert dtypes_of == {name: [narrow, narrow, wide] for name in dtypes_of}


# States that programs make and change ----------------------------------------------------------------------------


class Lazy:
    """Frames that are made when they are asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.asked = images, Counter[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.asked[index] += 1
        return self.images[index]


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "a list": list,
    "an object": Lazy,
    "a dictionary": lambda images: dict(enumerate(images)),
    "wide numbers": Tensor.double,
    "numpy": Tensor.numpy,
    "arrays": lambda images: [image.double().numpy() for image in images],
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_frames_that_replace_those_of_a_state(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor], kind: str
) -> None:
    """Tools begin on a clip of their own: its frames, their number and what was encoded make way for others."""
    state = start(predictor, clip(SIZE, 2).flip(0))
    state["images"] = images = CONTAINERS[kind](clip(SIZE, FRAMES))
    state["num_frames"], state["cached_features"] = FRAMES, {}
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    assert apart(track(predictor, state), truth) == 0
    if isinstance(images, Lazy):
        assert images.asked == Counter(range(FRAMES))


Features = dict[int, tuple[Tensor, dict[str, Any]]]


@torch.no_grad()
def encode(predictor: Any, images: Tensor) -> Features:
    """What a state keeps of its last frame, of all of them."""
    return {frame: (image[None], predictor.forward_image(image[None])) for frame, image in enumerate(images)}


@pytest.fixture(scope="module")
def encoded(built: SAM2VideoPredictor) -> Features:
    return encode(built, clip(SIZE, FRAMES))


def own_state(features: Features | None = None) -> dict[str, Any]:
    """A state that a program wrote by hand, without what nothing reads and with a key of its own."""
    per_object = ("point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj", "temp_output_dict_per_obj")
    names = ("cached_features", "constants", "obj_id_to_idx", "obj_idx_to_id", "frames_tracked_per_obj", *per_object)
    state: dict[str, Any] = {name: {} for name in names}
    state |= {"images": clip(SIZE, FRAMES), "num_frames": FRAMES, "video_height": HEIGHT, "video_width": WIDTH}
    device = torch.device("cpu")
    state |= {"device": device, "storage_device": device, "obj_ids": [], "of the program": [1, 2]}
    return state if features is None else state | {"cached_features": features, "num_frames": len(features)}


def clicked_on(predictor: Any, features: Features) -> dict[str, Any]:
    """A state of frames that were encoded before."""
    state = own_state(features)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    return state


def test_a_state_that_a_program_makes(predictor: SAM2VideoPredictor, truth: dict[int, Tensor]) -> None:
    for lacks in ((), ("frames_tracked_per_obj",)):  # which the first release had not
        state = own_state()
        for name in lacks:
            del state[name]
        predictor.add_new_points_or_box(state, 0, 1, **CLICK)
        assert apart(track(predictor, state), truth) == 0
        assert state["frames_tracked_per_obj"][0] == {frame: {"reverse": False} for frame in range(FRAMES)}
        predictor.remove_object(state, 1)
        assert state["of the program"] == [1, 2]
        with pytest.raises(KeyError):
            state["output_dict"]


def test_keys_of_the_program_stay_and_all_may_go(predictor: SAM2VideoPredictor, truth: dict[int, Tensor]) -> None:
    """A reset keeps what was encoded, and a state that is emptied takes nothing along."""
    state, other = clicked(predictor), clicked(predictor)
    state["of the program"] = {"name": "clip"}
    track(predictor, state)
    kept = state["cached_features"], state["constants"]
    predictor.reset_state(state)
    assert state["of the program"] == {"name": "clip"}
    assert state["cached_features"] is kept[0]
    assert state["constants"] is kept[1]
    assert list(state["constants"]) == ["maskmem_pos_enc"]
    assert [state["images"].shape[0], state["obj_ids"], predictor._get_obj_num(state)] == [FRAMES, [], 0]
    assert [predictor._obj_id_to_idx(state, name) for name in ("b", "a", "b")] == [0, 1, 0]
    predictor.reset_state(state)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    running = predictor.propagate_in_video(state)
    next(running)
    running.close()
    state.pop("images")
    state.clear()
    assert apart(track(predictor, other), truth) == 0


@pytest.mark.parametrize("lacks", [(), ("vision_features",)])
def test_features_that_a_program_puts_into_a_state(
    predictor: SAM2VideoPredictor,
    truth: dict[int, Tensor],
    encoded: Features,
    lacks: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encoded by another process or read from disk: nothing is encoded again."""
    state = begin(predictor)
    state["cached_features"] = features = {
        frame: (image, {name: x for name, x in maps.items() if name not in lacks})
        for frame, (image, maps) in encoded.items()
    }
    monkeypatch.setattr(type(predictor.image_encoder), "forward", None)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    assert apart(track(predictor, state), truth) == 0
    assert state["cached_features"] is features


# Loops -----------------------------------------------------------------------------------------------------------


def test_a_frame_is_in_the_state_when_it_is_yielded(predictor: SAM2VideoPredictor) -> None:
    """Tools read the score and the mask of each object there, on prompted frames and on others, either way."""
    for objects, reverse in ((1, False), (3, False), (2, True)):
        state, first = begin(predictor), FRAMES - 1 if reverse else 0
        for index in range(objects):
            predictor.add_new_points_or_box(state, first, index, points=[[30 + 25 * index, 40]], labels=[1])
        for frame, ids, masks in predictor.propagate_in_video(state, reverse=reverse):
            for index in range(objects):
                outputs = state["output_dict_per_obj"][index]
                output = outputs[KINDS[frame != first]][frame]
                assert output["object_score_logits"].shape == (1, 1)
                assert output["maskmem_features"].isfinite().all()
                assert state["frames_tracked_per_obj"][index][frame] == {"reverse": reverse}
                _, own = predictor._get_orig_video_res_output(state, output["pred_masks"])
                assert torch.equal(own[0], masks[index])
            assert ids == list(range(objects))


@pytest.mark.parametrize(("pointers", "kept", "frames"), [(16, 14, 17), (7, 5, 8)])
def test_outputs_that_are_dropped_in_the_loop(
    predictor: SAM2VideoPredictor, pointers: int, kept: int, frames: int
) -> None:
    """What is further away than pointers reach is not read; one frame less is missed."""
    predictor.max_obj_ptrs_in_encoder = pointers
    features = encode(predictor, clip(SIZE, frames))

    def run(kept: int | None) -> dict[int, Tensor]:
        state, found = clicked_on(predictor, features), {}
        for frame, _, masks in predictor.propagate_in_video(state):
            found[frame] = masks
            outputs = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
            for old in [t for t in outputs if kept is not None and t < frame - kept]:
                outputs.pop(old)
        return found

    whole = run(None)
    assert apart(run(kept), whole) == 0
    assert apart(run(kept - 1), whole) > 1e-5


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another memory": lambda output: output.update(maskmem_features=-output["maskmem_features"]),
    "a memory in place": lambda output: output["maskmem_features"].zero_(),
    "another pointer": lambda output: output.update(obj_ptr=-output["obj_ptr"]),
    "other positions": lambda output: output.update(maskmem_pos_enc=[-x for x in output["maskmem_pos_enc"]]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_edited_in_the_loop_acts_on_the_next_frame(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor], encoded: Features, edit: str
) -> None:
    def run(predictor: Any) -> dict[int, Tensor]:
        state, found = clicked_on(predictor, encoded), {}
        for frame, _, masks in predictor.propagate_in_video(state):
            found[frame] = masks
            if frame == 2:
                EDITS[edit](state["output_dict_per_obj"][0]["non_cond_frame_outputs"][frame])
        return found

    found = run(predictor)
    assert all(torch.equal(found[frame], truth[frame]) for frame in (0, 1, 2))
    assert relative_error(found[3], truth[3]) > 1e-4
    assert relative_error(found[3], run(watched(predictor))[3]) < 1e-3


def test_a_pass_is_dropped_and_another_begun(predictor: SAM2VideoPredictor, truth: dict[int, Tensor]) -> None:
    """Each request of a server begins anew where it likes; frames that were tracked are tracked over again."""
    state = clicked(predictor)
    dropped = [predictor.propagate_in_video(state) for _ in range(2)]
    assert [next(running)[0] for running in dropped] == [0, 0]
    next(dropped[1])
    dropped[0].close()
    del dropped
    found = {}
    for frame in range(FRAMES):
        found |= track(predictor, state, start_frame_idx=frame, max_frame_num_to_track=0)
    assert apart(found, truth) == 0
    assert apart(track(predictor, state), truth) < 1e-6


# Images between frames -------------------------------------------------------------------------------------------


def test_an_image_predictor_on_the_predictor_of_a_running_pass(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor]
) -> None:
    """One for each request, of the same model: neither disturbs the other."""

    def answer() -> np.ndarray:
        images = SAM2ImagePredictor(predictor)
        images.set_image(random_image(60, 90))
        return images.predict(np.array([[30, 20]]), np.array([1]))[2]

    before, found = answer(), {}
    for frame, _, masks in predictor.propagate_in_video(clicked(predictor)):
        found[frame] = masks
        assert np.array_equal(answer(), before)
    assert apart(found, truth) == 0


@pytest.mark.parametrize("frame", [0, 3])
def test_features_of_a_frame_are_those_of_an_image(predictor: SAM2VideoPredictor, frame: int) -> None:
    """Restored into an image predictor they answer a click as the video does, of its three masks the best."""
    state = begin(predictor)
    clicked_masks = predictor.add_new_points_or_box(state, frame, 1, **CLICK)[2]
    _, _, levels, _, sizes = predictor._get_image_feature(state, frame, 1)
    maps = [x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(levels, sizes, strict=True)]
    image = SAM2ImagePredictor(predictor)
    embedding = maps[-1] + predictor.no_mem_embed.view(1, -1, 1, 1)
    image._features = {"image_embed": embedding, "high_res_feats": maps[:-1]}
    image._orig_hw, image._is_image_set = [[HEIGHT, WIDTH]], True  # type: ignore[list-item]
    logits, iou, _ = image.predict(np.array(CLICK["points"]), np.array(CLICK["labels"]), return_logits=True)
    best = torch.from_numpy(logits[iou.argmax()])
    assert relative_error(best, clicked_masks[0, 0].clamp(-32, 32)) < 1e-2  # resized before they are clamped
    assert torch.equal(best > 0, clicked_masks[0, 0] > 0)


# Copies ----------------------------------------------------------------------------------------------------------


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: _through_a_file(value),
}


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_a_state_and_its_predictor_go_on_elsewhere(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor], way: str
) -> None:
    """In the middle of a video, as workers are given them."""
    state = clicked(predictor)
    found = track(predictor, state, max_frame_num_to_track=1)
    state, other = COPIES[way]((state, predictor))
    assert other is not predictor
    found |= track(other, state, start_frame_idx=2)
    assert apart(found, truth) == 0
