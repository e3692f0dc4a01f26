"""The layouts of SAM 2's weights in the wild: their names for each official one, and the model that they are of.

Official names are those of Meta's release, which our modules have. That of transformers is ``Sam2VideoModel``'s, of
which ``Sam2Model`` has the part that serves images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import SAM2_VARIANTS, HieraConfig, Sam2Config
from .errors import CheckpointError, listing
from .layouts import TRANSFORMERS_POSITIONAL, Layout

_POINTS = "prompt_encoder.point_embed."
_POINT_KINDS = 4
_POSITIONAL = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_WHOLE = {
    "maskmem_tpos_enc": "memory_temporal_positional_encoding",
    "no_mem_embed": "no_memory_embedding",
    "no_mem_pos_enc": "no_memory_positional_encoding",
    "no_obj_ptr": "no_object_pointer",
    "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
}
# (official, transformers), tried in this order on the start of a name.
_STARTS = (
    ("image_encoder.trunk.patch_embed.proj.", "vision_encoder.backbone.patch_embed.projection."),
    ("image_encoder.trunk.", "vision_encoder.backbone."),
    ("image_encoder.neck.", "vision_encoder.neck."),
    ("sam_prompt_encoder.point_embeddings.", _POINTS),
    ("sam_prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("sam_prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("sam_prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("sam_prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("sam_prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("sam_mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("sam_mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("memory_encoder.mask_downsampler.encoder.12.", "memory_encoder.mask_downsampler.final_conv."),
    ("memory_encoder.out_proj.", "memory_encoder.projection."),
    ("memory_encoder.pix_feat_proj.", "memory_encoder.feature_projection."),
    ("memory_encoder.fuser.", "memory_encoder.memory_fuser."),
    ("obj_ptr_proj.", "object_pointer_proj."),
    ("obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer."),
)
_PLACES = ("proj_in", "layers.0", "proj_out")  # names of the linears of an MLP of three


def _downsampler(match: re.Match[str]) -> str:
    index, step = divmod(int(match[1]), 3)
    return f"mask_downsampler.layers.{index}.{'conv' if step == 0 else 'layer_norm'}."


# Then all of these, anywhere in a name.
_PARTS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"neck\.convs\.(\d+)\.conv\."), r"neck.convs.\1."),
    (re.compile(r"mask_downsampler\.encoder\.(\d+)\."), _downsampler),
    (re.compile(r"\.mlp\.layers\.([01])\."), lambda match: f".mlp.proj_{('in', 'out')[int(match[1])]}."),
    (
        re.compile(r"(hypernetworks_mlps\.\d|iou_prediction_head|obj_score_head|pointer_proj)\.layers\.([012])\."),
        lambda match: f"{match[1]}.{_PLACES[int(match[2])]}.",
    ),
    (re.compile(r"\.dwconv\."), ".depthwise_conv."),
    (re.compile(r"\.pwconv(\d)\."), r".pointwise_conv\1."),
    (re.compile(r"\.gamma$"), ".scale"),
    (re.compile(r"\.norm(\d?|_final_attn)\."), r".layer_norm\1."),
    (re.compile(r"\.out_proj\."), ".o_proj."),
)


def transformers_names(official: str, config: Sam2Config) -> tuple[str, ...]:
    """Return the names that a transformers state dict has for the official ``official``, but for :func:`joined`."""
    if official == _POSITIONAL:
        return TRANSFORMERS_POSITIONAL
    if official in _WHOLE:
        return (_WHOLE[official],)
    name = official
    for ours, theirs in _STARTS:
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    for pattern, replacement in _PARTS:
        name = pattern.sub(replacement, name)
    return (name,)


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the embeddings of the kinds of point into one tensor, as transformers has them."""
    names = [f"{_POINTS}{kind}.weight" for kind in range(_POINT_KINDS)]
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    return {**rest, f"{_POINTS}weight": torch.cat([state[name] for name in names])}


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`joined`."""
    table = state.get(f"{_POINTS}weight")
    if table is None or table.ndim != 2:
        return dict(state)
    rest = {name: tensor for name, tensor in state.items() if name != f"{_POINTS}weight"}
    return {**rest, **{f"{_POINTS}{kind}.weight": row for kind, row in enumerate(table.split(1))}}


def transformers_config(config: Sam2Config) -> dict[str, Any]:
    """Return the ``config.json`` of the same model for transformers."""
    trunk, grid, channels = config.image_encoder, config.grid_size, config.image_encoder.channel_list[::-1]
    heads = [int(trunk.num_heads * trunk.head_mul**stage) for stage in range(len(channels))]
    return {
        "architectures": ["Sam2VideoModel" if config.has_memory else "Sam2Model"],
        "model_type": "sam2_video" if config.has_memory else "sam2",
        "image_size": config.image_size,
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": trunk.embed_dim,
                "num_attention_heads": trunk.num_heads,
                "image_size": [config.image_size] * 2,
                "window_positional_embedding_background_size": list(trunk.window_pos_embed_bkg_spatial_size),
                "num_query_pool_stages": trunk.q_pool,
                "blocks_per_stage": list(trunk.stages),
                "embed_dim_per_stage": channels,
                "num_attention_heads_per_stage": heads,
                "window_size_per_stage": list(trunk.window_spec),
                "global_attention_blocks": list(trunk.global_att_blocks),
            },
            "backbone_channel_list": trunk.channel_list,
            "backbone_feature_sizes": [[factor * grid] * 2 for factor in (4, 2, 1)],
            "fpn_hidden_size": trunk.d_model,
            "fpn_top_down_levels": list(trunk.fpn_top_down_levels),
        },
        "prompt_encoder_config": {"hidden_size": trunk.d_model, "image_size": config.image_size},
        "mask_decoder_config": {"hidden_size": trunk.d_model, **config.decoder_options()},
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_attention_hidden_size": trunk.d_model,
        "memory_encoder_hidden_size": trunk.d_model,
        "mask_downsampler_embed_dim": trunk.d_model,
        "memory_fuser_embed_dim": trunk.d_model,
        "memory_fuser_intermediate_dim": 4 * trunk.d_model,
        "enable_occlusion_spatial_embedding": config.no_obj_embed_spatial,
        "enable_temporal_pos_encoding_for_object_pointers": config.proj_tpos_enc_in_obj_ptrs,
        **{theirs: getattr(config, ours) for ours, theirs in _OPTIONS.items()},
    }


# The fields of a config by the names that transformers has for them.
_OPTIONS = {
    "num_maskmem": "num_maskmem",
    "mem_dim": "memory_encoder_output_channels",
    "memory_attention_layers": "memory_attention_num_layers",
    "memory_attention_dim_feedforward": "memory_attention_feed_forward_hidden_size",
    "fuser_layers": "memory_fuser_num_layers",
    "sigmoid_scale_for_mem_enc": "sigmoid_scale_for_mem_enc",
    "sigmoid_bias_for_mem_enc": "sigmoid_bias_for_mem_enc",
    "multimask_output_in_sam": "multimask_output_in_sam",
    "multimask_min_pt_num": "multimask_min_pt_num",
    "multimask_max_pt_num": "multimask_max_pt_num",
    "multimask_output_for_tracking": "multimask_output_for_tracking",
    "max_obj_ptrs_in_encoder": "max_object_pointers_in_encoder",
    "max_cond_frames_in_attn": "max_cond_frame_num",
}


def config_from_transformers(text: bytes) -> Sam2Config | None:
    """Return the configuration that a transformers ``config.json`` describes; None if it is not a SAM 2's.

    Values the file leaves out are transformers' defaults, which are those of 2.1 tiny.

    Raises:
        ValueError: not JSON, or parts or values that no ``Sam2Config`` has.
        RecursionError: JSON that is nested too deep.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("model_type") not in ("sam2", "sam2_video"):
        return None
    vision = _part(values, "vision_config")
    backbone, decoder = _part(vision, "backbone_config"), _part(values, "mask_decoder_config")
    base = SAM2_VARIANTS["sam2.1_tiny"]
    trunk = base.image_encoder
    image_size = values.get("image_size", backbone.get("image_size", base.image_size))
    if isinstance(image_size, list):
        image_size = image_size[0] if len({*map(str, image_size)}) == 1 else str(image_size)
    tracked = values.get("enable_temporal_pos_encoding_for_object_pointers", True)
    options: dict[str, Any] = dict.fromkeys(
        ("add_tpos_enc_to_obj_ptrs", "proj_tpos_enc_in_obj_ptrs", "use_signed_tpos_enc_to_obj_ptrs"), tracked
    )
    options |= {ours: values[theirs] for ours, theirs in _OPTIONS.items() if theirs in values}
    options |= {name: decoder[name] for name in base.decoder_options() if name in decoder}
    config = Sam2Config(
        variant="custom",
        image_encoder=HieraConfig(
            embed_dim=backbone.get("hidden_size", trunk.embed_dim),
            num_heads=backbone.get("num_attention_heads", trunk.num_heads),
            stages=backbone.get("blocks_per_stage", trunk.stages),
            global_att_blocks=backbone.get("global_attention_blocks", trunk.global_att_blocks),
            window_pos_embed_bkg_spatial_size=backbone.get(
                "window_positional_embedding_background_size", trunk.window_pos_embed_bkg_spatial_size
            ),
            window_spec=backbone.get("window_size_per_stage", trunk.window_spec),
            q_pool=backbone.get("num_query_pool_stages", trunk.q_pool),
            d_model=vision.get("fpn_hidden_size", trunk.d_model),
            fpn_top_down_levels=vision.get("fpn_top_down_levels", trunk.fpn_top_down_levels),
        ),
        image_size=image_size,
        has_memory=values["model_type"] == "sam2_video",
        no_obj_embed_spatial=values.get("enable_occlusion_spatial_embedding", True),
        **options,
    )
    return named(config)


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"{name} must be an object, got {type(part).__name__}")
    return part


