"""Reading weights: any file of the known layouts -> official names, nothing missing, nothing left over."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import path_of
from ..config import SamConfig, variant_config
from .errors import CheckpointError, listing
from .families import Config, Form, expected_shapes, family_of
from .layouts import Layout
from .names import find_weights, rename
from .quantized import SCHEME_KEY, check_codes, scheme_of, split_codes

CONFIG_KEY = "sam_config"
OWN_ENTRIES = ("format", CONFIG_KEY, SCHEME_KEY)
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Weights under their official names, as stored.

    Attributes:
        state_dict: every parameter and buffer of the model, dtypes as in the file.
        config: what the weights are of.
        layout: the layout of the file.
        metadata: what else a safetensors file says of itself.
        quantization: the scheme of quantised weights, "int8" or "fp8"; None for plain ones.
    """

    state_dict: dict[str, Tensor]
    config: Config
    layout: Layout
    metadata: dict[str, str]
    quantization: str | None = None


def read_checkpoint(
    path: str | os.PathLike[str],
    variant: str | None = None,
    image_size: int | None = None,
    config: Config | None = None,
) -> Checkpoint:
    """Read the weights of SAM or SAM 2: a safetensors file, a torch file, or a folder that transformers wrote.

    Args:
        path: the file or folder. Torch files are read with ``weights_only=True`` and nothing else.
        variant: what the caller takes it for; None infers it from the shapes.
        image_size: resize the position tables for this input, in pixels; None keeps the file's.
        config: what the weights are, where they are of no known variant; None infers it.

    Raises:
        TypeError: no path.
        FileNotFoundError: no such file.
        ValueError: an empty name, or a URL.
        CheckpointError: unreadable, foreign, or keys that do not match, which are listed.
    """
    path = path_of("checkpoint", path)
    stored = _read(path)
    try:
        scheme = scheme_of(stored.entries, stored.metadata)
        plain: Any = stored.entries
        codes: dict[str, Tensor] = {}
        if scheme is not None:
            plain, codes = split_codes(stored.entries)
            if config is None and CONFIG_KEY not in stored.metadata:
                raise CheckpointError(f"its weights are quantised, but no entry {CONFIG_KEY} says of which model")
        state, form = find_weights(plain)
        config = config or _config_of(state, form, stored)
        if variant is not None and config.variant != variant:
            expected = variant_config(variant)
            stored_as, expected_as = (family_of(c).describe(c) for c in (config, expected))
            raise CheckpointError(f"these are weights of {stored_as}, not of {expected_as}")
        state = official_state({**state, **codes}, form, config, scheme)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    if image_size is not None and image_size != config.image_size:
        config = config.with_image_size(image_size)
        if isinstance(config, SamConfig):  # SAM 2 stretches its tables over any image
            state = resize_position_tables(state, config)
    provenance = {name: text for name, text in stored.metadata.items() if name not in OWN_ENTRIES}
    return Checkpoint(state, config, form.layout, provenance, scheme)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Form]:
    """Read the plain weights of a file or folder under the names of their layout, and say of what form they are.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, foreign or quantised.
    """
    stored = _read(path)
    try:
        scheme = scheme_of(stored.entries, stored.metadata)
        if scheme is not None:
            raise CheckpointError(f"its weights are quantised to {scheme}, which only sam.load_model reads")
        return find_weights(stored.entries)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def resize_position_tables(state: Mapping[str, Tensor], config: SamConfig) -> dict[str, Tensor]:
    """Resize the weights' position tables for another image size; resized tables are fp32.

    The absolute table is resized bicubically (as ViTDet does), the relative tables of global blocks linearly,
    which is what the encoder does with a table of another length.
    """
    resized = dict(state)
    grid, name = config.grid_size, "image_encoder.pos_embed"
    table = state[name].float().permute(0, 3, 1, 2)
    table = F.interpolate(table, (grid, grid), mode="bicubic", align_corners=False)
    resized[name] = table.permute(0, 2, 3, 1).contiguous()
    for block in config.global_attn_indexes:
        for axis in "hw":
            name = f"image_encoder.blocks.{block}.attn.rel_pos_{axis}"
            line = F.interpolate(state[name].float().t()[None], 2 * grid - 1, mode="linear")[0].t()
            resized[name] = line.contiguous()
    return resized


# Files ----------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """The contents of a file or folder: entries, metadata, and the ``config.json`` beside it."""

    entries: Any
    metadata: dict[str, str]
    config_json: bytes | None = None


