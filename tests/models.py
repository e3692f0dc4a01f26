"""Models and images that tests make."""

from __future__ import annotations

import numpy as np
import torch

import sam
from sam import Sam, SamConfig

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


def random_model(config: SamConfig, seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    model = sam.build_from_config(config)
    randomise(model, seed)
    return model.requires_grad_(False)