def named(config: Sam2Config) -> Sam2Config:
    """Return ``config`` under the name of the table's variant that it equals, but for what no weight depends on.

    That is the image size, whether there is a memory, and what the builders' post-processing switches on.
    """
    for known in SAM2_VARIANTS.values():
        aside = {name: getattr(known, name) for name in ("variant", *_ASIDE)}
        if replace(config, **aside) == known:
            return replace(config, variant=known.variant)
    return config


_ASIDE = (
    *("image_size", "has_memory", "binarize_mask_from_pts_for_mem_enc", "dynamic_multimask_via_stability"),
    *("dynamic_multimask_stability_delta", "dynamic_multimask_stability_thresh"),
)


def infer_config(state: Mapping[str, Tensor], layout: Layout) -> Sam2Config:
    """Infer the variant that fits the names and shapes of a state dict; its image size is in none of them: 1024 px.

    Without a memory, as those of transformers' ``Sam2Model``, weights of both releases are the same: 2.1.

    Raises:
        CheckpointError: no variant does.
    """
    root, patch, last = {
        "official": ("image_encoder.trunk", "patch_embed.proj.weight", "no_obj_embed_spatial"),
        "transformers": ("vision_encoder.backbone", "patch_embed.projection.weight", _WHOLE["no_obj_embed_spatial"]),
    }[layout]
    patches = state.get(f"{root}.{patch}")
    if patches is None:
        raise CheckpointError(f"missing keys: {listing([f'{root}.{patch}'])}")
    index = re.compile(rf"{re.escape(root)}\.blocks\.(\d+)\.")
    depth = len({match[1] for name in state if (match := index.match(name))})
    tracks = any(name.startswith("memory_encoder.") for name in state)
    release = "sam2_" if tracks and last not in state else "sam2.1_"
    for config in SAM2_VARIANTS.values():
        trunk = config.image_encoder
        sizes = (trunk.embed_dim, sum(trunk.stages))
        if config.variant.startswith(release) and sizes == (patches.shape[0], depth):
            return replace(config, has_memory=tracks)
    known = ", ".join(
        f"{c.variant} {c.image_encoder.embed_dim} x {sum(c.image_encoder.stages)}"
        for c in SAM2_VARIANTS.values()
        if c.variant.startswith("sam2.1_")
    )
    raise CheckpointError(
        f"the image encoder has {patches.shape[0]} channels and {depth} blocks; the known variants are {known}"
    )
