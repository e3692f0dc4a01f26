"""A linear layer in 8 bits, which stands in the place of a ``torch.nn.Linear`` of an image encoder's block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsam_kernels import (
    SCHEMES,
    LayerNormWeights,
    QuantizedRows,
    QuantizedWeight,
    UnsupportedKernelError,
    fp8_linear,
    int8_linear,
    pack_int8_weight,
    quantize_rows,
    quantize_weight,
    why_not_quantized,
)

from .common import MLPBlock
from .weight_cache import WeightCache

_LINEARS = {"int8": int8_linear, "fp8": fp8_linear}


class QuantizedLinear(WeightCache):
    """Quantise each row of [..., in_features] by its largest magnitude, multiply in 8 bits, add the bias.

    ``weight`` holds codes and keeps their dtype, ``weight_scale`` one fp32 number per output channel, whatever the
    model is converted to. The layer is for inference alone.

    Attributes:
        scheme: "int8" or "fp8".
    """

    __constants__ = ("scheme",)
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=SCHEMES[scheme]))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features))
        self.training = False

    @classmethod
    def of(cls, linear: nn.Linear, scheme: str) -> QuantizedLinear:
        """Return ``linear`` quantised; on the meta device its shapes alone."""
        with torch.device(linear.weight.device):
            quantized = cls(linear.in_features, linear.out_features, scheme)
        quantized.bias = quantized.bias.to(linear.weight.dtype)
        if not linear.weight.is_meta:
            quantized.weight, quantized.weight_scale, _ = quantize_weight(linear.weight, scheme)
            if linear.bias is not None:
                quantized.bias = linear.bias.detach().clone()
        return quantized

    def dequantized(self) -> nn.Linear:
        """Return a plain layer of the weights that the codes stand for, in the dtype of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.bias.dtype)
        linear.weight = nn.Parameter((self.weight.double() * self.weight_scale[:, None].double()).to(self.bias.dtype))
        linear.bias = nn.Parameter(self.bias.clone())
        return linear.requires_grad_(False).train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.quantize(x, self.kernels), linear_dtype(x), self.kernels)

    def quantize(self, x: Tensor, kernels: str, norm: Any = None) -> QuantizedRows:
        """Return the rows of [..., in_features] in 8 bits, after a layer norm if there is one."""
        return quantize_rows(x, self.scheme, norm=norm, kernels=kernels)

    def multiply(
        self, rows: QuantizedRows, dtype: torch.dtype, kernels: str, residual: Tensor | None = None, gelu: bool = False
    ) -> Tensor:
        """Apply the layer to quantised rows, with what follows it.

        Raises:
            UnsupportedKernelError: the device has no products of these codes; the message says what it needs.
        """
        reason = why_not_quantized(self.scheme, rows.codes.device, kernels)
        if reason is not None:
            raise UnsupportedKernelError(reason)
        weight = self.packed("weight", self._packed_weight, self.weight, self.weight_scale)
        linear = _LINEARS[self.scheme]
        return linear(rows, weight, self.bias, residual=residual, gelu=gelu, dtype=dtype, kernels=kernels)

    def _packed_weight(self) -> QuantizedWeight:
        weight = QuantizedWeight(self.weight, self.weight_scale)
        return pack_int8_weight(weight) if self.scheme == "int8" else weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"

    def check_trainable(self) -> None:
        raise ValueError(
            f"the model is quantised to {self.scheme}, whose codes take no gradient: train first, then sam.quantize"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {"weight": self.weight, "weight_scale": self.weight_scale}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:  # the model was converted to another dtype of floating point
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("weight", "weight_scale"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                raise ValueError(
                    f"{prefix}{name} is quantised to {self.scheme} and takes {own.dtype}, got {given.dtype}: "
                    "load weights into a plain model, then sam.quantize"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class Place(NamedTuple):
    """The place of a linear layer that is quantised: its name in the block, and the module that holds it."""

    name: str
    parent: nn.Module

    @property
    def layer(self) -> Any:
        """Return the module that is there now; None where the parent is of another kind and has none."""
        return getattr(self.parent, self.name.rpartition(".")[2], None)

    def put(self, layer: nn.Module) -> None:
        setattr(self.parent, self.name.rpartition(".")[2], layer)


def places_of(block: Any) -> tuple[Place, Place, Place, Place]:
    """Return the places of the four linear layers of a block of either image encoder."""
    qkv, proj = Place("attn.qkv", block.attn), Place("attn.proj", block.attn)
    if isinstance(block.mlp, MLPBlock):
        return qkv, proj, Place("mlp.lin1", block.mlp), Place("mlp.lin2", block.mlp)
    layers = getattr(block.mlp, "layers", block.mlp)
    return qkv, proj, Place("mlp.layers.0", layers), Place("mlp.layers.1", layers)


def blocks_of(encoder: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and the blocks of an image encoder; none for one that is no encoder of ours."""
    for name, holder in (("trunk.blocks", getattr(encoder, "trunk", None)), ("blocks", encoder)):
        if isinstance(getattr(holder, "blocks", None), nn.ModuleList):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(holder.blocks))  # type: ignore[union-attr]


def check_whole(encoder: Any) -> None:
    """Check that of each block all four linear layers are quantised, or none.

    Raises:
        ValueError: something else stands in the place of one, as an adapter does; the message names it.
    """
    for block_name, block in blocks_of(encoder):
        if not hasattr(block, "attn") or not hasattr(block, "mlp"):
            continue
        places = places_of(block)
        quantized = [place.layer for place in places if type(place.layer) is QuantizedLinear]
        if quantized and len(quantized) < len(places):
            other = next(place for place in places if type(place.layer) is not QuantizedLinear)
            raise ValueError(
                f"image_encoder.{block_name}.{other.name} is a {type(other.layer).__name__}, but the model is "
                f"quantised to {quantized[0].scheme}: merge adapters into the weights first, then sam.quantize"
            )


def norm_of(norm: Any) -> LayerNormWeights:
    """Return the weights of a layer norm as operations take them."""
    return LayerNormWeights(norm.weight, norm.bias, norm.eps)


def linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which ``torch.nn.functional.linear`` would answer: that of autocast where it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
