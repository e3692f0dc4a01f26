"""``info [CHECKPOINT]``: what weights are, and what would run them here; ``info --env``: the machine alone."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ..build_sam import NANO_CHECKPOINT, load_model
from ..checkpoint import read_checkpoint
from ..config import Sam2Config, SamConfig
from ..modeling.build import build_empty
from .environment import describe_environment, version


def run(args: argparse.Namespace) -> None:
    if args.env and args.checkpoint:
        raise ValueError("--env is of this machine: it takes no CHECKPOINT")
    facts = describe_environment() if args.env else describe(Path(args.checkpoint or NANO_CHECKPOINT))
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def describe(path: Path) -> dict[str, Any]:
    """Return the facts, in the order a reader wants them."""
    stored = read_checkpoint(path)
    config = stored.config
    # fp8 loads where nothing else runs it, too.
    model = load_model(path, kernels="auto" if stored.quantization != "fp8" else "reference")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in stored.state_dict.values()})
    return {
        "checkpoint": "embedded" if path == NANO_CHECKPOINT else str(path),
        "variant": config.variant,
        "layout": stored.layout,
        "quantization": stored.quantization or "none",
        "parameters": sum(p.numel() for p in build_empty(config).parameters()),
        "dtype in file": ", ".join(dtypes),
        "image size": config.image_size,
        "encoder": _encoder(config),
        "low-res masks": f"{config.low_res_size}x{config.low_res_size}",
        "model hash (fp32)": model.model_hash,
        **stored.metadata,
        "device": str(model.device),
        "kernels": model.resolved_kernels,
        "versions": f"fastsam-kernels {version('fastsam-kernels')}, torch {torch.__version__}, "
        f"triton {version('triton')}, Python {platform.python_version()}",
    }


def _encoder(config: SamConfig | Sam2Config) -> str:
    """Return the sizes of an image encoder in words."""
    if isinstance(config, SamConfig):
        return (
            f"{config.encoder_embed_dim} channels, {config.encoder_depth} blocks, {config.encoder_num_heads} heads, "
            f"window {config.window_size}, global {', '.join(map(str, config.global_attn_indexes))}"
        )
    trunk = config.image_encoder
    channels, blocks, windows = (
        " ".join(map(str, numbers)) for numbers in (trunk.channel_list[::-1], trunk.stages, trunk.window_spec)
    )
    return (
        f"Hiera of {channels} channels, {blocks} blocks, windows {windows}, "
        f"global {', '.join(map(str, trunk.global_att_blocks))}"
    )
