"""Finding a model's weights in what a training program saved: containers, wrappers and prefixes around the names.

Nothing here is a list of frameworks. A key ends in the name of a parameter, with the segments of wrapping modules and
containers around and between the model's own; every tensor of a state dict has to be one of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..system.tensors import is_counter, is_plain
from .errors import CheckpointError, listing
from .families import FAMILIES, SAM2, Family, Form, empty_state
from .layouts import LAYOUTS, Layout

_DEEPEST = 16  # mappings inside each other

# A key that gives a relative of SAM away, and its name.
_RELATIVES = (
    (
        re.compile(r"vision_backbone\.|(^|\.)detector_model\.|vision_encoder\.backbone\.(layers|embeddings)\."),
        "a SAM 3 model",
    ),
    (re.compile(r"spatial_perceiver|backbone\.timm_model"), "an EdgeTAM model (another image encoder than Hiera)"),
    (re.compile(r"mask_decoder\.hf_token|mask_decoder\.compress_vit_feat"), "a SAM-HQ model"),
    (re.compile(r"image_encoder\.patch_embed\.seq\."), "a MobileSAM model (TinyViT encoder)"),
    (re.compile(r"(^|\.)w_[ab]_\d+"), "a SAMed LoRA adapter, not a whole model"),
)
# A segment that makes a key part of a sum or product with the weight, and what its owner has to do first.
_ADDED = (
    (
        re.compile(
            r"lora_\w+|base_layer|modules_to_save|original_module|linear_[ab]_[qkv]|\w*adapter\w*"
            r"|(?:hada|lokr|boft|oft|ia3|vera)_\w+",
            re.IGNORECASE,
        ),
        "an adapter, which must be merged into the weights before they are saved (peft: merge_and_unload())",
    ),
    (
        re.compile(r"parametrizations|weight_(?:g|v|orig|mask|u)"),
        "a parametrisation, which must be removed before the weights are saved "
        "(torch.nn.utils.parametrize.remove_parametrizations)",
    ),
)


class _Place(NamedTuple):
    """A key's prefix, with its dot, and the name in the layout."""

    prefix: str
    name: str


class _Names(NamedTuple):
    """The names of a layout, with # for each number, and their parts."""

    templates: frozenset[str]
    segments: frozenset[str]
    roots: frozenset[str]

    def split(self, key: str) -> tuple[str, list[str]] | None:
        """Split a key into its prefix and its segments from one of the three parts on; None if it names none."""
        segments = key.split(".")
        start = next((at for at in reversed(range(len(segments))) if segments[at] in self.roots), None)
        if start is None:
            return None
        return "".join(f"{segment}." for segment in segments[:start]), segments[start:]

    def locate(self, key: str) -> _Place | None:
        """Find the parameter that a key names, whatever segments wrapping modules have added."""
        parts = self.split(key)
        if parts is None:
            return None
        prefix, (*modules, last) = parts
        known = [segment for segment in modules if segment in self.segments or segment.isdecimal()]
        name = ".".join([*known, last])
        return _Place(prefix, name) if _template(name) in self.templates else None


def _template(name: str) -> str:
    return ".".join("#" if segment.isdecimal() else segment for segment in name.split("."))


@cache
def _names_of(family: Family, layout: Layout) -> _Names:
    names = family.stored(empty_state(family.example), family.example, layout)
    templates = frozenset(map(_template, names))
    return _Names(
        templates,
        frozenset(segment for template in templates for segment in template.split(".")),
        frozenset(template.split(".")[0] for template in templates),
    )


def find_weights(stored: Any) -> tuple[dict[str, Tensor], Form]:
    """Find the one model in what a file holds; its tensors under the names of their layout, and of what form it is.

    What stands among the model's tensors, or beside its parts under the same prefix, keeps its key, so that whoever
    compares names calls it unexpected. Passed over are what has another prefix than the model, as metrics of a
    training program have, and counters that no part of the model holds: those of moving averages, of the whole or
    of a part.

    Raises:
        CheckpointError: no SAM, a relative, two models that differ, an adapter, or keys that hold no weights.
    """
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"no state dict but a {type(stored).__name__}")
    leaves = dict(_leaves(stored))
    tensors = {path: ".".join(path) for path, value in leaves.items() if isinstance(value, Tensor)}
    if not stored:
        raise CheckpointError("it is empty: there is not a single tensor in it")
    if not tensors:
        raise CheckpointError(f"no state dict: the keys are {listing(map(str, stored))}")
    form = _form_of(tensors.values())
    names = _names_of(*form)
    _refuse_added(tensors.values(), names)

    positions = {path: place for path, key in tensors.items() if (place := names.locate(key))}
    containers = {path[:-1] for path in positions}
    inside = [tensors[path] for path in positions]
    prefixes = tuple({place.prefix for place in positions.values()})

    def belongs(path: tuple[str, ...]) -> bool:
        key, value = ".".join(path), leaves[path]
        if isinstance(value, Tensor) and is_counter(value) and _is_outside(key, inside, names):
            return False
        parts = names.split(key)
        if parts is None:
            return path[:-1] in containers and key.startswith(prefixes)
        return path[:-1] in containers or parts[0] in prefixes

    others = {path: value for path, value in leaves.items() if path not in positions and belongs(path)}
    no_tensors = [".".join(path) for path, value in others.items() if not isinstance(value, Tensor)]
    if no_tensors:
        raise CheckpointError(f"keys that hold no tensor: {listing(no_tensors)}")
    flawed = [f"{tensors[path]} ({flaw})" for path in [*positions, *others] if (flaw := _flaw(leaves[path]))]
    if flawed:
        raise CheckpointError(f"keys that hold no dense floating-point values: {listing(flawed)}")
    entries = [(tensors[path], place, leaves[path]) for path, place in positions.items()]
    beside = [(tensors[path], _beside(tensors[path], names), value) for path, value in others.items()]
    return _one_model([*entries, *beside]), form


