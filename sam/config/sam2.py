"""The one description of a SAM 2 model's shape, and the table of its variants."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import lcm
from typing import Any

from ..checks import require
from .base import ModelConfig
from .checks import (
    COUNTS,
    SIZES,
    builtin,
    builtin_tuple,
    check_whole,
    from_mapping,
    is_whole,
)

_POSITIVE = range(1, SIZES.stop)


@dataclass(frozen=True)
class HieraConfig:
    """The image encoder: the trunk Hiera (arXiv 2306.00989) and its neck. The fields have the official names.

    Args:
        embed_dim, num_heads: channels and heads of the first stage.
        stages: blocks per stage.
        global_att_blocks: the blocks that attend to the whole image and not inside windows.
        window_pos_embed_bkg_spatial_size: (height, width) of the position table that is stretched over the image.
        window_spec: side of a stage's windows, in tokens; the first also is that of the tiled position table.
        q_pool: how many stages begin by pooling.
        dim_mul, head_mul: factors by which channels and heads grow from stage to stage.
        d_model: channels of the neck.
        fpn_top_down_levels: the levels that get the upsampled next one added.
        scalp: the coarsest levels that the encoder drops.

    Raises:
        ValueError: a number of another type, out of bounds, or at odds with another.
    """

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]
    global_att_blocks: tuple[int, ...]
    window_pos_embed_bkg_spatial_size: tuple[int, ...] = (7, 7)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)
    q_pool: int = 3
    dim_mul: float = 2.0
    head_mul: float = 2.0
    d_model: int = 256
    fpn_top_down_levels: tuple[int, ...] = (2, 3)
    scalp: int = 1

    def __post_init__(self) -> None:
        stages = builtin_tuple("stages", self.stages)
        for blocks in stages:
            check_whole("stages", blocks, COUNTS)
        levels = range(len(stages))
        allowed = {
            "stages": COUNTS,
            "global_att_blocks": range(sum(stages)),
            "window_pos_embed_bkg_spatial_size": COUNTS,
            "window_spec": COUNTS,
            "fpn_top_down_levels": levels,
        }
        for name, numbers in allowed.items():
            values = builtin_tuple(name, getattr(self, name))
            outside = [value for value in values if not is_whole(value, numbers)]
            if outside:
                raise ValueError(f"{name} {outside} lie outside {numbers.start}..{numbers.stop - 1}")
            object.__setattr__(self, name, values)
        if not 1 <= len(self.stages) == len(self.window_spec):
            raise ValueError(f"window_spec {self.window_spec} must have one window per stage of {self.stages}")
        if len(self.window_pos_embed_bkg_spatial_size) != 2:
            raise ValueError(
                "window_pos_embed_bkg_spatial_size must be a height and a width, "
                f"got {self.window_pos_embed_bkg_spatial_size}"
            )
        whole = {"embed_dim": SIZES, "num_heads": SIZES, "d_model": SIZES, "q_pool": levels, "scalp": levels}
        for name, numbers in whole.items():
            object.__setattr__(self, name, builtin(getattr(self, name)))
            check_whole(name, getattr(self, name), numbers)
        for name in ("dim_mul", "head_mul"):
            value = builtin(getattr(self, name))
            if type(value) not in (int, float) or not 1 <= value <= 16:
                raise ValueError(f"{name} must be a number from 1 to 16, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}")

    @property
    def channel_list(self) -> list[int]:
        """Return the channels of the stages, the coarsest first, as the neck takes them."""
        channels = [self.embed_dim]
        for _ in self.stages[1:]:
            channels.append(int(channels[-1] * self.dim_mul))
        return channels[::-1]

    @property
    def stride(self) -> int:
        """Return the number of pixels that the sides of an image must be a multiple of."""
        return 4 * lcm(2**self.q_pool, self.window_spec[0])


@dataclass(frozen=True)
class Sam2Config(ModelConfig):
    """Everything that fixes the parameter shapes and the arithmetic of a SAM 2 model.

    From ``num_maskmem`` to ``no_obj_embed_spatial`` the fields are the arguments of the official ``SAM2Base``, at the
    values of the released 2.1 models; ``dynamic_multimask_*`` are the mask decoder's, as officially built.

    Args:
        variant: a name.
        image_encoder: the config of the trunk and the neck.
        image_size: side in pixels of the square input.
        backbone_stride: pixels per token of the image embedding.
        mem_dim: channels of a memory.
        memory_attention_layers, memory_attention_dim_feedforward: layers of the memory attention and their MLPs' width.
        fuser_layers: ConvNeXt blocks of the memory encoder.
        has_memory: False for a model of images alone, without the parts that only tracking uses.

    Raises:
        ValueError: a number of another type, out of bounds, or at odds with another.
    """

    variant: str
    image_encoder: HieraConfig
    image_size: int = 1024
    backbone_stride: int = 16
    mem_dim: int = 64
    memory_attention_layers: int = 4
    memory_attention_dim_feedforward: int = 2048
    fuser_layers: int = 2
    has_memory: bool = True
    num_maskmem: int = 7
    sigmoid_scale_for_mem_enc: float = 20.0
    sigmoid_bias_for_mem_enc: float = -10.0
    binarize_mask_from_pts_for_mem_enc: bool = False
    use_mask_input_as_output_without_sam: bool = True
    max_cond_frames_in_attn: int = -1
    directly_add_no_mem_embed: bool = True
    use_high_res_features_in_sam: bool = True
    multimask_output_in_sam: bool = True
    multimask_min_pt_num: int = 0
    multimask_max_pt_num: int = 1
    multimask_output_for_tracking: bool = True
    use_multimask_token_for_obj_ptr: bool = True
    iou_prediction_use_sigmoid: bool = True
    memory_temporal_stride_for_eval: int = 1
    non_overlap_masks_for_mem_enc: bool = False
    use_obj_ptrs_in_encoder: bool = True
    max_obj_ptrs_in_encoder: int = 16
    add_tpos_enc_to_obj_ptrs: bool = True
    proj_tpos_enc_in_obj_ptrs: bool = True
    use_signed_tpos_enc_to_obj_ptrs: bool = True
    only_obj_ptrs_in_the_past_for_eval: bool = True
    pred_obj_scores: bool = True
    pred_obj_scores_mlp: bool = True
    fixed_no_obj_ptr: bool = True
    soft_no_obj_ptr: bool = False
    use_mlp_for_obj_ptr_proj: bool = True
    no_obj_embed_spatial: bool = True
    dynamic_multimask_via_stability: bool = True
    dynamic_multimask_stability_delta: float = 0.05
    dynamic_multimask_stability_thresh: float = 0.98
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        self._settle_shared_fields()
        if isinstance(self.image_encoder, dict):  # out of JSON
            object.__setattr__(self, "image_encoder", from_mapping(HieraConfig, self.image_encoder))
        require("image_encoder", self.image_encoder, HieraConfig, "a HieraConfig")
        for name, kind in _KINDS.items():
            value = builtin(getattr(self, name))
            if kind == "bool" and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
            if kind == "float":
                if type(value) not in (int, float) or not abs(value) <= SIZES.stop:
                    raise ValueError(f"{name} must be a number up to {SIZES.stop - 1}, got {value!r}")
                value = float(value)
            if kind == "int":
                check_whole(name, value, _WHOLE_NUMBERS.get(name, _POSITIVE))
            object.__setattr__(self, name, value)
        if self.image_size % self.image_encoder.stride:
            raise ValueError(
                f"image_size must be a positive multiple of {self.image_encoder.stride}, got {self.image_size}"
            )

    @property
    def grid_size(self) -> int:
        """Return the side of the image embedding, in tokens."""
        return self.image_size // self.backbone_stride

    @property
    def version(self) -> str:
        """Return the release whose weights fit: "2.1" with an embedding of absent objects in the memory, else "2"."""
        return "2.1" if self.no_obj_embed_spatial else "2"

    def base_options(self) -> dict[str, Any]:
        """Return the arguments of the official ``SAM2Base`` that are neither modules nor of the mask decoder alone."""
        return {name: getattr(self, name) for name in _BASE_OPTIONS}

    def decoder_options(self) -> dict[str, Any]:
        """Return the official ``sam_mask_decoder_extra_args``."""
        return {name: getattr(self, name) for name in _KINDS if name.startswith("dynamic_multimask_")}


# The fields that are single numbers and switches, by their type as it is written.
_KINDS = {f.name: f.type for f in fields(Sam2Config) if f.type in ("int", "float", "bool")}
_NAMES = list(_KINDS)
_BASE_OPTIONS = (
    *("image_size", "backbone_stride"),
    *_NAMES[_NAMES.index("num_maskmem") : _NAMES.index("no_obj_embed_spatial") + 1],
)
_WHOLE_NUMBERS = {
    "memory_attention_layers": COUNTS,
    "fuser_layers": COUNTS,
    "num_maskmem": range(COUNTS.stop),  # 0: no memory
    "max_cond_frames_in_attn": range(-1, SIZES.stop),  # -1: no limit
    "multimask_min_pt_num": range(SIZES.stop),
    "multimask_max_pt_num": range(SIZES.stop),
}

_ENCODERS = {
    "tiny": HieraConfig(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": HieraConfig(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base_plus": HieraConfig(112, 2, (2, 3, 16, 3), (12, 16, 20), (14, 14)),
    "large": HieraConfig(144, 2, (2, 6, 36, 4), (23, 33, 43), window_spec=(8, 4, 16, 8)),
}
# By which the first release differs.
_FIRST_RELEASE = dict.fromkeys(
    (
        *("no_obj_embed_spatial", "add_tpos_enc_to_obj_ptrs"),
        *("proj_tpos_enc_in_obj_ptrs", "use_signed_tpos_enc_to_obj_ptrs"),
    ),
    False,
)
_RELEASES: dict[str, dict[str, Any]] = {"sam2": _FIRST_RELEASE, "sam2.1": {}}
SAM2_VARIANTS: dict[str, Sam2Config] = {
    f"{release}_{size}": Sam2Config(f"{release}_{size}", encoder, **options)
    for release, options in _RELEASES.items()
    for size, encoder in _ENCODERS.items()
}
