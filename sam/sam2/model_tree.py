"""A model as a tree of constructors and their arguments: what the official YAML files hold and overrides change.

The trees of the released models come from our table of them; the files in ``configs`` are those trees, written by
``python -m sam.sam2.model_tree``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.sam2_layouts import named
from ..config import SAM2_VARIANTS, HieraConfig, Sam2Config
from ..modeling.hiera import Hiera
from ..modeling.mask_decoder import MaskDecoder
from ..modeling.sam2_base import SAM2Base

Tree = dict[str, Any]

OFFICIAL = "sam2"
_SIZES = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}
# The last part of a config's name, without its suffix, and the variant that it is of.
CONFIG_VARIANTS = {
    f"{release}_hiera_{short}": f"{release}_{size}" for release in ("sam2", "sam2.1") for size, short in _SIZES.items()
}
_EXAMPLE = SAM2_VARIANTS["sam2.1_tiny"]
EXTRA = "sam_mask_decoder_extra_args"
_OVERRIDE = re.compile(r"(?:\+{1,2})?model\.([\w.]+)=(.*)", re.DOTALL)


def tree_of(config: Sam2Config) -> Tree:
    """Return the official tree of a model, whose root is ``model``; without the options of post-processing."""
    return {"model": {"_target_": _ours("modeling.sam2_base.SAM2Base"), **_modules(config), **config.base_options()}}


def _modules(config: Sam2Config) -> Tree:
    trunk, width, memory = config.image_encoder, config.image_encoder.d_model, config.mem_dim
    attention = {
        "_target_": _ours("modeling.sam.transformer.RoPEAttention"),
        "rope_theta": 10000.0,
        "feat_sizes": [64, 64],
        "embedding_dim": width,
        "num_heads": 1,
        "downsample_rate": 1,
        "dropout": 0.1,
    }
    layer = {
        "_target_": _ours("modeling.memory_attention.MemoryAttentionLayer"),
        "activation": "relu",
        "dim_feedforward": config.memory_attention_dim_feedforward,
        "dropout": 0.1,
        "pos_enc_at_attn": False,
        "self_attention": attention,
        "d_model": width,
        "pos_enc_at_cross_attn_keys": True,
        "pos_enc_at_cross_attn_queries": False,
        "cross_attention": {**attention, "rope_k_repeat": True, "kv_in_dim": memory},
    }
    block = {
        "_target_": _ours("modeling.memory_encoder.CXBlock"),
        "dim": width,
        "kernel_size": 7,
        "padding": 3,
        "layer_scale_init_value": 1e-6,
        "use_dwconv": True,
    }
    downsampler = {"_target_": _ours("modeling.memory_encoder.MaskDownSampler"), "embed_dim": width}
    return {
        "image_encoder": {
            "_target_": _ours("modeling.backbones.image_encoder.ImageEncoder"),
            "scalp": trunk.scalp,
            "trunk": {"_target_": _ours("modeling.backbones.hieradet.Hiera"), **_plain(trunk, _TRUNK)},
            "neck": {
                "_target_": _ours("modeling.backbones.image_encoder.FpnNeck"),
                "position_encoding": _positions(width),
                "d_model": width,
                "backbone_channel_list": trunk.channel_list,
                "fpn_top_down_levels": list(trunk.fpn_top_down_levels),
                "fpn_interp_model": "nearest",
            },
        },
        "memory_attention": {
            "_target_": _ours("modeling.memory_attention.MemoryAttention"),
            "d_model": width,
            "pos_enc_at_input": True,
            "layer": layer,
            "num_layers": config.memory_attention_layers,
        },
        "memory_encoder": {
            "_target_": _ours("modeling.memory_encoder.MemoryEncoder"),
            "out_dim": memory,
            "in_dim": width,
            "position_encoding": _positions(memory),
            "mask_downsampler": {**downsampler, "kernel_size": 3, "stride": 2, "padding": 1},
            "fuser": {
                "_target_": _ours("modeling.memory_encoder.Fuser"),
                "layer": block,
                "num_layers": config.fuser_layers,
            },
        },
    }


_TRUNK = (
    *("embed_dim", "num_heads", "stages", "global_att_blocks", "window_pos_embed_bkg_spatial_size"),
    *("window_spec", "q_pool", "dim_mul", "head_mul"),
)


def _plain(config: HieraConfig, names: Iterable[str]) -> Tree:
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _positions(channels: int) -> Tree:
    target = _ours("modeling.position_encoding.PositionEmbeddingSine")
    return {"_target_": target, "num_pos_feats": channels, "normalize": True, "scale": None, "temperature": 10000}


def _ours(path: str) -> str:
    return f"sam.{OFFICIAL}.{path}"


def config_of(tree: Tree) -> Sam2Config | None:
    """Return what a tree is the model of; None where it has parts that no :class:`sam.Sam2Config` describes.

    Raises:
        ValueError: a number that no model has, like an image size that its strides do not divide.
    """
    model = tree["model"]
    try:
        encoder, attention, memory = model["image_encoder"], model["memory_attention"], model["memory_encoder"]
        trunk, neck = encoder["trunk"], encoder["neck"]
        config = Sam2Config(
            variant="custom",
            image_encoder=HieraConfig(
                **_given(trunk, _TRUNK, Hiera),
                d_model=neck["d_model"],
                fpn_top_down_levels=neck["fpn_top_down_levels"],
                scalp=encoder["scalp"],
            ),
            mem_dim=memory["out_dim"],
            memory_attention_layers=attention["num_layers"],
            memory_attention_dim_feedforward=attention["layer"]["dim_feedforward"],
            fuser_layers=memory["fuser"]["num_layers"],
            **_given(model, _EXAMPLE.base_options(), SAM2Base),
            **_given(model.get(EXTRA) or {}, _EXAMPLE.decoder_options(), MaskDecoder),
        )
    except (KeyError, TypeError):
        return None
    return named(config) if _agree(model, tree_of(config)["model"]) else None


def _given(node: Tree, names: Iterable[str], kind: type) -> Tree:
    """Return the arguments ``names`` of a node, by default those of its class."""
    parameters = inspect.signature(kind).parameters
    return {name: node.get(name, parameters[name].default) for name in names}


def _agree(node: Any, described: Any) -> bool:
    """Return whether a node says nothing else than what is described."""
    if isinstance(node, dict) and isinstance(described, dict):
        return all(
            name in _SILENT or (name in described and _agree(value, described[name])) for name, value in node.items()
        )
    return bool(node == described)


# What a node may say that no config has: it changes neither weights nor results, or is compared by itself.
_SILENT = {
    *("_target_", "compile_image_encoder", "feat_sizes", "dropout", "layer_scale_init_value", EXTRA),
    *("fill_hole_area", "non_overlap_masks"),  # a video predictor's
    *("clear_non_cond_mem_around_input", "add_all_frames_to_correct_as_cond"),
}


def read_tree(config_file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Tree:
    """Return the tree of a config with overrides.

    Args:
        config_file: a name of a released config, of which only the last part counts; the absolute path of a YAML file;
            or a name that the hydra of the caller finds.
        overrides: like ``++model.image_size=512``.

    Raises:
        ValueError: an unknown name, or an override of what is not there.
    """
    name = os.fspath(config_file)
    variant = CONFIG_VARIANTS.get(Path(name).name.removesuffix(".yaml"))
    if os.path.isabs(name) and os.path.isfile(name):
        tree = _read_yaml(name)
    elif variant is not None:
        tree = tree_of(SAM2_VARIANTS[variant])
    else:
        tree = _compose(name, overrides)
        overrides = ()  # hydra has applied them
    for override in overrides:
        _apply(tree, override)
    _check_arguments(tree["model"], "model")
    return tree


def _read_yaml(path: str) -> Tree:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            f"reading {path} needs PyYAML (pip install pyyaml); released models need only its name"
        ) from None
    with open(path) as file:
        tree = yaml.load(file, _yaml_loader(yaml))
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError(f"{path} is no config of a SAM 2 model: it has no model:")
    return tree


def _yaml_loader(yaml: Any) -> Any:
    """Return a loader that takes 1e-6 for a number, as hydra does; YAML 1.1 wants a dot in it."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
    )
    return Loader