def _leaves(stored: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the leaves of nested mappings, each mapping once, with the keys on the way."""
    seen: set[int] = set()

    def walk(mapping: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        seen.add(id(mapping))
        for key, value in mapping.items():
            here = (*path, str(key))
            if not isinstance(value, Mapping):
                yield here, value
            elif id(value) not in seen and len(here) < _DEEPEST:
                yield from walk(value, here)

    return walk(stored, ())


def _form_of(keys: Iterable[str]) -> Form:
    keys = list(keys)
    for pattern, relative in _RELATIVES:
        example = next((key for key in keys if pattern.search(key)), None)
        if example is not None:
            raise CheckpointError(f"this is {relative} (key {example}); only SAM and SAM 2 models are supported")
    for family in FAMILIES:
        of_encoder = [(key, layout) for key in keys for layout in LAYOUTS if family.encoders[layout].search(key)]
        if of_encoder and family is SAM2 and not any("pos_embed_window" in key for key, _ in of_encoder):
            raise CheckpointError(
                f"this is a model like SAM 2 with another image encoder than Hiera, as EfficientTAM has "
                f"(key {of_encoder[0][0]}); only SAM and SAM 2 models are supported"
            )
        for key, layout in of_encoder:
            if _names_of(family, layout).locate(key):
                return Form(family, layout)
    raise CheckpointError(
        f"no SAM weights: no parameter of an image_encoder or a vision_encoder among the keys {listing(keys)}"
    )


def _refuse_added(keys: Iterable[str], names: _Names) -> None:
    keys = list(keys)
    for pattern, kind in _ADDED:
        added = []
        for key in keys:
            parts = names.split(key)
            # Before the model's parts a name means nothing: sam_adapter.image_encoder.* is a whole model.
            segments = key.split(".") if parts is None else parts[1]
            if any(pattern.fullmatch(segment) for segment in segments):
                added.append(key)
        if added:
            raise CheckpointError(f"keys of {kind}: {listing(added)}")


def _is_outside(key: str, inside: Iterable[str], names: _Names) -> bool:
    """Return whether ``key`` is beside the model's parts, or beside a module that wraps all or some of one."""
    if names.split(key) is None:
        return True
    beside = key.rpartition(".")[0] + "."
    following = {name[len(beside) :].split(".", 1)[0] for name in inside if name.startswith(beside)}
    return bool(following) and not any(segment in names.segments or segment.isdecimal() for segment in following)


def _flaw(tensor: Tensor) -> str | None:
    """Return what keeps a tensor from being weights, or None."""
    if tensor.is_meta:
        return "no values, on the meta device"
    if tensor.is_nested:
        return "nested"
    if not is_plain(tensor):
        return f"of class {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return None if is_weight_dtype(tensor.dtype) else str(tensor.dtype)


def is_weight_dtype(dtype: torch.dtype) -> bool:
    """Return whether weights can be of ``dtype``: one floating-point number an element."""
    return dtype.is_floating_point and dtype != torch.float4_e2m1fn_x2


def _beside(key: str, names: _Names) -> _Place:
    prefix, segments = names.split(key) or ("", [key])
    return _Place(prefix, ".".join(segments))


def _one_model(entries: Iterable[tuple[str, _Place, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors by their names; one that is stored more than once counts once.

    Raises:
        CheckpointError: two keys have one name, but hold different values.
    """
    state: dict[str, Tensor] = {}
    origins: dict[str, tuple[str, str]] = {}
    pairs, prefixes = [], []
    for key, (prefix, name), tensor in entries:
        if name not in state:
            state[name], origins[name] = tensor, (key, prefix)
        elif not torch.equal(state[name], tensor):
            first_key, first_prefix = origins[name]
            pairs.append(f"{first_key} and {key}")
            if prefix != first_prefix:
                prefixes += [first_prefix, prefix]
    if pairs:
        models = " and ".join(repr(prefix) for prefix in dict.fromkeys(prefixes))
        several = f"; models lie under the prefixes {models}: save the one that is meant by itself" if models else ""
        raise CheckpointError(f"pairs of keys are one tensor, but they differ: {listing(pairs)}{several}")
    return state


def rename(state: Mapping[str, Tensor], new_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return ``state`` under new names where there are some, by the same rule as :func:`find_weights`."""
    return _one_model((key, _Place("", new_names.get(key, key)), tensor) for key, tensor in state.items())
