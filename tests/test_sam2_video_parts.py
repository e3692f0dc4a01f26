"""Programs that hook, replace, train or export parts of a predictor of videos, or change what it was built with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import assert_close_l2
from models import randomise
from test_sam2_programs import Lora
from test_sam2_video import _without_bars, apart, clicked, track
from test_sam2_video_programs import CLICK, KINDS, SIZE, Features, built, clicked_on, encoded, predictor, truth
from torch import Tensor, nn

import sam.sam2.sam2_video_predictor as face
from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip, start
from fastsam_kernels.numerics import relative_error
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.sam2.utils import misc

__all__ = ["_without_bars", "built", "encoded", "predictor", "truth"]
PARTS = (
    "image_encoder",
    "memory_attention",
    "memory_encoder",
    "sam_prompt_encoder",
    "sam_mask_decoder",
    "obj_ptr_proj",
)


def by_official_calls(predictor: Any, run: Callable[[Any], dict[int, Tensor]] | None = None) -> dict[int, Tensor]:
    """Track by a copy that calls its modules."""
    copied = copy.deepcopy(predictor)
    copied.kernels = "reference"
    return run(copied) if run is not None else track(copied, clicked(copied))


# Hooks and patches -----------------------------------------------------------------------------------------------


def shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {name: shapes(x) for name, x in value.items()}
    return [shapes(x) for x in value] if isinstance(value, (list, tuple)) else value


def test_hooks_see_the_official_calls_of_each_object(predictor: SAM2VideoPredictor) -> None:
    """Object by object, in their order, with their keywords; the masks are those without hooks."""
    state = clicked(predictor, 4)
    predictor.add_new_points_or_box(state, 0, "second", box=[60, 40, 110, 80])
    seen: list[tuple[str, int, dict[str, Any], Any]] = []
    for name in PARTS:
        predictor.get_submodule(name).register_forward_hook(
            lambda _, given, named, output, name=name: seen.append((name, len(given), named, output)), with_kwargs=True
        )
    blocks: Any = predictor.image_encoder.trunk.blocks
    windows: list[Any] = []
    blocks[0].attn.register_forward_hook(lambda _, given, output: windows.append(shapes([given[0], output])))
    predictor.propagate_in_video_preflight(state)
    seen.clear()
    windows.clear()
    found = track(predictor, state, start_frame_idx=1, max_frame_num_to_track=0)
    of_object = ["memory_attention", "sam_prompt_encoder", "sam_mask_decoder", "obj_ptr_proj", "memory_encoder"]
    assert [name for name, *_ in seen] == ["image_encoder", *of_object, *of_object]
    side, points, tokens = SIZE // 4, 1, (SIZE // 16) ** 2
    _, attention, prompts, decoder, pointers, memory = seen[:6]
    assert (attention[1], list(attention[2])) == (
        0,
        ["curr", "curr_pos", "memory", "memory_pos", "num_obj_ptr_tokens"],
    )
    assert (attention[2]["memory"].shape, attention[2]["num_obj_ptr_tokens"]) == ((tokens + points, 1, 64), points)
    assert (prompts[1], list(prompts[2])) == (0, ["points", "boxes", "masks"])
    assert (decoder[1], len(decoder[2])) == (0, 7)
    assert shapes(decoder[3]) == [(1, 3, side, side), (1, 3), (1, 3, 64), (1, 1)]
    assert (shapes(pointers[3]), memory[1], memory[2]) == ((1, 64), 2, {"skip_mask_sigmoid": True})
    assert shapes(memory[3]) == {"vision_features": (1, 64, 4, 4), "vision_pos_enc": [(1, 64, 4, 4)]}
    assert windows == [[(4, 8, 8, 16), (4, 8, 8, 16)]]
    scores = torch.cat([output[3] for name, *_, output in seen if name == "sam_mask_decoder"])
    kept = [state["output_dict_per_obj"][index][KINDS[1]][1]["object_score_logits"] for index in range(2)]
    assert torch.equal(scores, torch.cat(kept))
    plain = clicked(other := copy_without_hooks(predictor), 4)
    other.add_new_points_or_box(plain, 0, "second", box=[60, 40, 110, 80])
    assert apart(found, track(other, plain, start_frame_idx=1, max_frame_num_to_track=0)) < 1e-3


def copy_without_hooks(predictor: Any) -> Any:
    copied = copy.deepcopy(predictor)
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def higher(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``_forward_sam_heads`` returns, with other masks."""
    return (*result[:3], result[3] + 1, result[4] + 1, *result[5:])


