"""Layers that the encoder and the decoder share."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLPBlock(nn.Module):
    """Linear, activation, linear: [..., embedding_dim] -> [..., embedding_dim]."""

    def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = act()

    @property
    def is_plain(self) -> bool:
        """Return whether each token passes by itself: plain linear layers and an elementwise activation."""
        linears = type(self.lin1) is type(self.lin2) is nn.Linear
        return linears and type(self.act) in (nn.GELU, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


class MLP(nn.Module):
    """``num_layers`` linears with ``activation``, or ReLU, between them: [..., input_dim] -> [..., output_dim]."""

    __constants__ = ("num_layers", "sigmoid_output")

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int,
        sigmoid_output: bool = False,
        activation: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.sigmoid_output = sigmoid_output
        if activation is not None:
            self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        act = getattr(self, "act", F.relu)
        for layer in self.layers[:-1]:
            x = act(layer(x))
        x = self.layers[-1](x)
        return x.sigmoid() if self.sigmoid_output else x


class DropPath(nn.Module):
    """Drop whole samples of a batch with probability ``drop_prob`` while training (arXiv 1603.09382)."""

    __constants__ = ("drop_prob", "scale_by_keep")

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(keep)
        return x * (mask / keep if keep > 0.0 and self.scale_by_keep else mask)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of [B, C, H, W], biased variance, in at least fp32."""

    __constants__ = ("eps",)

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        normed = centred * torch.rsqrt(variance + self.eps)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def uncompiled(module: nn.Module) -> Any:
    """Return what ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


# The segments that torch's own wrappers put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped_name(name: str) -> str:
    """Return the name that a weight had before torch compiled or wrapped the model or parts of it."""
    return _WRAPPERS.sub("", name)


def is_stock_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether ``module``, compiled or not, is exactly a ``kind`` without a ``forward`` of its own.

    Only such modules take ``kernels``; others are called as the official code calls them.
    """
    module = uncompiled(module)
    return type(module) is kind and "forward" not in module.__dict__


class Fp32Buffers(nn.Module):
    """A module whose own buffers never drop below fp32: ``.half()`` and ``.to(torch.bfloat16)`` only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)  # type: ignore[union-attr]
        return self
