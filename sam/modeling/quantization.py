"""Quantisation of a model after training: the linear layers of its image encoder in 8 bits, smoothed before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastsam_kernels import SCHEMES, why_not_quantized

from ..checks import require
from ..system.tensors import is_plain
from .common import uncompiled
from .promptable import PromptableModel
from .quantized_linear import Place, QuantizedLinear, blocks_of, places_of

# Of a normalised channel the largest value is taken to be so many standard deviations, where no image says it.
_DEVIATIONS = 4.0
_KEPT_EXPONENT = 1  # of the scale of a channel that does not stand out
_MAX_EXPONENT = 10  # of a scale that is moved: weights in fp16 stay in its range

Maxima = Mapping[str, Tensor]


class QuantizedPlace(NamedTuple):
    """The place of a linear layer, with its name in the model and its block."""

    name: str
    block: Any
    place: Place


def quantize(
    model: PromptableModel, scheme: str, calibration: Sequence[np.ndarray] | None = None, *, smooth: bool = True
) -> PromptableModel:
    """Return a copy of ``model`` whose image encoder multiplies in 8 bits.

    The four linear layers of each block are quantised, activations as they come with a scale per token, weights with a
    scale per output channel. Before, scales are moved from channels of activations into weights, in powers of two,
    which changes no result in fp32: a channel of outliers would take all others' precision. Patch embedding,
    positions, neck, prompt encoder and mask decoder stay as they are.

    Args:
        model: a model of plain weights, without hooks or adapters in its image encoder; it stays as it is.
        scheme: "int8", or "fp8" (e4m3), coarser and for GPUs of compute capability 8.9 or newer.
        calibration: images [H, W, 3] uint8 RGB, of which the largest activations are taken; None estimates them from
            the weights.
        smooth: move scales.

    Raises:
        TypeError: no model, or images of another kind.
        ValueError: an unknown scheme, a device that lacks it, a model that is quantised already, or an image encoder
            with something else in the place of a linear layer, which is named.
    """
    require("model", model, PromptableModel, "a sam.Sam or a sam.SAM2Base")
    check_scheme(scheme, model.device, model.kernels)
    require_plain(model)
    copied = copy.deepcopy(model)
    quantize_in_place(copied, scheme, calibration, smooth=smooth)
    return copied


def check_scheme(scheme: str, device: torch.device, kernels: str) -> None:
    """Raise ``ValueError`` unless ``scheme`` is one, and the device has it."""
    reason = why_not_quantized(scheme, device, kernels)
    if reason is not None:
        raise ValueError(reason)


def quantize_in_place(
    model: PromptableModel, scheme: str, calibration: Sequence[np.ndarray] | None = None, *, smooth: bool = True
) -> None:
    """Quantise a plain model as :func:`quantize` does its copy."""
    with torch.no_grad():
        if smooth:
            maxima = estimated_maxima(model) if calibration is None else measured_maxima(model, calibration)
            move_scales(model, maxima)
        place_quantized_linears(model, scheme)
    model.requires_grad_(False)
    model.eval()


def place_quantized_linears(model: PromptableModel, scheme: str) -> None:
    """Put a :class:`QuantizedLinear` in the place of each of the linear layers, on the meta device of shapes alone."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    for _, _, place in quantized_places(model):
        place.put(QuantizedLinear.of(place.layer, scheme))
    model.kernels = model.kernels  # the new layers compute as the model does


def dequantized(model: PromptableModel) -> PromptableModel:
    """Return a copy with plain linear layers of the weights that the codes stand for; activations are not quantised."""
    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear):
                setattr(module, name, child.dequantized())
    return copied


def quantized_places(model: PromptableModel) -> Iterator[QuantizedPlace]:
    """Yield the places of the linear layers that are quantised."""
    for block_name, block in blocks_of(uncompiled(model.image_encoder)):
        for place in places_of(block):
            yield QuantizedPlace(f"image_encoder.{block_name}.{place.name}", block, place)


def require_plain(model: PromptableModel) -> None:
    """Raise ``ValueError`` unless every linear layer to be quantised is torch's, of plain weights and without hooks."""
    if model.quantization is not None:
        raise ValueError(f"the model is quantised to {model.quantization} already: quantise the plain one")
    blocks = [block for _, block in blocks_of(uncompiled(model.image_encoder))]
    if not blocks or not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in blocks):
        kind = type(model.image_encoder).__name__
        raise ValueError(f"image_encoder is a {kind}, which has no blocks of ours to quantise")
    for name, module in model.image_encoder.named_modules(prefix="image_encoder"):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{name} has a forward hook, which a quantised copy would run on other numbers: remove it")
    for name, block, place in quantized_places(model):
        layer = place.layer
        if type(layer) is not nn.Linear:
            hint = "merge adapters into the weights first"
            raise ValueError(f"{name} is a {type(layer).__name__}, not a torch.nn.Linear: {hint}")
        if not is_plain(layer.weight) or not layer.weight.is_floating_point():
            raise ValueError(f"{name} has weights of {type(layer.weight).__name__}, which are quantised already")
        if type(block.norm1) is not nn.LayerNorm or type(block.norm2) is not nn.LayerNorm:
            raise ValueError(f"{name} stands after a norm of another class than torch.nn.LayerNorm")