def _read(path: Path) -> _Stored:
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        return _Stored(*_read_folder(path)) if path.is_dir() else _Stored(*_read_file(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _read_file(path: Path) -> tuple[Any, dict[str, str]]:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":  # a safetensors header: its length in 8 bytes, then JSON
        return _read_safetensors(path)
    if head[:2] == b"PK" and (archive := _foreign_archive(path)) is not None:
        raise CheckpointError(f"it is {archive}, not a file written by torch.save or safetensors")
    if head[:2] == b"PK" or head[:1] == b"\x80":  # torch.save since 1.6, and before
        return _read_torch(path), {}
    raise CheckpointError("neither a safetensors file nor one written by torch.save")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # A copy: tensors that map the file would change, or crash, when someone overwrites it.
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"damaged safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(str(error))) from error
    except Exception as error:  # whatever a damaged archive makes of the reader
        if "TorchScript" in str(error):
            raise CheckpointError(
                "it is a TorchScript archive, which holds a program (nothing in it was run); save its weights: "
                "torch.save(torch.jit.load(path).state_dict(), ...)"
            ) from error
        raise CheckpointError(f"damaged torch file: {_plain_line(str(error)) or type(error).__name__}") from error


def _foreign_archive(path: Path) -> str | None:
    """Name a whole zip archive that holds other things than a pickle of torch's; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    if any(PurePosixPath(name).name == "data.pkl" for name in names):
        return None
    return "a NumPy archive" if names and all(name.endswith(".npy") for name in names) else "a zip archive"


def _refusal(says: str) -> str:
    """Name what kept torch's reader of weights from reading a pickle."""
    match = re.search(r"GLOBAL (\S+)", says)
    if match is not None:
        return (
            f"it holds more than tensors: {match[1]}, and other objects are never loaded (nothing in it was run); "
            "if you trust the file, load it with torch.load(path, weights_only=False), which runs what it says, and "
            'save only its state dict, like ["model"]'
        )
    code = re.search(r"Unsupported operand (\d+)", says)
    known = {ord(instruction.code): instruction for instruction in pickletools.opcodes}
    instruction = known.get(int(code[1])) if code is not None else None
    if instruction is not None:
        return (
            f"it uses {instruction.name} of pickle protocol {instruction.proto}, which torch's reader of tensors alone "
            "does not know (nothing in it was run); if you trust the file, load it with torch.load(path, "
            "weights_only=False), which runs what it says, and save its weights with torch.save's own protocol, 2"
        )
    reason = _plain_line(says.partition("WeightsUnpickler error:")[2]) or _plain_line(says)
    return f"it cannot be read as tensors alone, and other objects are never loaded (nothing in it was run): {reason}"


def _plain_line(says: str) -> str:
    """Return the first line of one of torch's messages, without terminal escape codes and its place in torch."""
    line = next(iter(re.sub(r"\x1b\[[0-9;]*m", "", says).strip().splitlines()), "")
    return re.sub(r"^\[enforce fail at [^\]]*\][. ]*", "", line)


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes | None]:
    config = path / _CONFIG
    config_json = config.read_bytes() if config.is_file() else None
    if (path / _SINGLE).is_file():
        return (*_read_safetensors(path / _SINGLE), config_json)
    if (path / _INDEX).is_file():
        shards = _shards_of(path / _INDEX)
        outside = [shard for shard in shards if Path(shard).name != shard or not (path / shard).is_file()]
        if outside:
            raise CheckpointError(f"{_INDEX} names files that are not in the folder: {listing(outside)}")
        state: dict[str, Tensor] = {}
        for shard in shards:
            state.update(_read_safetensors(path / shard)[0])
        return state, {}, config_json
    raise CheckpointError(f"the folder has neither {_SINGLE} nor {_INDEX}")


def _shards_of(index: Path) -> list[str]:
    """Return the files that an index of shards names."""
    try:
        values = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"damaged {index.name}: {error}") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"damaged {index.name}: it has no weight_map from the names of weights to those of files")
    return sorted(set(weight_map.values()))


# Models ---------------------------------------------------------------------------------------------------


def _config_of(state: Mapping[str, Tensor], form: Form, stored: _Stored) -> Config:
    family, metadata = form.family, stored.metadata
    try:
        if CONFIG_KEY in metadata:
            return family.config.from_json(metadata[CONFIG_KEY])
        if stored.config_json is not None:
            described = family.config_from_transformers(stored.config_json)
            if described is not None:
                return described
    except (ValueError, RecursionError) as error:
        source = CONFIG_KEY if CONFIG_KEY in metadata else _CONFIG
        raise CheckpointError(f"damaged model configuration in {source}: {error}") from error
    return family.infer_config(state, form.layout)


def official_state(
    state: Mapping[str, Tensor], form: Form, config: Config, scheme: str | None = None
) -> dict[str, Tensor]:
    """Return the weights of a layout under official names; quantised ones by a ``scheme`` have these alone.

    Raises:
        CheckpointError: weights of the other family; or keys missing, unexpected or of a wrong shape, which are listed;
            or weights that are no codes of the scheme.
    """
    family, expected = form.family, expected_shapes(config, scheme)
    if family is not family_of(config):
        raise CheckpointError(
            f"these are weights of a {family.name} model, not of {family_of(config).describe(config)}"
        )
    official: dict[str, str] = {}
    renamed = state
    if form.layout == "transformers":
        if scheme is not None:
            raise CheckpointError(f"weights quantised to {scheme} must have official names, not those of transformers")
        official = {theirs: ours for ours in expected for theirs in family.transformers_names(ours, config)}
        renamed = family.split(state)
    renamed = rename(renamed, official)
    problems = _problems(renamed, expected)
    if problems:
        other = family.other_release(state, form.layout, config)
        raise CheckpointError(other or f"the weights do not fit {family.describe(config)}: {'; '.join(problems)}")
    if scheme is not None:
        check_codes(renamed, config, scheme)
    return renamed


def _problems(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """Describe the keys and shapes in which weights differ from what is expected."""
    wrong = [
        f"{name} {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    return [
        f"{what}: {listing(names)}"
        for what, names in (
            ("missing keys", [name for name in expected if name not in state]),
            ("unexpected keys", [name for name in state if name not in expected]),
            ("keys of a wrong shape", wrong),
        )
        if names
    ]