class Patched(SAM2VideoPredictor):
    """As forks override, by the official arguments."""

    def _forward_sam_heads(self, **given: Any) -> Any:  # type: ignore[override]
        return higher(super()._forward_sam_heads(**given))


def patch_step(predictor: Any) -> None:
    step = predictor._track_step

    def patched(*given: Any) -> Any:
        current, heads, high_res, pixels = step(*given)
        return current, higher(heads), high_res, pixels

    predictor._track_step = patched


PATCHES: dict[str, Callable[[Any], Any]] = {
    "the heads of an instance": lambda p: setattr(
        p, "_forward_sam_heads", lambda f=p._forward_sam_heads, **given: higher(f(**given))
    ),
    "the step of an instance": patch_step,
    "the heads of a subclass": lambda p: setattr(p, "__class__", Patched),
    "a hook that changes the masks": lambda p: p.sam_mask_decoder.register_forward_hook(
        lambda _, given, output: (output[0] + 1, *output[1:])
    ),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_what_is_patched_acts_on_every_frame(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor], encoded: Features, patch: str
) -> None:
    """On the frame with the prompt the masks are higher by 1; all after it are those of the official calls."""
    PATCHES[patch](predictor)
    found = track(predictor, clicked_on(predictor, encoded))
    assert relative_error(found[0], truth[0] + 1) < 1e-5
    assert min(relative_error(found[frame], truth[frame]) for frame in found) > 1e-2
    predictor.kernels = "reference"
    assert apart(found, track(predictor, clicked_on(predictor, encoded))) < 1e-3


