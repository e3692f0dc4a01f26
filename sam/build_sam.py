"""Loading models: from a checkpoint, or by the official names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial  # noqa: F401 - star imports give it
from pathlib import Path

import torch

from fastsam_kernels import Kernels, check_kernels

from .checkpoint import Checkpoint, CheckpointError, read_checkpoint
from .checkpoint.quantized import check_quantization, widened
from .config import VARIANTS, SamConfig, variant_config
from .modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer  # noqa: F401
from .modeling.build import build_empty, build_from_config
from .modeling.promptable import PromptableModel
from .modeling.quantization import place_quantized_linears, quantize_in_place
from .system.hardware import usable_device

NANO_CHECKPOINT = Path(__file__).parent / "assets" / "nano.safetensors"


def load_model(
    checkpoint: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: Kernels = "auto",
    *,
    image_size: int | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    quantize: str | None = None,
) -> PromptableModel:
    """Return a model ready for prediction: a :class:`sam.Sam` or a :class:`sam.SAM2Base`, as the weights are.

    Args:
        checkpoint: a file or folder in any known layout, of SAM or SAM 2; None takes the embedded model ``nano``.
        variant: what the weights must be, like "vit_b" or "sam2.1_tiny"; None infers it from them.
        device: None takes the CUDA device if there is one, else the CPU.
        dtype: dtype of the image encoder and the mask decoder; None is fp32. Prompts are encoded in fp32 always.
        kernels: "auto", "reference", "torch" or "triton", or a mapping from operations to one of them like
            ``{"rel_pos_attention": "torch"}``, "auto" for the rest; resolved for the model's device at every call.
        image_size: side of the square input in pixels; None takes the checkpoint's, or 1024 px for weights of SAM 2
            that do not say it.
        compile: run the encoder through ``torch.compile``, and the decoder too or, on a CUDA device, as CUDA graphs;
            a shape at its first use or all of them by ``model.runtime.warmup()``; see :mod:`sam.inference`.
        cuda_graphs: the decoder, and the encoder of one image, as CUDA graphs without compiling anything.
        quantize: "int8" or "fp8" multiplies in 8 bits in the image encoder's blocks, as :func:`sam.quantize`; None
            leaves the weights as they are in the file, which may be quantised already.

    Raises:
        TypeError: an argument of another type.
        FileNotFoundError: no such file.
        CheckpointError: unreadable, foreign, or weights that do not fit, the keys listed.
        ValueError: an unknown variant, scheme or ``kernels``; a variant without a checkpoint, other than ``nano``; a
            device that torch cannot use here, or that lacks the scheme; ``cuda_graphs`` on another device than a CUDA
            one; or ``quantize`` by another scheme than a quantised file's.
    """
    if variant is not None:
        variant_config(variant)
    if checkpoint is None:
        if variant not in (None, "nano"):
            raise ValueError(f"only nano is embedded; {variant} needs checkpoint=, a file of its weights")
        checkpoint = NANO_CHECKPOINT
    device = usable_device(device)
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a CUDA device, got {device}")
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype like torch.bfloat16, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    stored = read_checkpoint(checkpoint, variant, image_size)
    check_quantization(stored.quantization, quantize, device, check_kernels(kernels))

    model = _filled(stored)
    model.kernels = kernels
    if quantize is not None and stored.quantization is None:
        quantize_in_place(model, quantize)
    model = model.to(device=device, dtype=dtype).eval()
    if compile or cuda_graphs:
        from .inference import Runtime

        model.runtime = Runtime(model, compile_encoder=compile)
    return model


def _filled(stored: Checkpoint) -> PromptableModel:
    """Build a model in fp32 of the weights of a file, codes as they are."""
    model = build_empty(stored.config)
    if stored.quantization is not None:
        place_quantized_linears(model, stored.quantization)
    model.load_state_dict(widened(stored.state_dict), strict=True, assign=True)
    for name in ("pixel_mean", "pixel_std"):
        values = torch.tensor(getattr(stored.config, name), dtype=torch.float32, device="cpu")
        setattr(model, name, values.view(-1, 1, 1))
    return model


def _sam(checkpoint: str | os.PathLike[str] | None, variant: str) -> Sam:
    """Load a variant of SAM on the CPU."""
    model = load_model(checkpoint, variant, device="cpu")
    assert isinstance(model, Sam)
    return model


def _build(variant: str, checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    if checkpoint is None:
        return build_from_config(VARIANTS[variant])
    return _sam(checkpoint, variant)


def _build_sam(
    encoder_embed_dim: int,
    encoder_depth: int,
    encoder_num_heads: int,
    encoder_global_attn_indexes: Sequence[int],
    checkpoint: str | os.PathLike[str] | None = None,
) -> Sam:
    """Build a model of 1024 px with an image encoder of these sizes, as fine-tunes of the official package do.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, foreign, or weights of other sizes, the keys listed.
        ValueError: sizes that do not fit together.
    """
    indexes = tuple(encoder_global_attn_indexes)
    config = SamConfig("custom", encoder_embed_dim, encoder_depth, encoder_num_heads, indexes)
    model = build_from_config(config)
    if checkpoint is not None:
        stored = read_checkpoint(checkpoint, config=config)
        if stored.quantization is not None:
            raise CheckpointError(f"{checkpoint} is quantised to {stored.quantization}: sam.load_model reads it")
        model.load_state_dict(stored.state_dict)
    return model


def build_sam_vit_h(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-H on the CPU in fp32, from a checkpoint or freshly initialised."""
    return _build("vit_h", checkpoint)


def build_sam_vit_l(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-L on the CPU in fp32, from a checkpoint or freshly initialised."""
    return _build("vit_l", checkpoint)


def build_sam_vit_b(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build ViT-B on the CPU in fp32, from a checkpoint or freshly initialised."""
    return _build("vit_b", checkpoint)


def build_sam_nano(checkpoint: str | os.PathLike[str] | None = None) -> Sam:
    """Build the small model on the CPU in fp32; without a checkpoint it has the weights embedded in this package."""
    return _sam(checkpoint, "nano")


build_sam = build_sam_vit_h

sam_model_registry: dict[str, Callable[..., Sam]] = {
    "default": build_sam_vit_h,
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "nano": build_sam_nano,
}
