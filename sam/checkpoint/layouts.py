"""The layouts of SAM weights in the wild: their names for each official one, and the model that they are of.

Official names are the ones of Meta's release, which our modules use. The only other layout we read and write is
that of transformers' ``SamModel``; fine-tunes wrap or prefix one of the two, see :mod:`sam.checkpoint.names`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..config import SIZES, VARIANTS, SamConfig, check_whole
from .errors import CheckpointError, listing

Layout = Literal["official", "transformers"]
LAYOUTS: tuple[Layout, ...] = ("official", "transformers")

_POSITIONAL = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
TRANSFORMERS_POSITIONAL = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
# (official, transformers), tried in this order on the start of a name.
_TRANSFORMERS_STARTS = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.", "vision_encoder."),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
)
_BLOCK_NORM = re.compile(r"\.norm(\d|_final_attn)\.")
_MLP_LAYER = re.compile(r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.(\d+)\.")
_HYPERNETWORK_DEPTH = 3


def transformers_names(official: str, config: SamConfig) -> tuple[str, ...]:
    """Return the names that a transformers state dict has for the official ``official``; one tensor has two."""
    if official == _POSITIONAL:
        return TRANSFORMERS_POSITIONAL
    mlp = _MLP_LAYER.match(official)
    if mlp:
        depth = config.iou_head_depth if "iou" in mlp[1] else _HYPERNETWORK_DEPTH
        index = int(mlp[2])
        place = {0: "proj_in", depth - 1: "proj_out"}.get(index, f"layers.{index - 1}")
        return (f"{mlp[1]}{place}.{official[mlp.end() :]}",)
    name = official
    for ours, theirs in _TRANSFORMERS_STARTS:
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    if official.startswith(("image_encoder.blocks.", "mask_decoder.transformer.")):
        name = _BLOCK_NORM.sub(r".layer_norm\1.", name)
    return (name,)


def transformers_config(config: SamConfig) -> dict[str, Any]:
    """Return the ``config.json`` of the same model for transformers."""
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "hidden_size": config.encoder_embed_dim,
            "num_hidden_layers": config.encoder_depth,
            "num_attention_heads": config.encoder_num_heads,
            "global_attn_indexes": list(config.global_attn_indexes),
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "window_size": config.window_size,
            "mlp_ratio": config.mlp_ratio,
            "mlp_dim": int(config.encoder_embed_dim * config.mlp_ratio),
            "output_channels": config.prompt_embed_dim,
            "num_pos_feats": config.prompt_embed_dim // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": config.prompt_embed_dim,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "image_embedding_size": config.grid_size,
            "mask_input_channels": config.mask_in_chans,
        },
        "mask_decoder_config": {
            "hidden_size": config.prompt_embed_dim,
            "mlp_dim": config.decoder_mlp_dim,
            "num_hidden_layers": config.decoder_depth,
            "num_attention_heads": config.decoder_num_heads,
            "num_multimask_outputs": config.num_multimask_outputs,
            "iou_head_depth": config.iou_head_depth,
            "iou_head_hidden_dim": config.iou_head_hidden_dim,
            # transformers defaults to 1e-6 here; the official decoder has torch's 1e-5.
            "layer_norm_eps": 1e-5,
        },
    }


def infer_config(state: Mapping[str, Tensor], layout: Layout) -> SamConfig:
    """Infer the variant and image size that fit the shapes of a state dict.

    Raises:
        CheckpointError: no variant does.
    """
    root, blocks, patch = {
        "official": ("image_encoder", "blocks", "patch_embed.proj.weight"),
        "transformers": ("vision_encoder", "layers", "patch_embed.projection.weight"),
    }[layout]
    names = (f"{root}.{patch}", f"{root}.pos_embed")
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"missing keys: {listing(missing)}")
    weight, positions = (state[name] for name in names)
    if weight.ndim != 4 or positions.ndim != 4:
        shapes = [f"{name} {list(state[name].shape)}" for name in names]
        raise CheckpointError(f"keys of a wrong shape: {listing(shapes)}; both have four dimensions in SAM")
    index = re.compile(rf"{root}\.{blocks}\.(\d+)\.")
    depth = len({match[1] for name in state if (match := index.match(name))})
    for config in VARIANTS.values():
        if (config.encoder_embed_dim, config.encoder_depth) == (weight.shape[0], depth):
            try:
                return config.with_image_size(positions.shape[1] * config.patch_size)
            except ValueError as error:
                raise CheckpointError(f"{names[1]} is {list(positions.shape)}: {error}") from error
    known = ", ".join(f"{c.variant} {c.encoder_embed_dim} x {c.encoder_depth}" for c in VARIANTS.values())
    raise CheckpointError(
        f"the encoder has {weight.shape[0]} channels and {depth} blocks; the known variants are {known}"
    )


def config_from_transformers(text: bytes) -> SamConfig | None:
    """Return the configuration that a transformers ``config.json`` describes; None if it is not a SAM's.

    Values the file leaves out are transformers' defaults, which are those of vit_b.

    Raises:
        ValueError: not JSON, or parts or values that no ``SamConfig`` has.
        RecursionError: JSON that is nested too deep.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("model_type") != "sam":
        return None
    parts = {name: values.get(name) or {} for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{name} must be an object, got {type(part).__name__}")
    vision, prompt, decoder = parts.values()
    base = VARIANTS["vit_b"]
    config = SamConfig(
        variant="custom",
        encoder_embed_dim=vision.get("hidden_size", base.encoder_embed_dim),
        encoder_depth=vision.get("num_hidden_layers", base.encoder_depth),
        encoder_num_heads=vision.get("num_attention_heads", base.encoder_num_heads),
        global_attn_indexes=vision.get("global_attn_indexes", base.global_attn_indexes),
        image_size=vision.get("image_size", base.image_size),
        patch_size=vision.get("patch_size", base.patch_size),
        window_size=vision.get("window_size", base.window_size),
        prompt_embed_dim=decoder.get("hidden_size", base.prompt_embed_dim),
        mask_in_chans=prompt.get("mask_input_channels", base.mask_in_chans),
        decoder_depth=decoder.get("num_hidden_layers", base.decoder_depth),
        decoder_num_heads=decoder.get("num_attention_heads", base.decoder_num_heads),
        decoder_mlp_dim=decoder.get("mlp_dim", base.decoder_mlp_dim),
        num_multimask_outputs=decoder.get("num_multimask_outputs", base.num_multimask_outputs),
        iou_head_depth=decoder.get("iou_head_depth", base.iou_head_depth),
        iou_head_hidden_dim=decoder.get("iou_head_hidden_dim", base.iou_head_hidden_dim),
    )
    mlp_dim, mlp_ratio = vision.get("mlp_dim"), vision.get("mlp_ratio", base.mlp_ratio)
    if mlp_dim:
        check_whole("mlp_dim", mlp_dim, SIZES)
        mlp_ratio = mlp_dim / config.encoder_embed_dim
    return named(replace(config, mlp_ratio=mlp_ratio))


def named(config: SamConfig) -> SamConfig:
    """Return ``config`` under the name of the table's variant that it equals, image size aside."""
    for known in VARIANTS.values():
        if replace(config, variant=known.variant, image_size=known.image_size) == known:
            return replace(config, variant=known.variant)
    return config
