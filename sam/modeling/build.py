"""Builders of models from a configuration, with or without weights."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checks import require
from ..config import HieraConfig, Sam2Config, SamConfig
from .feature_pyramid import FpnNeck, ImageEncoder
from .hiera import Hiera
from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .memory_attention import MemoryAttention, MemoryAttentionLayer, RoPEAttention
from .memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from .position_encoding import PositionEmbeddingSine
from .prompt_encoder import PromptEncoder
from .sam import Sam
from .sam2_base import SAM2Base
from .transformer import TwoWayTransformer


@overload
def build_from_config(config: SamConfig) -> Sam: ...
@overload
def build_from_config(config: Sam2Config) -> SAM2Base: ...
def build_from_config(config: SamConfig | Sam2Config) -> Sam | SAM2Base:
    """Build a model in eval mode with freshly initialised weights."""
    if isinstance(config, Sam2Config):
        model = SAM2Base(**sam2_arguments(config)).eval()
        return model if config.has_memory else _of_images_alone(model)
    require("config", config, SamConfig, "a SamConfig or a Sam2Config")
    return _build_sam(config).eval()


def _of_images_alone(model: SAM2Base) -> SAM2Base:
    """Delete the parts of a model that only tracking uses."""
    for name in (
        *("memory_attention", "memory_encoder", "mask_downsample", "maskmem_tpos_enc", "no_mem_pos_enc"),
        *("no_obj_ptr", "no_obj_embed_spatial", "obj_ptr_proj", "obj_ptr_tpos_proj"),
    ):
        if hasattr(model, name):
            delattr(model, name)
    return model


def _build_sam(config: SamConfig) -> Sam:
    grid = (config.grid_size, config.grid_size)
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.encoder_embed_dim,
            depth=config.encoder_depth,
            num_heads=config.encoder_num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.prompt_embed_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.prompt_embed_dim,
            image_embedding_size=grid,
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=config.prompt_embed_dim,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.prompt_embed_dim,
                num_heads=config.decoder_num_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
            num_multimask_outputs=config.num_multimask_outputs,
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_hidden_dim,
        ),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        config=config,
    )


def build_hiera_encoder(config: HieraConfig) -> ImageEncoder:
    """Build SAM 2's image encoder with freshly initialised weights."""
    trunk = Hiera(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        q_pool=config.q_pool,
        stages=config.stages,
        dim_mul=config.dim_mul,
        head_mul=config.head_mul,
        window_pos_embed_bkg_spatial_size=config.window_pos_embed_bkg_spatial_size,
        window_spec=config.window_spec,
        global_att_blocks=config.global_att_blocks,
    )
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(config.d_model),
        d_model=config.d_model,
        backbone_channel_list=config.channel_list,
        fpn_interp_model="nearest",
        fpn_top_down_levels=config.fpn_top_down_levels,
    )
    return ImageEncoder(trunk, neck, scalp=config.scalp)


def sam2_arguments(config: Sam2Config) -> dict[str, Any]:
    """Return the arguments of :class:`~sam.modeling.sam2_base.SAM2Base`, modules included, for it or a subclass."""
    return {
        "image_encoder": build_hiera_encoder(config.image_encoder),
        "memory_attention": _build_memory_attention(config),
        "memory_encoder": _build_memory_encoder(config),
        **config.base_options(),
        "sam_mask_decoder_extra_args": config.decoder_options(),
        "pixel_mean": config.pixel_mean,
        "pixel_std": config.pixel_std,
        "config": config,
    }


def _build_memory_attention(config: Sam2Config) -> MemoryAttention:
    width, side = config.image_encoder.d_model, config.grid_size
    attention = partial(RoPEAttention, embedding_dim=width, num_heads=1, dropout=0.1, feat_sizes=(side, side))
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=attention(rope_k_repeat=True, kv_in_dim=config.mem_dim),
        d_model=width,
        dim_feedforward=config.memory_attention_dim_feedforward,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=attention(),
    )
    return MemoryAttention(width, pos_enc_at_input=True, layer=layer, num_layers=config.memory_attention_layers)


def _build_memory_encoder(config: Sam2Config) -> MemoryEncoder:
    width = config.image_encoder.d_model
    return MemoryEncoder(
        out_dim=config.mem_dim,
        mask_downsampler=MaskDownSampler(embed_dim=width, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(width), num_layers=config.fuser_layers),
        position_encoding=PositionEmbeddingSine(config.mem_dim),
        in_dim=width,
    )


class _SkipInit(TorchFunctionMode):
    """Skips random initialisation, which on the meta device would only import half of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@overload
def build_empty(config: SamConfig) -> Sam: ...
@overload
def build_empty(config: Sam2Config) -> SAM2Base: ...
def build_empty(config: SamConfig | Sam2Config) -> Sam | SAM2Base:
    """Build a model of shapes only, on the meta device."""
    with torch.device("meta"), _SkipInit():
        return build_from_config(config)