def _compose(name: str, overrides: Sequence[str]) -> Tree:
    """Compose a config that only the caller's hydra may know."""
    known = ", ".join(f"configs/{name.split('_')[0]}/{name}.yaml" for name in CONFIG_VARIANTS)
    unknown = f"unknown config {name!r}; known by name are {known}"
    try:
        from hydra import compose
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import MissingConfigException
        from omegaconf import OmegaConf
    except ImportError:
        raise ValueError(unknown) from None
    if not GlobalHydra.instance().is_initialized():
        raise ValueError(unknown)
    try:
        composed = compose(config_name=name, overrides=[*overrides])
    except MissingConfigException:
        raise ValueError(f"{unknown}; nor has hydra found it where it was told to look") from None
    tree = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError(f"the config {name!r} has no model:")
    return dict(tree)


def _apply(tree: Tree, override: str) -> None:
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise ValueError(f"an override is like ++model.image_size=512, got {override!r}")
    *parents, name = match[1].split(".")
    node = tree["model"]
    for parent in parents:
        node = node.setdefault(parent, {}) if parent == EXTRA else node.get(parent)
        if not isinstance(node, dict):
            raise ValueError(f"{override!r} overrides what the model has not: it has no {parent}")
    node[name] = _value(match[2])


def _value(text: str) -> Any:
    """Read the value of an override: a number, true, false, null or a list of such; anything else is a string."""
    words = re.sub(r"\b(true|false|null)\b", lambda word: word[0].lower(), text, flags=re.IGNORECASE)
    try:
        return json.loads(words)
    except ValueError:
        return text.strip("'\"")


