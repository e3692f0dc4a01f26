"""The model of a command, made from its options."""

from __future__ import annotations

import argparse

import torch

from ..build_sam import load_model
from ..modeling.promptable import PromptableModel
from ..system.hardware import usable_device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_from(args: argparse.Namespace) -> PromptableModel:
    """Load the model that the options describe."""
    return load_model(
        args.checkpoint,
        args.variant,
        _device(args.device),
        DTYPES[args.dtype],
        args.kernels,
        image_size=args.image_size,
        quantize=getattr(args, "quantize", None),
    )


def _device(name: str | None) -> torch.device:
    device = usable_device(name)
    if device.type == "meta":
        raise ValueError(f"device {name!r} asked for, whose tensors have no values")
    return device
