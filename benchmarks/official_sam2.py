"""What Meta's SAM 2 computes with weights that hide nothing, written down for the tests.

    python -m benchmarks.official_sam2 --sam2 PATH

PATH is the folder from which ``import sam2`` works; hydra-core and iopath must be installed, torchvision need not be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam.config import SAM2_VARIANTS
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base

from .torchvision_stand_in import stand_in_for_torchvision

TARGET = Path(__file__).parents[1] / "tests" / "official_sam2.json"
SIZE, FRAMES, OBJECTS = 256, 5, 3
COMPUTED = ("sam2_tiny", "sam2.1_tiny")
_SHORT = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def random_sam2(variant: str, image_size: int = SIZE) -> SAM2Base:
    """Build a model whose every weight is drawn by its name, those that start at zero or one too.

    It sees most objects in 2.1, and in 2.0 some: an absent object's mask is a constant, which hides everything else.
    """
    model = draw_weights(build_from_config(SAM2_VARIANTS[variant].with_image_size(image_size)))
    if variant.startswith("sam2_"):
        model.get_parameter("sam_mask_decoder.pred_obj_score_head.layers.2.bias").sub_(0.9)
    return model


def draw_weights(model: SAM2Base) -> SAM2Base:
    """Draw every weight of a model by its name, those that start at zero or one too."""
    model.requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name.endswith("gaussian_matrix"):
                weight.copy_(noise)
            elif weight.ndim == 1 and name.endswith("weight"):  # a norm's
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("gamma"):
                weight.copy_(0.5 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            elif name.rpartition(".")[2] != "weight":  # tables of positions and lone vectors
                weight.copy_(0.3 * noise)
            else:
                gain = 1.5 if "attn.qkv" in name or "_proj." in name else 1.0  # else attention is almost even
                weight.copy_(gain * noise * weight[0].numel() ** -0.5)
    return model


def official_model(path: str, variant: str, image_size: int = SIZE) -> nn.Module:
    """Build Meta's model of a variant, on the CPU, without weights."""
    if path not in sys.path:
        sys.path.insert(0, path)
    stand_in_for_torchvision()
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()  # sam.sam2 offers configs of the same names, of our own models
    from sam2.build_sam import build_sam2

    if not GlobalHydra.instance().is_initialized():
        initialize_config_module("sam2", version_base="1.2")
    release, size = variant.split("_", 1)
    config = f"configs/{release}/{release}_hiera_{_SHORT[size]}.yaml"
    overrides = [f"++model.image_size={image_size}"]
    model: nn.Module = build_sam2(config, device="cpu", hydra_overrides_extra=overrides).requires_grad_(False)
    if not type(model).__module__.startswith("sam2."):
        raise ImportError(f"{path} gave a model of {type(model).__module__}, which is not Meta's package")
    return model