# Scales -------------------------------------------------------------------------------------------------------


def measured_maxima(model: PromptableModel, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return the largest magnitude of each input channel of each linear layer over ``images``, by the layer's name."""
    require("calibration", images, Sequence, "a list of images [H, W, 3]")
    if len(images) == 0:
        raise ValueError("calibration needs at least one image, got none")
    maxima: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        largest = x.detach().abs().flatten(0, -2).amax(0).float()
        maxima[name] = largest if name not in maxima else torch.maximum(maxima[name], largest)

    hooks = [
        place.layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, _, place in quantized_places(model)
    ]
    try:
        for image in images:
            model.encode(image)
    finally:
        for hook in hooks:
            hook.remove()
    return maxima


def estimated_maxima(model: PromptableModel) -> dict[str, Tensor]:
    """Return about the same from the weights alone, for the layers after a norm and after an attention."""
    maxima = {}
    for name, block in blocks_of(uncompiled(model.image_encoder)):
        prefix, places = f"image_encoder.{name}.", places_of(block)
        for norm, place in ((block.norm1, places[0]), (block.norm2, places[2])):
            maxima[prefix + place.name] = _DEVIATIONS * norm.weight.float().abs() + norm.bias.float().abs()
        _, _, values = places[0].layer.weight.float().chunk(3)
        mean = values @ block.norm1.bias.float()
        if places[0].layer.bias is not None:
            mean = mean + places[0].layer.bias.float().chunk(3)[2]
        deviation = (values * block.norm1.weight.float()).norm(dim=1)
        maxima[prefix + places[1].name] = mean.abs() + _DEVIATIONS * deviation
    return maxima


def power_of_two(activations: Tensor, weight: Tensor) -> Tensor:
    """Return the scales of input channels that bring those that stand out nearer to the others.

    SmoothQuant (arXiv 2211.10438, alpha 0.5) takes the root of max |x| / max |w|. Here it counts from the median
    channel, as rows have scales of their own, and is the nearest power of two; where that is 1/2, 1 or 2 the channel
    stays, and so does one of zeros.
    """
    weights = weight.float().abs().amax(0)
    exponent = 0.5 * torch.log2(activations.to(weights.device) / weights)
    finite = torch.isfinite(exponent)
    if not finite.any():
        return torch.ones_like(weights, dtype=weight.dtype)
    exponent = (exponent - exponent[finite].median()).round()
    exponent = torch.where(finite & (exponent.abs() > _KEPT_EXPONENT), exponent, 0.0)
    return torch.exp2(exponent.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)).to(weight.dtype)


def move_scales(
    model: PromptableModel, maxima: Maxima, scale_of: Callable[[Tensor, Tensor], Tensor] = power_of_two
) -> None:
    """Divide channels of activations by powers of two, and multiply the weights that read them, in place.

    The norm before qkv and before the MLP takes the division, and for the projection of the attention the rows of qkv
    that make its values: attention mixes tokens and never channels, and a padded key's value is the bias, which is
    divided too. In fp32 every result keeps every bit. GELU lets no scale through, and queries and keys are not
    quantised. ``scale_of`` maps the largest activations of channels and a weight to the powers.
    """
    for name, block in blocks_of(uncompiled(model.image_encoder)):
        qkv, proj, first, _ = (place.layer for place in places_of(block))
        prefix, names = f"image_encoder.{name}.", [place.name for place in places_of(block)]
        readers = [qkv, block.proj] if isinstance(getattr(block, "proj", None), nn.Linear) else [qkv]
        for norm, layers, place_name in ((block.norm1, readers, names[0]), (block.norm2, [first], names[2])):
            scale = scale_of(maxima[prefix + place_name], layers[0].weight)
            norm.weight.div_(scale)
            norm.bias.div_(scale)
            for layer in layers:
                layer.weight.mul_(scale)
        scale = scale_of(maxima[prefix + names[1]], proj.weight)
        qkv.weight.chunk(3)[2].div_(scale[:, None])
        if qkv.bias is not None:
            qkv.bias.chunk(3)[2].div_(scale)
        proj.weight.mul_(scale)
