"""Writing weights, in the official layout or that of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..checks import path_of, require
from ..modeling.promptable import PromptableModel
from ..system.atomic_write import write_atomically
from .errors import CheckpointError
from .families import Config, family_of
from .layouts import LAYOUTS, Layout
from .names import find_weights, is_weight_dtype
from .quantized import SCHEME_KEY, split_codes
from .read import CONFIG_KEY, OWN_ENTRIES, official_state

_TORCH_SUFFIXES = (".pth", ".pt")


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    layout: Layout = "official",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model's weights; see :func:`write_checkpoint`.

    The model, or parts of it, may be compiled or wrapped: the names of the weights are those of the plain model.

    Raises:
        TypeError: no :class:`sam.Sam`, nor a module around one.
        ValueError: as there; or a model built by hand, without a config.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inner = next((module for module in modules if isinstance(module, PromptableModel)), None)
    if inner is None:
        hint = "; sam.checkpoint.write_checkpoint takes a state dict" if isinstance(model, Mapping) else ""
        raise TypeError(f"the model must be a sam.Sam, or a module around one, got {type(model).__name__}{hint}")
    if inner.config is None:
        raise ValueError("the model has no config; build it with sam.build_from_config or load it from a file")
    write_checkpoint(inner.state_dict(), inner.config, path, layout, dtype, metadata, inner.quantization)


def write_checkpoint(
    state_dict: Mapping[str, Tensor],
    config: Config,
    path: str | os.PathLike[str],
    layout: Layout = "official",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    quantization: str | None = None,
) -> None:
    """Write weights that :func:`read_checkpoint` reads; what stood at ``path`` is replaced whole or not at all.

    Args:
        state_dict, config: the weights, in any layout and wrapping that a file may have, and what they are of.
        path: a ``.safetensors`` file; a ``.pth`` or ``.pt`` file that ``torch.load`` reads; or, for the
            transformers layout, a folder that ``SamModel.from_pretrained`` reads.
        layout: "official" or "transformers".
        dtype: dtype of the tensors in the file; None keeps theirs.
        metadata: further entries for safetensors.
        quantization: the scheme of quantised weights, which only safetensors in the official layout hold; their codes
            and scales keep their dtypes.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown layout or suffix, or a folder for the official layout; keys that are not those of a
            plain model or hold no plain floating-point tensors, which are listed; a model that the kind of file has
            no place to describe.
    """
    require("state_dict", state_dict, Mapping, "a mapping of names to tensors")
    path = path_of("path", path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    folder = layout == "transformers" and (path.is_dir() or not path.suffix)
    if not folder and path.suffix not in (*_TORCH_SUFFIXES, ".safetensors"):
        hint = ", or none for a folder" if layout == "transformers" else ""
        raise ValueError(f"cannot write to {path}: the suffix must be .safetensors, .pth or .pt{hint}")
    _check_options(dtype, metadata)
    if quantization is not None and (layout != "official" or path.suffix != ".safetensors"):
        raise ValueError(
            f"cannot write {path}: weights quantised to {quantization} are written as .safetensors in the official "
            "layout, which no other reads; convert the plain weights"
        )
    plain, codes = (state_dict, {}) if quantization is None else split_codes(state_dict)
    try:
        state, form = find_weights(plain)
        official = official_state({**state, **codes}, form, config, quantization)
    except CheckpointError as error:
        raise ValueError(f"cannot write {path}: {error}") from None
    kept = official.keys() & codes.keys()
    state = _renamed({name: x for name, x in official.items() if name not in kept}, config, layout, dtype)
    state |= {name: _copied(official[name]) for name in kept}  # in their dtypes, by the official names
    if path.suffix in _TORCH_SUFFIXES and not folder and not _is_inferred(state, layout, config):
        raise ValueError(
            f"cannot write {path}: a {path.suffix} file has no place for the configuration of this {config.variant} "
            "model, which differs from the known variants; use .safetensors"
        )
    entries = {"format": "pt", CONFIG_KEY: config.to_json(), **(metadata or {})}
    if quantization is not None:
        entries[SCHEME_KEY] = quantization
    if folder:
        _write_folder(path, state, entries, config)
        return
    with write_atomically(path) as partial:
        if path.suffix in _TORCH_SUFFIXES:
            torch.save(state if layout != "official" else family_of(config).wrapped(state), partial)
        else:
            safetensors.torch.save_file(state, partial, entries)


def _write_folder(path: Path, state: dict[str, Tensor], entries: dict[str, str], config: Config) -> None:
    path.mkdir(parents=True, exist_ok=True)
    # Both files are whole before one of them takes the place of what stood there.
    with write_atomically(path / "config.json") as text, write_atomically(path / "model.safetensors") as partial:
        safetensors.torch.save_file(state, partial, entries)
        text.write_text(json.dumps(family_of(config).transformers_config(config), indent=2) + "\n")


def _check_options(dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype like torch.float16, got {dtype!r}")
    if dtype is not None and not is_weight_dtype(dtype):
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    if metadata is not None:
        require("metadata", metadata, Mapping, "a mapping of strings to strings")
    for name, value in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {name!r}: {value!r}")
        if name in OWN_ENTRIES:
            raise ValueError(f"metadata must not name {name!r}, which says what the weights are of")


def _is_inferred(state: Mapping[str, Tensor], layout: Layout, config: Config) -> bool:
    """Return whether a reader of ``state`` alone learns ``config``."""
    try:
        return family_of(config).infer_config(state, layout) == config
    except CheckpointError:
        return False


def _renamed(
    state: Mapping[str, Tensor], config: Config, layout: Layout, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    values = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in state.items()}
    return {name: _copied(tensor) for name, tensor in family_of(config).stored(values, config, layout).items()}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
