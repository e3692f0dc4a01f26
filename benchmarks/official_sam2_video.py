"""What Meta's SAM2VideoPredictor answers with weights that hide nothing, written down for the tests.

    python -m benchmarks.official_sam2_video --sam2 PATH [--size 256 --out FILE]

PATH is the folder from which ``import sam2`` works; hydra-core and iopath must be installed, torchvision need not be.
The models of 64 px, whose answers the tests keep, are small; those of other sizes are the released tiny ones.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from sam.config import SAM2_VARIANTS, HieraConfig, Sam2Config
from sam.modeling.build import build_from_config

from .official_sam2 import COMPUTED, draw_weights, official_model, sample

TARGET = Path(__file__).parents[1] / "tests" / "official_sam2_video.npz"
SMALL, FRAMES, HEIGHT, WIDTH = 64, 20, 90, 140
BATCHED = "sam2.1_tiny"  # of the legacy predictor
FINER = 3  # times that are the masks of scenes, so that a pixel is no thousandth of the smallest
PROMPTED = "masks of prompts"
_KEPT = ("maskmem_features", "obj_ptr", "object_score_logits")
Masks = dict[str, Tensor]


def model_config(variant: str, image_size: int = SMALL) -> Sam2Config:
    """Return the released config of a variant; at 64 px of fewer blocks, in which the released widths remain."""
    config = SAM2_VARIANTS[variant].with_image_size(image_size)
    if image_size != SMALL:
        return config
    trunk = HieraConfig(16, 1, (1, 1, 2, 1), (3,))
    return replace(config, image_encoder=trunk, memory_attention_layers=2, memory_attention_dim_feedforward=256)


def weights(config: Sam2Config) -> dict[str, Tensor]:
    """Return weights that hide nothing, of a model that sees most objects.

    Memories are attended to so evenly that each of them counts, and that what bf16 rounds does not grow by the frame.
    """
    state = draw_weights(build_from_config(config)).state_dict()
    for name, weight in state.items():
        if name.startswith("memory_attention") and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(0.5)
    head = "sam_mask_decoder.pred_obj_score_head.layers.2"
    state[f"{head}.weight"].mul_(30)
    state[f"{head}.bias"].add_(6.5)
    return state


def clip(size: int, frames: int = FRAMES) -> Tensor:
    """Return normalised frames [frames, 3, size, size]: noise, and two squares that move."""
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(1, 3, size, size, generator=generator)
    images = images + 0.2 * torch.randn(frames, 3, size, size, generator=generator)
    unit = size // 16
    for frame, image in enumerate(images):
        image[:, 4 * unit : 9 * unit, unit + unit * frame // 2 : 6 * unit + unit * frame // 2] += 2
        image[:, 10 * unit - unit * frame // 3 : 14 * unit - unit * frame // 3, 8 * unit : 12 * unit] -= 2
    return images


def start(predictor: Any, images: Any = None) -> dict[str, Any]:
    """Return the state of a clip."""
    frames = clip(predictor.image_size) if images is None else images
    module = sys.modules[f"{type(predictor).__module__}"]
    with mock.patch.object(module, "load_video_frames", return_value=(frames, HEIGHT, WIDTH)):
        return predictor.init_state(video_path="clip")


@torch.no_grad()
def results(predictor: Any) -> dict[str, Scene]:
    """Run every scene on a predictor, official or ours, of either kind.

    Memories are kept in fp32 in place of bf16, whose last bit falls either way, by the CPU, and grows by the frame.
    """
    is_legacy = hasattr(predictor, "clear_non_cond_mem_for_multi_obj")
    scenes = (_batch, _forgetting) if is_legacy else (_one, _three, _backwards)
    with mock.patch.object(torch, "bfloat16", torch.float32):
        return {scene.__name__.strip("_"): scene(predictor) for scene in scenes}


class Scene:
    """Runs a state.

    Attributes:
        masks: the logits [O, 1, FINER * HEIGHT, FINER * WIDTH] that each step returned.
        low_res: those [O, 1, h, w] that the state keeps of them, -1024 where an object has none.
        scores: of each object that was tracked.
        kept: by step and name samples [O, n] of what the state keeps of the objects, NaN where an object has none, and
            of the masks of prompts before any tracking.
    """

    def __init__(self, predictor: Any, images: Tensor | None = None) -> None:
        self.predictor, self.state = predictor, start(predictor, images)
        self.state["video_height"], self.state["video_width"] = FINER * HEIGHT, FINER * WIDTH
        self.masks: Masks = {}
        self.low_res: Masks = {}
        self.scores: list[float] = []
        self.kept: Masks = {}

    def points(self, frame: int, obj_id: Any, points: Any, labels: Any, clear: bool = True, box: Any = None) -> None:
        given: dict[str, Any] = {"points": FINER * np.array(points, np.float32), "labels": np.array(labels)}
        given["box"] = None if box is None else FINER * np.array(box, np.float32)
        answer = self.predictor.add_new_points_or_box(self.state, frame, obj_id, clear_old_points=clear, **given)
        self.note(f"prompt {obj_id}", frame, answer[2])

    def mask(self, frame: int, obj_id: Any, rows: slice, columns: slice) -> None:
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[rows, columns] = True
        self.note(f"mask {obj_id}", frame, self.predictor.add_new_mask(self.state, frame, obj_id, mask)[2])

    def track(self, name: str, start: int | None = None, more: int | None = None, reverse: bool = False) -> None:
        for frame, _, masks in self.predictor.propagate_in_video(self.state, start, more, reverse):
            self.note(name, frame, masks)
            outputs = (self._newest(index, frame) for index in range(len(masks)))
            self.scores += [float(output["object_score_logits"]) for output in outputs if output]

    def clear(self, frame: int, obj_id: Any) -> None:
        self.note("cleared", frame, self.predictor.clear_all_prompts_in_frame(self.state, frame, obj_id)[2])

    def remove(self, obj_id: Any) -> None:
        for frame, masks in self.predictor.remove_object(self.state, obj_id)[1]:
            self.note(f"{obj_id} removed", frame, masks)

    def note(self, name: str, frame: int, masks: Tensor) -> None:
        step = f"{len(self.masks)} {name} on {frame}"
        side = self.predictor.image_size // 4
        none = torch.full((1, 1, side, side), -1024.0)
        outputs = [self._newest(index, frame) for index in range(len(masks))]
        self.low_res[step] = torch.cat([output["pred_masks"].float() if output else none for output in outputs])
        self.masks[step] = masks.clone()
        for key in _KEPT:
            given = [output and output[key] for output in outputs]
            samples = [None if x is None else sample(x.float(), 32) for x in given]
            width = max((len(x) for x in samples if x is not None), default=0)
            if width:
                missing = torch.full((width,), torch.nan)
                self.kept[f"{step}/{key}"] = torch.stack([missing if x is None else x for x in samples])
        if not self.scores:
            self.kept[f"{step}/{PROMPTED}"] = torch.stack([sample(mask, 32) for mask in masks])

    def _newest(self, index: int, frame: int) -> dict[str, Any] | None:
        kept = [self.state[name][index] for name in ("temp_output_dict_per_obj", "output_dict_per_obj")]
        kinds = ("cond_frame_outputs", "non_cond_frame_outputs")
        return next((of[kind][frame] for of in kept for kind in kinds if frame in of[kind]), None)


def _one(predictor: Any) -> Scene:
    """Click one object thrice, track it, and correct tracked frames that do and do not become conditioning ones."""
    scene = Scene(predictor)
    scene.points(0, "a", [[30, 40], [100, 20]], [1, 0])
    scene.points(0, "a", [[40, 60]], [1], clear=False)
    scene.track("forward")
    scene.points(6, "a", [[100, 20], [40, 45]], [0, 1])
    scene.track("from the correction", 7, 0)
    predictor.add_all_frames_to_correct_as_cond = True
    scene.points(12, "a", [[80, 60]], [1])
    predictor.add_all_frames_to_correct_as_cond = False
    scene.track("with the correction", 13, 1)
    return scene


def _three(predictor: Any) -> Scene:
    """Track a mask and a box; correct a tracked and an untracked frame; an object comes late, another one goes."""
    scene = Scene(predictor)
    scene.mask(0, 1, slice(20, 55), slice(12, 60))
    scene.points(0, 2, [[70, 60]], [1], box=[60, 40, 110, 80])
    scene.track("two", more=5)
    scene.points(8, 3, [[90, 70]], [1])
    scene.points(8, 1, [[30, 30], [60, 20]], [1, 0])
    scene.points(3, 2, [[80, 60]], [1])
    scene.track("three", 6)
    scene.clear(8, 1)
    scene.remove(2)
    scene.track("after", 18)
    return scene


def _backwards(predictor: Any) -> Scene:
    """Track an object, and one that is nowhere, towards the first frame, then to the last; holes are filled."""
    predictor.fill_hole_area = 8
    scene = Scene(predictor)
    scene.points(14, "x", [[40, 40], [90, 70]], [1, 1])
    scene.mask(14, "nothing", slice(0), slice(0))
    scene.track("back", 14, 4, reverse=True)
    scene.track("on", 14, 1)
    predictor.fill_hole_area = 0
    return scene


def _batch(predictor: Any) -> Scene:
    """Track three objects, one of which has a prompt where the others have none; correct, clear, remove; go back."""
    scene = Scene(predictor)
    scene.points(0, 1, [[30, 40], [100, 20]], [1, 0])
    scene.points(0, 2, [[70, 60]], [1], box=[60, 40, 110, 80])
    scene.mask(2, 3, slice(20, 55), slice(12, 60))
    scene.track("forward", more=4)
    scene.points(3, 2, [[80, 60]], [1])
    scene.points(7, 1, [[30, 30], [60, 20]], [1, 0])
    scene.track("on", 5, 4)
    scene.clear(7, 1)
    scene.remove(3)
    scene.track("back", 6, 2, reverse=True)
    return scene


def _forgetting(predictor: Any) -> Scene:
    """Prompt objects anew, which makes them forget the tracked frames around."""
    predictor.clear_non_cond_mem_around_input = predictor.clear_non_cond_mem_for_multi_obj = True
    scene = Scene(predictor)
    scene.points(0, 1, [[30, 40]], [1])
    scene.points(0, 2, [[90, 70]], [1])
    scene.track("forward", more=3)
    scene.points(5, 2, [[80, 60]], [1])
    scene.track("on", 4, 2)
    return scene


def official_predictor(path: str, config: Sam2Config, module: str = "sam2_video_predictor") -> Any:
    """Build Meta's predictor; SciPy finds the regions that its CUDA kernel would."""
    official_model(path, config.variant, config.image_size)
    import sam2
    from sam2.build_sam import build_sam2_video_predictor
    from scipy import ndimage

    def components(masks: Tensor) -> tuple[Tensor, Tensor]:
        labels, areas = torch.zeros_like(masks, dtype=torch.int32), torch.zeros_like(masks, dtype=torch.int32)
        for index, mask in enumerate(masks[:, 0].numpy()):
            found, count = ndimage.label(mask, np.ones((3, 3)))
            sizes = np.bincount(found.ravel(), minlength=count + 1)
            sizes[0] = 0
            labels[index, 0], areas[index, 0] = torch.from_numpy(found), torch.from_numpy(sizes[found])
        return labels, areas

    sys.modules["sam2._C"] = sam2._C = types.SimpleNamespace(get_connected_componnets=components)
    release, size = config.variant.split("_", 1)
    short = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[size]
    name = f"configs/{release}/{release}_hiera_{short}.yaml"
    overrides = [f"++model.{key}={value}" for key, value in _overrides(config).items()]
    overrides.append(f"++model._target_=sam2.{module}.SAM2VideoPredictor")
    predictor = build_sam2_video_predictor(name, device="cpu", hydra_overrides_extra=overrides)
    predictor.fill_hole_area = 0
    predictor.load_state_dict(weights(config))
    # Without pointers the memory stays bf16, which crashes in fp32: an object that is prompted later than another.
    predictor.memory_attention.register_forward_pre_hook(
        lambda module, given, named: (given, {**named, "memory": named["memory"].float()}), with_kwargs=True
    )
    return predictor.requires_grad_(False)


