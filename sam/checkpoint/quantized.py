"""Quantised weights in files: safetensors of official names, with the scheme in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam_kernels import SCHEMES

from ..modeling.quantization import check_scheme
from .errors import CheckpointError, listing
from .families import Config, empty_state

SCHEME_KEY = "sam_quantization"
_SCALE = ".weight_scale"
_CODES = tuple(SCHEMES.values())


def scheme_of(state: Any, metadata: Mapping[str, str]) -> str | None:
    """Return the scheme of a file's weights; None where they are plain.

    Raises:
        CheckpointError: a scheme that this version does not know, or weights in 8 bits without any.
    """
    scheme = metadata.get(SCHEME_KEY)
    if scheme is not None and scheme not in SCHEMES:
        raise CheckpointError(f"its weights are quantised by the scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    if scheme is None and isinstance(state, Mapping) and any(str(name).endswith(_SCALE) for name in state):
        raise CheckpointError(f"its weights are quantised, but no entry {SCHEME_KEY} says by which scheme")
    return scheme


def split_codes(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors of a quantised file into plain ones, and codes with their scales."""
    scaled = {name.removesuffix(_SCALE) + ".weight" for name in entries if name.endswith(_SCALE)}
    of_codes = {name: x for name, x in entries.items() if name in scaled or name.endswith(_SCALE)}
    return {name: x for name, x in entries.items() if name not in of_codes}, of_codes


def check_codes(state: Mapping[str, Tensor], config: Config, scheme: str) -> None:
    """Raise ``CheckpointError`` unless codes and scales are of the scheme's dtypes, and scales positive numbers."""
    wrong = []
    for name, expected in empty_state(config, scheme).items():
        given = state[name]
        if (expected.dtype in _CODES or name.endswith(_SCALE)) and given.dtype != expected.dtype:
            wrong.append(f"{name} of {given.dtype} instead of {expected.dtype}")
        elif name.endswith(_SCALE) and not (torch.isfinite(given) & (given > 0)).all():
            wrong.append(f"{name} with scales that are no positive numbers")
        elif expected.dtype == torch.int8 and (given == -128).any():
            wrong.append(f"{name} with codes below -127")
    if wrong:
        raise CheckpointError(f"the weights are no {scheme} codes with their scales: {listing(wrong)}")


def check_quantization(stored: str | None, quantize: str | None, device: torch.device, kernels: str) -> None:
    """Raise ``ValueError`` unless weights ``stored`` by a scheme, or plain, can be quantised so and run on a device."""
    for scheme in (quantize, stored):
        if scheme is not None:
            check_scheme(scheme, device, kernels)
    if None not in (quantize, stored) and quantize != stored:
        raise ValueError(f"the weights are quantised to {stored}: they cannot be quantised to {quantize}")


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in fp32, codes as they are."""
    plain, codes = split_codes(state)
    return {**{name: tensor.float() for name, tensor in plain.items()}, **codes}
