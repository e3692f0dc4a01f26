"""A change that a program makes to the modules and methods of Meta's package or of this one, and the calls it sees."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

from .official_calls import numbers

SIZE = 128


def small_model(package: Any) -> Any:
    """Build a ``Sam`` of the package with windows that do not divide its grid of 8 x 8, every weight drawn."""
    modeling, grid = package.modeling, (8, 8)
    encoder = modeling.ImageEncoderViT(
        img_size=SIZE,
        patch_size=16,
        embed_dim=32,
        depth=3,
        num_heads=2,
        out_chans=64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    prompt_encoder = modeling.PromptEncoder(
        embed_dim=64, image_embedding_size=grid, input_image_size=(SIZE, SIZE), mask_in_chans=16
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=96, num_heads=8)
    decoder = modeling.MaskDecoder(transformer_dim=64, transformer=transformer, iou_head_hidden_dim=48)
    model = modeling.Sam(encoder, prompt_encoder, decoder).eval().requires_grad_(False)
    for seed, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        of_norm = tensor.ndim == 1 and name.endswith("weight")
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 25
        tensor.copy_(float(of_norm) + numbers(*tensor.shape, seed=seed, scale=1.2 * fan_in**-0.5))
    return model


class Log(list[str]):
    """The calls that a change saw, each by its name and its arguments as they were given."""

    def note(self, label: str, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        given = [*map(described, args), *(f"{name}={described(value)}" for name, value in kwargs.items())]
        self.append(f"{label}({', '.join(given)})")

    def take(self) -> list[str]:
        """Return the calls in order, those repeated in a row once with their number, and forget them."""
        result = [call if (count := len(list(same))) == 1 else f"{count} x {call}" for call, same in groupby(self)]
        self.clear()
        return result


def described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return "x".join(map(str, value.shape))
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(described, value))}]"
    return str(value) if value is None or isinstance(value, int | float) else type(value).__name__


def scaled(answer: Any) -> Any:
    """Return an answer with its first tensor or array of numbers made larger by a quarter."""
    if isinstance(answer, Tensor):
        return 1.25 * answer if answer.is_floating_point() else answer
    if isinstance(answer, np.ndarray):
        return 1.25 * answer if answer.dtype.kind == "f" else answer
    return (scaled(answer[0]), *answer[1:]) if isinstance(answer, tuple) and answer else answer


def _to_its_predictor(generator: Any, make: Callable[[Any], None]) -> None:
    make(generator.predictor)


class Change:
    """One program's changes to a package and a model of it; leaving the context takes them back from the package."""

    def __init__(self, package: Any) -> None:
        self.package, self.log, self._stack = package, Log(), ExitStack()
        self.model = small_model(package)
        self.to_predictors: list[Callable[[Any], None]] = []
        self.to_set_predictors: list[Callable[[Any], None]] = []
        self.to_generators: list[Callable[[Any], None]] = []

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def module(self, name: str) -> Any:
        """Import a module of the package."""
        return importlib.import_module(f"{self.package.__name__}.{name}")

    def predictor(self) -> Any:
        """Make a predictor with the changes that are made to predictors."""
        predictor = self.package.SamPredictor(self.model)
        for make in self.to_predictors:
            make(predictor)
        return predictor

    def generator(self) -> Any:
        """Make a generator of few clicks that takes every mask, with the changes that are made to generators."""
        thresholds = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1, "crop_nms_thresh": 1}
        generator = self.package.SamAutomaticMaskGenerator(
            self.model, 3, 4, crop_n_layers=1, crop_overlap_ratio=1.0, output_mode="uncompressed_rle", **thresholds
        )
        for make in [*self.to_generators, *(partial(_to_its_predictor, make=make) for make in self.to_predictors)]:
            make(generator)
        return generator

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(patch.object(owner, name, value))

    def wrap(self, owner: Any, name: str, alter: Callable[[Any], Any] = scaled) -> None:
        """Put a wrapper in the place of a method or a function, that notes the call and alters the answer."""
        self.replace(owner, name, self._wrapper(getattr(owner, name), name, isinstance(owner, type), alter))

    def _wrapper(self, function: Any, label: str, is_method: bool, alter: Callable[[Any], Any] = scaled) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.log.note(label, args[1:] if is_method else args, kwargs)
            return alter(function(*args, **kwargs))

        return wrapper

    def subclass(self, thing: Any, *names: str) -> None:
        """Make ``thing`` of a subclass of its class that overrides methods."""
        thing.__class__ = self.derived_class(type(thing), *names)

    def derived_class(self, base: type, *names: str) -> type:
        return type("Own", (base,), {name: self._wrapper(getattr(base, name), name, True) for name in names})

    def hook(self, name: str, kind: str) -> None:
        """Register a hook that notes the call, and as a forward hook alters the output."""
        module = self.model.get_submodule(name)
        if kind == "forward":
            module.register_forward_hook(lambda _, args, output: self._saw(name, args, {}) or scaled(output))
        elif kind == "forward_pre":
            module.register_forward_pre_hook(lambda _, args: self._saw(name, args, {}))
        else:
            module.register_forward_pre_hook(lambda _, args, kwargs: self._saw(name, args, kwargs), with_kwargs=True)

    def _saw(self, label: str, args: Any, kwargs: dict[str, Any]) -> None:
        self.log.note(label.rpartition(".")[2] or label, args, kwargs)
