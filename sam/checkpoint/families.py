"""The differences between SAM and SAM 2 in reading and writing weights; all else is common to both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SAM2_VARIANTS, VARIANTS, Sam2Config, SamConfig
from ..modeling.build import build_empty
from ..modeling.quantization import place_quantized_linears
from . import layouts, sam2_layouts
from .errors import CheckpointError
from .layouts import Layout

Config = SamConfig | Sam2Config


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of model.

    Attributes:
        name: for messages.
        config: the class of its descriptions.
        example: a config; all of a family have the same names, numbers aside, but for :attr:`optional`.
        encoders: what tells a key of each layout's image encoder.
        transformers_names: the names in that layout of an official name.
        joined, split: from a tensor per official name to what transformers stores, and back.
        transformers_config, config_from_transformers, infer_config: as in :mod:`sam.checkpoint.layouts`.
        sizes: channels and blocks of the image encoder.
    """

    name: str
    config: type[SamConfig] | type[Sam2Config]
    example: Config
    encoders: Mapping[Layout, re.Pattern[str]]
    transformers_names: Callable[[str, Any], tuple[str, ...]]
    joined: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    split: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    transformers_config: Callable[[Any], dict[str, Any]]
    config_from_transformers: Callable[[bytes], Config | None]
    infer_config: Callable[[Mapping[str, Tensor], Layout], Config]
    sizes: Callable[[Any], tuple[int, int]]

    def other_release(self, state: Mapping[str, Tensor], layout: Layout, config: Config) -> str | None:
        """Return a sentence if shapes show weights of another release or size than ``config``, else None."""
        if not isinstance(config, Sam2Config):
            return None
        if config.has_memory and not any(name.startswith("memory_encoder.") for name in state):
            return "these are weights of images alone, as transformers' Sam2Model has them, which sam.load_model takes"
        try:
            inferred = self.infer_config(state, layout)
        except CheckpointError:
            return None
        assert isinstance(inferred, Sam2Config)
        if self.sizes(inferred) != self.sizes(config):
            return f"these are weights of {self.describe(inferred)}, not of {self.describe(config)}"
        if inferred.version != config.version:
            names = {"2": "SAM 2.0", "2.1": "SAM 2.1"}
            return (
                f"these are weights of {names[inferred.version]} ({inferred.variant}), but the config is of "
                f"{names[config.version]} ({config.variant}): name the config of the weights' version"
            )
        return None

    def describe(self, config: Config) -> str:
        """Return a model's variant with what its weights show of it."""
        channels, blocks = self.sizes(config)
        return f"{config.variant} ({channels} channels, {blocks} blocks)"

    def wrapped(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """Return what an official torch file holds: weights, or SAM 2's under the name ``model``."""
        return {"model": state} if self.config is Sam2Config else dict(state)

    def stored(self, state: Mapping[str, Tensor], config: Config, layout: Layout) -> dict[str, Tensor]:
        """Return official weights under the names of a layout."""
        if layout == "official":
            return dict(state)
        renamed = {theirs: tensor for name, tensor in state.items() for theirs in self.transformers_names(name, config)}
        return self.joined(renamed)


class Form(NamedTuple):
    """The form that weights have in a file."""

    family: Family
    layout: Layout


SAM = Family(
    "SAM",
    SamConfig,
    VARIANTS["nano"],
    {
        # The last of both: a wrapper may have the name of the other.
        "official": re.compile(r"(^|\.)image_encoder\.(?!(.*\.)?(image|vision)_encoder\.)"),
        "transformers": re.compile(r"(^|\.)vision_encoder\.(?!(.*\.)?(image|vision)_encoder\.)"),
    },
    layouts.transformers_names,
    dict,
    dict,
    layouts.transformers_config,
    layouts.config_from_transformers,
    layouts.infer_config,
    lambda config: (config.encoder_embed_dim, config.encoder_depth),
)
SAM2 = Family(
    "SAM 2",
    Sam2Config,
    SAM2_VARIANTS["sam2.1_tiny"],
    {
        "official": re.compile(r"(^|\.)image_encoder\.(\w+\.)*trunk\."),
        "transformers": re.compile(r"(^|\.)vision_encoder\.(\w+\.)*backbone\."),
    },
    sam2_layouts.transformers_names,
    sam2_layouts.joined,
    sam2_layouts.split,
    sam2_layouts.transformers_config,
    sam2_layouts.config_from_transformers,
    sam2_layouts.infer_config,
    lambda config: (config.image_encoder.embed_dim, sum(config.image_encoder.stages)),
)
FAMILIES = (SAM2, SAM)  # the special one first: wrappers aside, its names may be taken for the other's


def family_of(config: Config) -> Family:
    """Return the family of a config."""
    return SAM2 if isinstance(config, Sam2Config) else SAM


def expected_shapes(config: Config, quantization: str | None = None) -> dict[str, torch.Size]:
    """Return official name -> shape of every tensor in a state dict of ``config``, quantised by a scheme or plain."""
    return {name: tensor.shape for name, tensor in empty_state(config, quantization).items()}


@lru_cache(maxsize=16)
def empty_state(config: Config, quantization: str | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model of ``config``, on the meta device."""
    model = build_empty(config)
    if quantization is not None:
        place_quantized_linears(model, quantization)
    return model.state_dict()