def _check_arguments(node: Any, path: str) -> None:
    """Raise ``ValueError`` for an argument that the class of a node, or of one in it, does not take."""
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    if target is not None:
        taken = _arguments_of(_class_of(target))
        unknown = [name for name in node if name != "_target_" and taken is not None and name not in taken]
    else:
        taken = _arguments_of(MaskDecoder) if path.endswith(EXTRA) else None
        unknown = [name for name in node if taken is not None and name not in taken]
    if unknown:
        raise ValueError(
            f"{path}.{unknown[0]} is no option of this model: {target or 'the mask decoder'} takes no such"
        )
    for name, child in node.items():
        _check_arguments(child, f"{path}.{name}")


def _arguments_of(kind: Any) -> set[str] | None:
    """Return the keyword arguments that a class takes, those it hands on to its parents too; None for any."""
    names: set[str] = set()
    for parent in inspect.getmro(kind) if inspect.isclass(kind) else (kind,):
        function = parent.__dict__.get("__init__") if inspect.isclass(parent) else parent
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None


def instantiate(node: Any) -> Any:
    """Build what a node of a tree describes, its children first."""
    if isinstance(node, (list, tuple)):
        return [instantiate(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    arguments = {name: instantiate(child) for name, child in node.items() if name != "_target_"}
    return _class_of(node["_target_"])(**arguments) if "_target_" in node else arguments


def _class_of(target: str) -> Any:
    """Import a class by its path; those of the official package, by its name or ours, are this package's."""
    module, _, name = target.rpartition(".")
    for prefix in (_ours(""), f"{OFFICIAL}."):
        if module.startswith(prefix):
            module = f"{__package__}.{module.removeprefix(prefix)}"
            break
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_ {target} cannot be imported: {error}") from error


def write_configs(folder: Path) -> None:
    """Write the trees of the released models as YAML, at the official places below ``folder``."""
    import yaml

    for name, variant in CONFIG_VARIANTS.items():
        text = "# @package _global_\n" + yaml.safe_dump(tree_of(SAM2_VARIANTS[variant]), sort_keys=False)
        release = name.split("_")[0]
        paths = [folder / "configs" / release / f"{name}.yaml"]
        if release == OFFICIAL:  # the first release's are at the root too
            paths.append(folder / f"{name}.yaml")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    write_configs(Path(__file__).parent)