def _overrides(config: Sam2Config) -> dict[str, Any]:
    trunk = config.image_encoder
    names = (
        "embed_dim",
        "num_heads",
        "stages",
        "global_att_blocks",
        "window_pos_embed_bkg_spatial_size",
        "window_spec",
    )
    values = {name: getattr(trunk, name) for name in names}
    return {
        "image_size": config.image_size,
        **{f"image_encoder.trunk.{name}": list(x) if isinstance(x, tuple) else x for name, x in values.items()},
        "image_encoder.neck.backbone_channel_list": trunk.channel_list,
        "memory_attention.num_layers": config.memory_attention_layers,
        "memory_attention.layer.dim_feedforward": config.memory_attention_dim_feedforward,
    }


def write(path: Path, scenes: dict[str, dict[str, Scene]]) -> None:
    """Write the low-resolution logits of all steps, named by variant, scene and step, and what is kept."""
    arrays = {}
    for variant, of_variant in scenes.items():
        for name, scene in of_variant.items():
            arrays |= {f"{variant}/{name}/{step}": x.numpy() for step, x in scene.low_res.items()}
            arrays |= {f"kept/{variant}/{name}/{key}": x.numpy() for key, x in scene.kept.items()}
    np.savez_compressed(path, **arrays)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    parser.add_argument("--size", type=int, default=SMALL, help="side of the model's square, in pixels")
    parser.add_argument("--out", type=Path, default=TARGET, metavar="FILE", help="where to write, .npz")
    args = parser.parse_args(arguments)
    configs = {variant: model_config(variant, args.size) for variant in COMPUTED}
    figures = {name: results(official_predictor(args.sam2, config)) for name, config in configs.items()}
    legacy = official_predictor(args.sam2, configs[BATCHED], "sam2_video_predictor_legacy")
    write(args.out, figures | {f"{BATCHED} legacy": results(legacy)})


if __name__ == "__main__":
    main()
