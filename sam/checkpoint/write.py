"""Writing weights, in the official layout or that of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..config import SamConfig
from ..files import write_atomically
from ..modeling import Sam
from .layouts import LAYOUTS, Layout, transformers_config, transformers_names
from .read import CONFIG_KEY

_TORCH_SUFFIXES = (".pth", ".pt")


def save_checkpoint(
    model: Sam,
    path: str | os.PathLike[str],
    layout: Layout = "official",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's weights; see :func:`write_checkpoint`.

    Raises:
        ValueError: as there; or a model built by hand, without a config.
    """
    if model.config is None:
        raise ValueError("the model has no config; build it with sam.build_from_config or load it from a file")
    write_checkpoint(model.state_dict(), model.config, path, layout, dtype, metadata)


def write_checkpoint(
    state_dict: Mapping[str, Tensor],
    config: SamConfig,
    path: str | os.PathLike[str],
    layout: Layout = "official",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights under official names; what stood at ``path`` is replaced whole or not at all.

    Args:
        state_dict, config: the weights and what they are of.
        path: a ``.safetensors`` file; a ``.pth`` or ``.pt`` file that ``torch.load`` reads; or, for the
            transformers layout, a folder that ``SamModel.from_pretrained`` reads.
        layout: "official" or "transformers".
        dtype: of the tensors in the file; None keeps theirs.
        metadata: further entries for safetensors.

    Raises:
        ValueError: an unknown layout or suffix, or a folder for the official layout.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    state = _renamed(state_dict, config, layout, dtype)
    entries = {"format": "pt", CONFIG_KEY: config.to_json(), **(metadata or {})}
    if path.suffix in _TORCH_SUFFIXES:
        with write_atomically(path) as partial:
            torch.save(state, partial)
    elif path.suffix == ".safetensors":
        with write_atomically(path) as partial:
            safetensors.torch.save_file(state, partial, entries)
    elif layout == "transformers" and (path.is_dir() or not path.suffix):
        path.mkdir(parents=True, exist_ok=True)
        with write_atomically(path / "model.safetensors") as partial:
            safetensors.torch.save_file(state, partial, entries)
        with write_atomically(path / "config.json") as partial:
            partial.write_text(json.dumps(transformers_config(config), indent=2) + "\n")
    else:
        folder = ", or none for a folder" if layout == "transformers" else ""
        raise ValueError(f"cannot write to {path}: the suffix must be .safetensors, .pth or .pt{folder}")


def _renamed(
    state: Mapping[str, Tensor], config: SamConfig, layout: Layout, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    out = {}
    for official, tensor in state.items():
        values = tensor.detach().cpu().to(dtype or tensor.dtype)
        for name in (official,) if layout == "official" else transformers_names(official, config):
            out[name] = values.clone(memory_format=torch.contiguous_format)
    return out