def names_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many weights there are, and a digest of their names and shapes."""
    lines = sorted(f"{name} {list(weight.shape)}" for name, weight in state.items())
    return {"count": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def sample(x: Tensor, count: int = 96) -> Tensor:
    """Return values from all over a tensor, fp32."""
    flat = x.detach().float().reshape(-1)
    return flat[torch.linspace(0, len(flat) - 1, min(count, len(flat))).long()]


def images() -> Tensor:
    """Return the frames of a clip, normalised, [FRAMES, 3, SIZE, SIZE]: noise, and a square that moves."""
    frames = 0.5 * torch.randn(FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for frame, image in enumerate(frames):
        image[:, 60 + 10 * frame : 130 + 10 * frame, 40 + 8 * frame : 120 + 8 * frame] += 2
    return frames


@torch.no_grad()
def computed(model: Any) -> dict[str, dict[str, Tensor]]:
    """Run a model, official or ours, through its official methods: an image, its prompts, a clip."""
    outputs = {"image": _image(model)}
    for name, arguments in _prompts(model).items():
        low_res, _, ious, best, _, pointer, scores = model._forward_sam_heads(**arguments)
        outputs[name] = {"low_res": low_res, "ious": ious, "best": best, "obj_ptr": pointer, "scores": scores}
    return {**outputs, **_clip(model)}


def _image(model: Any) -> dict[str, Tensor]:
    maps = model.forward_image(images()[:1])["backbone_fpn"]
    return {"s0": maps[0], "s1": maps[1], "embedding": maps[2] + model.no_mem_embed.view(1, -1, 1, 1)}


def _prompts(model: Any) -> dict[str, dict[str, Any]]:
    maps = [x.expand(OBJECTS, -1, -1, -1) for x in model.forward_image(images()[:1])["backbone_fpn"]]
    generator = torch.Generator().manual_seed(1)
    coords = SIZE * torch.rand(OBJECTS, 4, 2, generator=generator)
    labels = torch.tensor([[1, 0, 1, 1], [2, 3, 1, 0], [0, 1, -1, -1]], dtype=torch.int32)
    shared = {"backbone_features": maps[2] + model.no_mem_embed.view(1, -1, 1, 1), "high_res_features": maps[:2]}
    few = {"point_coords": coords[:, :1], "point_labels": labels[:, :1].clamp(max=1)}
    many = {"point_coords": coords, "point_labels": labels}
    mask = 4 * torch.randn(OBJECTS, 1, SIZE // 4, SIZE // 4, generator=generator)
    return {
        "one point, three masks": {**shared, "point_inputs": few, "multimask_output": True},
        "points and box corners": {**shared, "point_inputs": many, "multimask_output": False},
        "mask": {**shared, "point_inputs": many, "mask_inputs": mask, "multimask_output": False},
        "nothing": {**shared, "multimask_output": True},
    }


def _clip(model: Any) -> dict[str, dict[str, Tensor]]:
    """Track objects over all frames: points on the first, a mask on the third, a click on the last."""
    results: dict[str, dict[str, Tensor]] = {}
    record: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    generator = torch.Generator().manual_seed(2)
    coords = SIZE * torch.rand(OBJECTS, 2, 2, generator=generator)
    points = {"point_coords": coords, "point_labels": torch.ones(OBJECTS, 2, dtype=torch.int32)}
    masks = torch.zeros(OBJECTS, 1, SIZE, SIZE)
    masks[:, :, 80:160, 60:140] = 1
    masks[1] = 0  # an object that is gone
    for frame, image in enumerate(images()):
        out = model.forward_image(image[None])
        out = {key: [x.expand(OBJECTS, -1, -1, -1) for x in out[key]] for key in ("backbone_fpn", "vision_pos_enc")}
        _, features, positions, sizes = model._prepare_backbone_features(out)
        is_prompted = frame in (0, 2)
        result = model.track_step(
            frame_idx=frame,
            is_init_cond_frame=frame == 0,
            current_vision_feats=features,
            current_vision_pos_embeds=positions,
            feat_sizes=sizes,
            point_inputs=points if frame in (0, FRAMES - 1) else None,
            mask_inputs=masks if frame == 2 else None,
            output_dict=record,
            num_frames=FRAMES,
            prev_sam_mask_logits=results["frame 3"]["pred_masks"] if frame == FRAMES - 1 else None,
        )
        record["cond_frame_outputs" if is_prompted else "non_cond_frame_outputs"][frame] = result
        kept = ("pred_masks", "obj_ptr", "object_score_logits", "maskmem_features")
        results[f"frame {frame}"] = {name: result[name] for name in kept}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam2", required=True, metavar="PATH", help="folder from which import sam2 works")
    path = parser.parse_args().sam2
    names = {variant: names_of(official_model(path, variant).state_dict()) for variant in SAM2_VARIANTS}
    figures = {}
    for variant in COMPUTED:
        model = official_model(path, variant)
        model.load_state_dict(random_sam2(variant).state_dict())
        figures[variant] = {
            case: {name: [float(f"{value:.7g}") for value in sample(x)] for name, x in results.items()}
            for case, results in computed(model).items()
        }
    TARGET.write_text(json.dumps({"names": names, "figures": figures}) + "\n")


if __name__ == "__main__":
    main()
