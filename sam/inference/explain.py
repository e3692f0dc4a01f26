"""Explain what runs when a model is used, and why something does not run fused, in sentences."""

from __future__ import annotations

import torch

from fastsam_kernels import SCHEMES, has_kernel, int8_form, resolve_kernels, why_not_quantized

from ..modeling.common import uncompiled
from ..modeling.feature_pyramid import ImageEncoder
from .decode import fused_parts, why_not_fused_decoder
from .eligibility import why_not_fused
from .parts import Model

# The operations of an image and its prompts, and whether they are matrix products, which follow the model's dtype.
OPERATIONS = {
    "preprocess_image": False,
    "quantize_rows": False,
    "int8_linear": False,
    "fp8_linear": False,
    "rel_pos_attention": True,
    "window_attention": True,
    "memory_attention": True,
    "token_to_image_attention": True,
    "two_way_attention": True,
    "hypernetwork_masks": True,
    "mask_postprocess": False,
    "nms": False,
    "connected_components": False,
}


def explain(model: Model) -> str:
    """Return one line per part and operation of ``model``: what runs, and what keeps it from running fused."""
    dtype = str(model.dtype).removeprefix("torch.")
    is_hiera = isinstance(uncompiled(model.image_encoder), ImageEncoder)
    # Those of the other kind of image encoder, and of tracking where the model has no memory.
    others = {"rel_pos_attention"} if is_hiera else {"window_attention"}
    memory = {name: getattr(model, name) for name in ("memory_attention", "memory_encoder") if hasattr(model, name)}
    if not memory:
        others.add("memory_attention")
    if model.quantization is None:
        others.add("quantize_rows")
    others |= {f"{scheme}_linear" for scheme in SCHEMES if scheme != model.quantization}
    return "\n".join(
        [
            f"The model is {dtype} on {model.device}, kernels={model.kernels!r}.",
            _part("The image encoder", why_not_fused(image_encoder=model.image_encoder), model.kernels),
            *_quantization(model),
            _part("The mask decoder", why_not_fused_decoder(model), model.kernels),
            *_decoder(model),
            _runtime(model),
            *(f"{name}: {_implementation(model, name)}." for name in OPERATIONS if name not in others),
            *(
                _part(f"The {name.replace('_', ' ')}", why_not_fused(**{name: part}), model.kernels)
                for name, part in memory.items()
            ),
        ]
    )


def _part(name: str, reason: str | None, kernels: str) -> str:
    if reason is not None:
        return f"{name} calls its modules as officially: {reason}."
    if kernels == "reference":
        return f"{name} computes the paper's formulas: kernels='reference' asks for them."
    return f"{name} runs fused."


def _quantization(model: Model) -> list[str]:
    """Say by what a quantised image encoder multiplies, or what keeps it from it."""
    scheme = model.quantization
    if scheme is None:
        return []
    reason = why_not_quantized(scheme, model.device, model.kernels)
    choice = "" if reason is not None else resolve_kernels(model.kernels, model.device)
    how = f"; int8 is multiplied by {int8_form(model.device)}" if (scheme, choice) == ("int8", "torch") else ""
    what = f"The linear layers of its blocks are {scheme}, a scale per token and output channel"
    return [f"{what}{how}." if reason is None else f"{what}, which cannot run: {reason}."]


@torch.no_grad()
def _decoder(model: Model) -> list[str]:
    parts = fused_parts(model)
    if parts is None or model.kernels == "reference":
        return []
    longest = model.token_buckets[-1]
    lines = [f"The image's projections are absorbed into the tokens of prompts of up to {longest} tokens."]
    if not parts.packed.can_absorb:
        lines = [
            "The image is projected for every prompt: a projection or norm of the transformer is of another class."
        ]
    if parts.packed.upscaling is None:
        lines.append("The masks are upscaled by mask_decoder.output_upscaling: it is not the official one with GELU.")
    return lines


def _runtime(model: Model) -> str:
    runtime = model.runtime
    if runtime is None:
        return "Nothing is compiled and no CUDA graph is replayed."
    form = "replayed as CUDA graphs" if runtime.replays else "compiled"
    reason = runtime.why_encoder_not_compiled
    blocks = f"the encoder's blocks are {'compiled' if reason is None else f'not compiled: {reason}'}"
    return f"Prompts of {len(runtime.buckets)} shapes are {form} so far; {blocks}."


def _implementation(model: Model, operation: str) -> str:
    try:
        found = resolve_kernels(model.kernels, model.device, model.dtype if OPERATIONS[operation] else None)
    except ValueError as error:
        return f"none, {error}"
    return found if has_kernel(operation) else found.replace("triton", "torch, as there is no kernel yet", 1)