# Stand-ins -------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """A module of the program around the official one."""

    def __init__(self, module: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.module, self.factor, self.calls = module, factor, 0

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        output = self.module(*given, **named)
        if isinstance(output, dict):
            return {**output, "vision_features": output["vision_features"] * self.factor}
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@pytest.mark.parametrize("part", [*PARTS, "image_encoder.trunk", "memory_attention.layers.0", "memory_encoder.fuser"])
def test_a_stand_in_of_the_program_is_called(
    predictor: SAM2VideoPredictor, truth: dict[int, Tensor], part: str
) -> None:
    parent, _, name = part.rpartition(".")
    stand_in = StandIn(predictor.get_submodule(part))
    setattr(predictor.get_submodule(parent), name, stand_in)
    assert apart(track(predictor, clicked(predictor)), truth) < 1e-3
    assert stand_in.calls >= len(truth) - 1  # the first frame reads no memory
    if part == "memory_encoder":
        stand_in.factor = 1.5
        assert relative_error(track(predictor, clicked(predictor))[1], truth[1]) > 1e-3


COMPILED: dict[str, Callable[[Any], Any]] = {
    "the whole": lambda p: torch.compile(p, backend="eager"),
    "the heads": lambda p: setattr(
        p, "_forward_sam_heads", torch.compile(p._forward_sam_heads, backend="eager", dynamic=False)
    ),
    "the trunk's forward": lambda p: setattr(
        p.image_encoder.trunk, "forward", torch.compile(p.image_encoder.trunk.forward, backend="eager")
    ),
    "three modules": lambda p: [
        setattr(p, name, torch.compile(getattr(p, name), backend="eager"))
        for name in ("image_encoder", "memory_attention", "sam_mask_decoder")
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMPILED)
def test_what_a_program_compiles(predictor: SAM2VideoPredictor, truth: dict[int, Tensor], what: str) -> None:
    made = COMPILED[what](predictor)
    compiled: Any = made if what == "the whole" else predictor
    assert apart(track(compiled, clicked_of(compiled, predictor)), truth) < 1e-3


def clicked_of(compiled: Any, predictor: Any) -> dict[str, Any]:
    state = start(predictor, clip(SIZE, 5))
    compiled.add_new_points_or_box(state, 0, 1, **CLICK)
    return state


@pytest.mark.parametrize("part", ["sam_mask_decoder", "memory_attention", "memory_encoder", "image_encoder.trunk"])
def test_lora_in_every_linear_layer(predictor: SAM2VideoPredictor, truth: dict[int, Tensor], part: str) -> None:
    parents = [(parent, name) for parent in predictor.get_submodule(part).modules() for name, _ in children_of(parent)]
    for parent, name in parents:
        lora = Lora(getattr(parent, name))
        randomise(lora.up)
        lora.requires_grad_(False)
        setattr(parent, name, lora)
    assert len(parents) >= 2
    found = track(predictor, clicked(predictor))
    assert apart(found, by_official_calls(predictor)) < 1e-3
    assert relative_error(found[2], truth[2]) > 1e-3


def children_of(parent: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in parent.named_children() if type(child) is nn.Linear]


# What a program sets after building ------------------------------------------------------------------------------


def slice_memory(predictor: Any) -> None:
    predictor.maskmem_tpos_enc = nn.Parameter(predictor.maskmem_tpos_enc[:3], requires_grad=False)
    predictor.num_maskmem = 3


def one_mask(predictor: Any) -> None:
    predictor.multimask_output_for_tracking = predictor.sam_mask_decoder.dynamic_multimask_via_stability = False


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda predictor: setattr(predictor, name, value)


SETTINGS: dict[str, Callable[[Any], None]] = {
    "maskmem_tpos_enc and num_maskmem": slice_memory,
    "num_maskmem of none": attribute("num_maskmem", 0),
    "multimask_output_for_tracking": one_mask,
    **{
        name: attribute(name, value)
        for name, value in {
            "num_maskmem": 2,
            "memory_temporal_stride_for_eval": 2,
            "max_obj_ptrs_in_encoder": 2,
            "use_obj_ptrs_in_encoder": False,
            "only_obj_ptrs_in_the_past_for_eval": False,
            "max_cond_frames_in_attn": 2,
            "sigmoid_scale_for_mem_enc": 5.0,
            "add_tpos_enc_to_obj_ptrs": False,
            "binarize_mask_from_pts_for_mem_enc": True,
            "fill_hole_area": SIZE**2,
        }.items()
    },
}


def prompted_thrice(predictor: Any, features: Features) -> dict[int, Tensor]:
    """Track between frames with prompts, so that some are in the future."""
    state = clicked_on(predictor, features)
    for frame in (2, 4):
        predictor.add_new_points_or_box(state, frame, 1, points=[[90, 70]], labels=[1])
    return track(predictor, state)


@pytest.fixture(scope="module")
def before(built: SAM2VideoPredictor, encoded: Features) -> dict[int, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face, "tqdm", lambda frames, desc: frames)
        return prompted_thrice(built, encoded)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_set_after_building_acts_on_the_next_call(
    predictor: SAM2VideoPredictor, before: dict[int, Tensor], encoded: Features, setting: str
) -> None:
    """And what was made of the model before does not: it acts as in a model that only ever had it."""
    track(predictor, clicked_on(predictor, encoded), max_frame_num_to_track=1)
    SETTINGS[setting](predictor)
    found = prompted_thrice(predictor, encoded)
    assert max(relative_error(found[frame], before[frame]) for frame in found) > 1e-5
    assert apart(found, by_official_calls(predictor, lambda stock: prompted_thrice(stock, encoded))) < 1e-3


def test_names_that_programs_replace_are_looked_up_when_called(predictor: SAM2VideoPredictor) -> None:
    """The loader with its official keywords, bars of both modules, and what fills holes."""
    asked: list[dict[str, Any]] = []
    bars: list[str] = []

    def load(**given: Any) -> tuple[Any, int, int]:
        asked.append(given)
        return list(clip(SIZE, 3)), HEIGHT, WIDTH

    def bar(frames: Any, **named: Any) -> Any:
        bars.append(named["desc"])
        return frames

    def fill(masks: Tensor, area: float) -> Tensor:
        assert area == 5
        return masks + 1

    with mock.patch.object(face, "load_video_frames", load):
        state = predictor.init_state("a clip", async_loading_frames=True)
    names = ("video_path", "image_size", "offload_video_to_cpu", "async_loading_frames", "compute_device")
    assert asked == [dict(zip(names, ("a clip", SIZE, False, True, predictor.device), strict=True))]
    plain = predictor.add_new_points_or_box(state, 0, 1, **CLICK)[2]
    predictor.fill_hole_area = 5
    with mock.patch.object(misc, "tqdm", bar), mock.patch.object(face, "tqdm", bar):
        with mock.patch.object(face, "fill_holes_in_mask_scores", fill):
            raised = predictor.add_new_points_or_box(state, 0, 2, **CLICK)[2][1]
            assert_close_l2(raised, plain[0] + 1, 1e-6, "raised masks")
            found = track(predictor, state)
        assert not torch.equal(found[1], track(predictor, state)[1])
    assert bars == ["propagate in video"] * 2
