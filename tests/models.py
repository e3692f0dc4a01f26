"""Models and images that tests make."""

from __future__ import annotations

from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from benchmarks.official_sam2 import draw_weights
from sam import Sam, SamConfig
from sam.config import HieraConfig, Sam2Config
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base

Tracker = TypeVar("Tracker", bound=SAM2Base)

# Small, and with every irregularity: windows that do not divide the grid, a global block, two sizes of head.
TINY = SamConfig(
    "custom",
    encoder_embed_dim=64,
    encoder_depth=3,
    encoder_num_heads=2,
    global_attn_indexes=(1,),
    image_size=128,
    window_size=3,
    prompt_embed_dim=64,
    decoder_mlp_dim=96,
    iou_head_hidden_dim=48,
)


# SAM 2, small, with windows that do not divide the grid, a global block and blocks that pool.
TINY_2 = Sam2Config("custom", HieraConfig(16, 1, (1, 2, 4, 2), (5,), d_model=64), image_size=128)
# The smallest that tests run, of one layer where there may be several.
SMALL_2 = Sam2Config(
    "custom",
    HieraConfig(16, 1, (1, 2, 3, 1), (4,), d_model=64),
    image_size=64,
    memory_attention_layers=1,
    fuser_layers=1,
)


class Int8Weight(torch.Tensor):
    """Weights whose numbers lie behind a class, as libraries of quantisation have them: int8, a scale a row."""

    levels: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Int8Weight:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.levels = (weight / self.scale).round().to(torch.int8)

    def plain(self) -> torch.Tensor:
        return self.levels * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantise_weights(model: torch.nn.Module) -> None:
    """Give every linear layer of ``model`` an :class:`Int8Weight`."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(Int8Weight(layer.weight.detach()), requires_grad=False)


def quantized(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with torch's dynamically quantised linear layers."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


class Unheard:
    """A class that no reader of weights has heard of."""


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, those that start at zero or one too: a fresh model hides missing terms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            scale = 0.3 if "pos" in name else 1.5 * fan_in**-0.5
            parameter.copy_(1 + 0.2 * noise if is_norm else scale * noise)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@overload
def random_model(config: SamConfig, seed: int = 0) -> Sam: ...
@overload
def random_model(config: Sam2Config, seed: int = 0) -> SAM2Base: ...
def random_model(config: SamConfig | Sam2Config, seed: int = 0) -> Sam | SAM2Base:
    torch.manual_seed(seed)
    model = build_from_config(config)
    randomise(model, seed)
    return model.requires_grad_(False)


def draw_weights_that_see(model: Tracker) -> Tracker:
    """Draw every weight of a model of SAM 2 that tracks, and raise its object score: objects are there."""
    draw_weights(model)
    model.get_parameter("sam_mask_decoder.pred_obj_score_head.layers.2.bias").add_(3)
    return model
