"""What Meta's SAM2VideoPredictor answers with weights that hide nothing, written down for the tests.

    python -m benchmarks.official_sam2_video --sam2 PATH

PATH is the folder from which ``import sam2`` works; hydra-core, iopath and torchvision must be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .official_sam2 import COMPUTED, official_model, random_sam2, sample

TARGET = Path(__file__).parents[1] / "tests" / "official_sam2_video.json"
SIZE, FRAMES, HEIGHT, WIDTH = 128, 7, 90, 140
_KEPT = ("maskmem_features", "pred_masks", "obj_ptr", "object_score_logits")
Results = dict[str, dict[str, Tensor]]


def clip(size: int = SIZE, frames: int = FRAMES) -> Tensor:
    """Return normalised frames [frames, 3, size, size]: noise, and two squares that move."""
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(1, 3, size, size, generator=generator)
    images = images + 0.2 * torch.randn(frames, 3, size, size, generator=generator)
    unit = size // 16
    for frame, image in enumerate(images):
        image[:, 4 * unit : 9 * unit, unit + unit * frame // 2 : 6 * unit + unit * frame // 2] += 2
        image[:, 10 * unit - unit * frame // 3 : 14 * unit - unit * frame // 3, 8 * unit : 12 * unit] -= 2
    return images


def weights(variant: str, image_size: int = SIZE) -> dict[str, Tensor]:
    """Return weights that hide nothing, of a model that sees most objects."""
    state = random_sam2(variant, image_size).state_dict()
    if variant.startswith("sam2_"):
        state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 2.0
    return state


def start(predictor: Any, images: Any = None) -> dict[str, Any]:
    """Return the state of a clip."""
    frames = clip(predictor.image_size) if images is None else images
    module = sys.modules[f"{type(predictor).__module__}"]
    with mock.patch.object(module, "load_video_frames", return_value=(frames, HEIGHT, WIDTH)):
        return predictor.init_state(video_path="clip")


@torch.no_grad()
def results(predictor: Any) -> dict[str, Results]:
    """Run every scene on a predictor, official or ours."""
    return {scene.__name__.strip("_"): scene(predictor) for scene in (_clicks, _masks, _corrections, _backwards)}


class _Record:
    """Runs a state and notes what is returned and kept."""

    def __init__(self, predictor: Any, **options: Any) -> None:
        self.predictor, self.found = predictor, {}
        for name, value in options.items():
            setattr(predictor, name, value)
        self.state = start(predictor)

    def points(self, frame: int, obj_id: Any, points: Any = None, labels: Any = None, **kwargs: Any) -> None:
        given = (None if points is None else np.array(points, np.float32), None if labels is None else np.array(labels))
        answer = self.predictor.add_new_points_or_box(self.state, frame, obj_id, *given, **kwargs)
        self._note(f"prompt {obj_id} on {frame}", answer[2])

    def mask(self, frame: int, obj_id: Any, mask: np.ndarray) -> None:
        self._note(f"mask {obj_id} on {frame}", self.predictor.add_new_mask(self.state, frame, obj_id, mask)[2])

    def track(self, name: str, **kwargs: Any) -> None:
        for frame, ids, masks in self.predictor.propagate_in_video(self.state, **kwargs):
            self._note(f"{name} {frame}", masks)
            for obj_id in ids:
                kept = self.state["output_dict_per_obj"][self.state["obj_id_to_idx"][obj_id]]
                kinds = ("cond_frame_outputs", "non_cond_frame_outputs")
                output = next(kept[kind][frame] for kind in kinds if frame in kept[kind])
                self.found[f"{name} {frame} object {obj_id}"] = {key: output[key].float().clone() for key in _KEPT}

    def _note(self, name: str, masks: Tensor) -> None:
        self.found[name] = {"masks": masks.clone()}


def _clicks(predictor: Any) -> Results:
    """Click one object twice, add a click; a box and a click are another one, which comes later."""
    record = _Record(predictor)
    record.points(0, "a", [[30, 40], [100, 20]], [1, 0])
    record.points(0, "a", [[40, 60]], [1], clear_old_points=False)
    record.points(2, "b", [[70, 60]], [1], box=np.array([60, 40, 110, 80], np.float32))
    record.track("forward", max_frame_num_to_track=4)
    record.points(1, "c", [[90, 30]], [1])
    record.track("with another", start_frame_idx=3, max_frame_num_to_track=0)
    return record.found


def _masks(predictor: Any) -> Results:
    """Give masks, of an object and of nothing; a click alone beside them."""
    record = _Record(predictor)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:55, 12:60] = True
    record.mask(0, 1, mask)
    record.mask(0, 2, np.zeros((HEIGHT, WIDTH), bool))
    record.points(0, 3, [[90, 70]], [1])
    record.track("forward", max_frame_num_to_track=3)
    return record.found


def _corrections(predictor: Any) -> Results:
    """Correct tracked frames, which do and do not become conditioning ones; prompts go and objects are removed."""
    record = _Record(predictor)
    record.points(1, 1, [[30, 40]], [1])
    record.points(1, 2, box=np.array([60, 40, 110, 80], np.float32))
    record.track("forward", max_frame_num_to_track=2)
    record.points(3, 1, [[100, 20], [40, 45]], [0, 1])
    record.track("from the correction", start_frame_idx=4, max_frame_num_to_track=0)
    predictor.add_all_frames_to_correct_as_cond = True
    record.points(3, 2, [[80, 60]], [1])
    record.track("with the correction", start_frame_idx=4, max_frame_num_to_track=0)
    predictor.add_all_frames_to_correct_as_cond = False
    record._note("cleared", predictor.clear_all_prompts_in_frame(record.state, 3, 2)[2])
    for frame, masks in predictor.remove_object(record.state, 1)[1]:
        record._note(f"removed on {frame}", masks)
    record.track("alone", start_frame_idx=5, max_frame_num_to_track=0)
    return record.found


def _backwards(predictor: Any) -> Results:
    """Track to the first frame, then to the last, with holes filled where a predictor fills them."""
    record = _Record(predictor, fill_hole_area=8)
    record.points(4, "x", [[40, 40], [90, 70]], [1, 1])
    record.track("back", start_frame_idx=4, max_frame_num_to_track=3, reverse=True)
    record.track("on", start_frame_idx=4, max_frame_num_to_track=1)
    predictor.fill_hole_area = 0
    return record.found


def official_predictor(path: str, variant: str, image_size: int = SIZE) -> Any:
    """Build Meta's predictor of a variant; SciPy finds the regions that its CUDA kernel would."""
    official_model(path, variant, image_size)
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
    release, size = variant.split("_", 1)
    short = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}[size]
    overrides = [f"++model.image_size={image_size}", "++model.fill_hole_area=0"]
    config = f"configs/{release}/{release}_hiera_{short}.yaml"
    predictor = build_sam2_video_predictor(config, device="cpu", hydra_overrides_extra=overrides)
    predictor.fill_hole_area = 0
    predictor.load_state_dict(weights(variant, image_size))
    # Without pointers the memory stays bf16, which crashes in fp32: an object that is prompted later than another.
    predictor.memory_attention.register_forward_pre_hook(
        lambda module, given, named: (given, {**named, "memory": named["memory"].float()}), with_kwargs=True
    )
    return predictor.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    path = parser.parse_args().sam2
    figures = {
        variant: {
            scene: {
                step: {name: [float(f"{value:.7g}") for value in sample(x, 32)] for name, x in tensors.items()}
                for step, tensors in steps.items()
            }
            for scene, steps in results(official_predictor(path, variant)).items()
        }
        for variant in COMPUTED
    }
    TARGET.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
