"""Builders of SAM 2 models by their official names: ``sam2.build_sam``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.into_model import load_into
from ..modeling.sam2_base import SAM2Base
from ..system.hardware import usable_device
from .model_tree import CONFIG_VARIANTS, config_of, instantiate, read_tree

if TYPE_CHECKING:
    from ..video.predictor import VideoPredictor

# Of each model on the Hugging Face hub the names of its config and its checkpoint.
HF_MODEL_ID_TO_FILENAMES = {
    f"facebook/{release}-hiera-{size.replace('_', '-')}": (
        f"configs/{release}/{name}.yaml",
        f"{release}_hiera_{size}.pt",
    )
    for name, variant in CONFIG_VARIANTS.items()
    for release, _, size in [variant.partition("_")]
}
# What ``apply_postprocessing`` overrides.
POSTPROCESSING_SWITCH = "sam_mask_decoder_extra_args.dynamic_multimask_via_stability"
_POSTPROCESSING = (
    f"++model.{POSTPROCESSING_SWITCH}=true",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
    "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
)
_VIDEO_POSTPROCESSING = (
    *_POSTPROCESSING,
    "++model.binarize_mask_from_pts_for_mem_enc=true",
    "++model.fill_hole_area=8",
)
_PREDICTOR = "sam.sam2.sam2_video_predictor.SAM2VideoPredictor"
# What forks add to this module, which those who import it from there need.
_OF_FORKS = {
    "build_sam2_camera_predictor": "segment-anything-2-real-time",
    "build_sam2_video_predictor_npz": "MedSAM2",
}
_OPTIONS = ("device", "mode", "hydra_overrides_extra", "apply_postprocessing")


def build_sam2(
    config_file: str | os.PathLike[str],
    ckpt_path: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cuda",
    mode: str = "eval",
    hydra_overrides_extra: Sequence[str] = [],
    apply_postprocessing: bool = True,
    **kwargs: Any,
) -> SAM2Base:
    """Build a model of images and of the steps of tracking.

    Args:
        config_file: the name of a released config, with or without folders and ``.yaml``; the absolute path of a YAML
            file; or a name that the caller's hydra finds.
        ckpt_path: weights in any layout that :func:`sam.load_model` reads; None leaves random ones.
        device: where to.
        mode: "eval"; any other leaves the model in train mode.
        hydra_overrides_extra: options of the config like ``++model.image_size=512``.
        apply_postprocessing: replace an unstable single mask by the best of the three.

    Raises:
        TypeError: a keyword argument that there is none of; officially it would be ignored.
        ValueError: an unknown config or option; a device that torch cannot use here.
        FileNotFoundError: no such checkpoint.
        CheckpointError: unreadable, foreign, or weights of another config, in one line.
    """
    _refuse("build_sam2", kwargs)
    overrides = [*hydra_overrides_extra, *(_POSTPROCESSING if apply_postprocessing else ())]
    return _build(config_file, overrides, ckpt_path, device, mode)


def build_sam2_video_predictor(
    config_file: str | os.PathLike[str],
    ckpt_path: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cuda",
    mode: str = "eval",
    hydra_overrides_extra: Sequence[str] = [],
    apply_postprocessing: bool = True,
    vos_optimized: bool = False,
    **kwargs: Any,
) -> VideoPredictor:
    """Build a model that tracks objects through videos.

    Args:
        config_file, ckpt_path, device, mode, hydra_overrides_extra: as for :func:`build_sam2`; options of the predictor
            are overrides too, like ``++model.non_overlap_masks=true``.
        apply_postprocessing: replace an unstable single mask by the best of the three, fill holes of up to 8 pixels,
            and remember prompted masks with hard edges.
        vos_optimized: compile the model, see :class:`~sam.sam2.sam2_video_predictor.SAM2VideoPredictorVOS`.

    Raises:
        as :func:`build_sam2`.
    """
    _refuse("build_sam2_video_predictor", kwargs)
    overrides = [f"++model._target_={_PREDICTOR}{'VOS' if vos_optimized else ''}"]
    if vos_optimized:
        overrides.append("++model.compile_image_encoder=true")
    overrides += [*hydra_overrides_extra, *(_VIDEO_POSTPROCESSING if apply_postprocessing else ())]
    return _build(config_file, overrides, ckpt_path, device, mode)


def _build(
    config_file: str | os.PathLike[str],
    overrides: Sequence[str],
    ckpt_path: str | os.PathLike[str] | None,
    device: torch.device | str,
    mode: str,
) -> Any:
    device = usable_device(device)
    tree = read_tree(config_file, overrides)
    config = config_of(tree)
    model: SAM2Base = instantiate(tree["model"])
    model.config = config
    _load_checkpoint(model, ckpt_path)
    model = model.to(device)
    return model.eval() if mode == "eval" else model.train()


def build_sam2_hf(model_id: str, **kwargs: Any) -> SAM2Base:
    """Build a model of the Hugging Face hub, which needs huggingface_hub and, the first time, a network.

    Args:
        model_id: like "facebook/sam2.1-hiera-large".
        **kwargs: arguments of :func:`build_sam2`.

    Raises:
        ImportError: no huggingface_hub.
        ValueError: an unknown ``model_id``.
    """
    config_name, ckpt_path = _hf_download(model_id)
    return build_sam2(config_file=config_name, ckpt_path=ckpt_path, **kwargs)


def build_sam2_video_predictor_hf(model_id: str, **kwargs: Any) -> VideoPredictor:
    """Build a predictor of videos of the Hugging Face hub, as :func:`build_sam2_hf`.

    Args:
        model_id: like "facebook/sam2.1-hiera-large".
        **kwargs: arguments of :func:`build_sam2_video_predictor`.
    """
    config_name, ckpt_path = _hf_download(model_id)
    return build_sam2_video_predictor(config_file=config_name, ckpt_path=ckpt_path, **kwargs)


def from_pretrained(kind: Any, model_id: str, kwargs: Mapping[str, Any]) -> Any:
    """Make a predictor or generator of class ``kind`` on a model of the hub, each with its own arguments."""
    of_model = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    rest = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    return kind(build_sam2_hf(model_id, **of_model), **rest)


def _hf_download(model_id: str) -> tuple[str, str]:
    if model_id not in HF_MODEL_ID_TO_FILENAMES:
        raise ValueError(f"unknown model {model_id!r}; known: {', '.join(HF_MODEL_ID_TO_FILENAMES)}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(f"{model_id} comes from the Hugging Face hub: pip install huggingface_hub") from None
    config_name, checkpoint_name = HF_MODEL_ID_TO_FILENAMES[model_id]
    return config_name, hf_hub_download(repo_id=model_id, filename=checkpoint_name)


def _load_checkpoint(model: torch.nn.Module, ckpt_path: str | os.PathLike[str] | None) -> None:
    """Load weights strictly; None loads nothing."""
    if ckpt_path is not None:
        load_into(model, ckpt_path)


def _refuse(function: str, kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        name = next(iter(kwargs))
        raise TypeError(
            f"{function} takes no {name!r}: options of the model are overrides, like "
            f'hydra_overrides_extra=["++model.{name}={kwargs[name]}"]'
        )


def __getattr__(name: str) -> Any:
    if name in _OF_FORKS:
        raise ImportError(f"{name} is not of sam2 but of its fork {_OF_FORKS[name]}: install that in its place")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
