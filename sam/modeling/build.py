"""Building models from a configuration, with or without weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..checks import require
from ..config import HieraConfig, SamConfig
from .feature_pyramid import FpnNeck, ImageEncoder
from .hiera import Hiera
from .image_encoder import ImageEncoderViT
from .mask_decoder import MaskDecoder
from .position_encoding import PositionEmbeddingSine
from .prompt_encoder import PromptEncoder
from .sam import Sam
from .transformer import TwoWayTransformer


def build_from_config(config: SamConfig) -> Sam:
    """Build a model in eval mode with freshly initialised weights."""
    require("config", config, SamConfig, "a sam.SamConfig")
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
    ).eval()


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


class _SkipInit(TorchFunctionMode):
    """Leaves new tensors as they are. Drawing on the meta device would import half of torch, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_empty(config: SamConfig) -> Sam:
    """A model of shapes only, on the meta device."""
    with torch.device("meta"), _SkipInit():
        return build_from_config(config)
