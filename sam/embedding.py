"""The handle of an embedded image, which can be kept, saved, sent elsewhere and used from many threads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checks import path_of
from .images.geometry import ImageGeometry
from .system.atomic_write import write_atomically
from .system.hardware import usable_device
from .system.tensors import compact

_FORMAT, _HIGH_RES_FORMAT = "sam-image-embedding-1", "sam-image-embedding-2"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images, as an image encoder makes them for the mask decoder.

    Attributes:
        embedding: [B, C, h, w].
        high_res: features of finer grids, which the decoder adds to the masks: for SAM 2 [B, C / 8, 4h, 4w] and
            [B, C / 4, 2h, 2w]; none for SAM.
    """

    embedding: Tensor
    high_res: tuple[Tensor, ...] = ()

    @property
    def maps(self) -> tuple[Tensor, ...]:
        return self.embedding, *self.high_res

    @classmethod
    def cat(cls, several: Sequence[ImageFeatures]) -> ImageFeatures:
        """Concatenate the images of ``several``."""
        if len(several) == 1:
            return several[0]
        levels = zip(*(one.high_res for one in several), strict=True)
        return cls(torch.cat([one.embedding for one in several]), tuple(map(torch.cat, levels)))

    def rows(self) -> list[ImageFeatures]:
        """Return the features of each image, in memory of its own."""
        if len(self.embedding) == 1:
            return [self]
        images = zip(*([row.clone() for row in one.split(1)] for one in self.maps), strict=True)
        return [ImageFeatures(embedding, tuple(high_res)) for embedding, *high_res in images]


@dataclass(frozen=True)
class ImageProjections:
    """Image tokens and their projections for block 0 of the decoder; one row per image.

    All prompts without a mask input share them.

    Attributes:
        keys: [I, N, C] the image embedding plus the no-mask embedding.
        k, v: [I, N, D] keys and values for the prompt's tokens.
        q: [I, N, D] queries to the prompt's tokens.
    """

    keys: Tensor
    k: Tensor
    v: Tensor
    q: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.k, self.v, self.q

    def select(self, image_index: Tensor) -> ImageProjections:
        """Return one row per prompt; a single image serves all without a copy."""

        def rows(field: Tensor) -> Tensor:
            if len(field) == 1:
                return field.expand(len(image_index), -1, -1)
            return field.index_select(0, image_index)

        return ImageProjections(*map(rows, self.tensors))

    @classmethod
    def cat(cls, several: Sequence[ImageProjections]) -> ImageProjections:
        """Concatenate the images of ``several``."""
        if len(several) == 1:
            return several[0]
        return cls(*map(torch.cat, zip(*(one.tensors for one in several), strict=True)))


@dataclass(frozen=True)
class _Finish:
    """The stream that computes tensors on a GPU, and the event at the end of that computation."""

    stream: torch.cuda.Stream
    done: torch.cuda.Event

    @classmethod
    def of(cls, tensor: Tensor) -> _Finish | None:
        """Record the end of what is queued on the current stream of ``tensor``'s device; None on a CPU."""
        if tensor.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(tensor.device)
        return cls(stream, stream.record_event())

    def wait(self, *tensors: Tensor) -> None:
        """Make the current stream wait for ``tensors``: whoever reads may be a thread with a stream of its own."""
        here = torch.cuda.current_stream(self.stream.device)
        if here != self.stream:
            here.wait_event(self.done)
            for tensor in tensors:
                tensor.record_stream(here)


@dataclass(frozen=True)
class _Projected:
    """Projections, the generation of the weights that made them, and when they are computed."""

    generation: Hashable
    projections: ImageProjections
    finish: _Finish | None

    def for_this_stream(self) -> ImageProjections:
        """Return the projections, once they are computed."""
        if self.finish is not None:
            self.finish.wait(*self.projections.tensors)
        return self.projections


@dataclass(frozen=True, eq=False, repr=False)
class ImageEmbedding:
    """The encoder's answer for one image and all that is needed to predict masks from it.

    Nothing of it changes after it was made, so threads may share it. ``model.encode`` makes one.

    Attributes:
        features: [1, C, h, w] image embedding, in the model's dtype; SAM 2's has ``no_mem_embed`` added.
        geometry: the sizes of the image.
        model_hash: the hash of the weights that made it (:attr:`sam.modeling.Sam.model_hash`); other models refuse it.
            None for features of unknown origin, which are taken on trust.
        model_name: the variant's name, for messages.
        image_hash: the hash of the pixels and the original size; None when the pixels are not known.
        high_res: SAM 2's features of finer grids, [1, C / 8, 4h, 4w] and [1, C / 4, 2h, 2w]; none of SAM.
    """

    features: Tensor
    geometry: ImageGeometry
    model_hash: str | None = None
    model_name: str = "unknown"
    image_hash: str | None = None
    high_res: tuple[Tensor, ...] = ()
    _projected: _Projected | None = field(default=None, init=False, repr=False)
    _finish: _Finish | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.features.ndim != 4 or self.features.shape[0] != 1:
            raise ValueError(f"features must be [1, C, h, w], got {list(self.features.shape)}")
        object.__setattr__(self, "high_res", tuple(self.high_res))
        object.__setattr__(self, "_finish", _Finish.of(self.features))

    def __repr__(self) -> str:
        height, width = self.geometry.original_size
        dtype = str(self.features.dtype).removeprefix("torch.")
        return (
            f"ImageEmbedding({height}x{width} image, model {self.model_name}, "
            f"features {list(self.features.shape)} {dtype} on {self.device})"
        )

    def ready_features(self) -> Tensor:
        """Return ``features`` after making the current stream of a GPU wait for the one that computes them."""
        if self._finish is not None:
            self._finish.wait(self.features)
        return self.features

    def ready(self) -> ImageFeatures:
        """Return all features, one row, as :meth:`ready_features` does one of them."""
        return ImageFeatures(self.ready_features(), self.ready_high_res())

    def ready_high_res(self) -> tuple[Tensor, ...]:
        """Return ``high_res`` as :meth:`ready_features` does ``features``."""
        if self._finish is not None and self.high_res:
            self._finish.wait(*self.high_res)
        return self.high_res

    def __getstate__(self) -> dict[str, Any]:
        features, high_res = compact(self.ready_features()), tuple(map(compact, self.ready_high_res()))
        # The rest is made again where it is read.
        return {**self.__dict__, "features": features, "high_res": high_res, "_projected": None, "_finish": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"high_res": (), **state})  # handles pickled before SAM 2 have none
        self.__post_init__()

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def nbytes(self) -> int:
        """Return the bytes of the features and of what the decoder attached to them."""
        tensors = [self.features, *self.high_res]
        if self._projected is not None:
            tensors += self._projected.projections.tensors
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str) -> ImageEmbedding:
        """Return the same embedding on another device.

        Raises:
            TypeError, ValueError: no device, or one that torch cannot use here.
        """
        device = usable_device(device)
        high_res = tuple(features.to(device) for features in self.ready_high_res())
        return replace(self, features=self.ready_features().to(device), high_res=high_res)

    def projections(self, generation: Hashable, make: Callable[[], ImageProjections]) -> ImageProjections:
        """Return block 0 of the decoder on this image: ``make()`` once per generation of the weights that it reads.

        Two threads may both make it; the values are the same.
        """
        version = -1 if self.features.is_inference() else self.features._version
        projected, generation = self._projected, (generation, version)
        if projected is None or projected.generation != generation:
            made = make()
            projected = _Projected(generation, made, _Finish.of(made.keys))
            object.__setattr__(self, "_projected", projected)
        return projected.for_this_stream()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that :meth:`load` reads; a file already there is replaced whole or not at all."""
        path, geometry = path_of("path", path), self.geometry
        sizes: list[Any] = [geometry.original_size, geometry.input_size, geometry.image_size]
        older = not (self.high_res or geometry.is_stretched)  # which releases before SAM 2 read too
        metadata = {
            "format": _FORMAT if older else _HIGH_RES_FORMAT,
            "geometry": json.dumps(sizes if older else [*sizes, geometry.is_stretched]),
            "model_hash": self.model_hash or "",
            "model_name": self.model_name,
            "image_hash": self.image_hash or "",
        }
        tensors = {"features": self.ready_features()}
        tensors |= {f"high_res.{level}": features for level, features in enumerate(self.ready_high_res())}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with write_atomically(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ImageEmbedding:
        """Read what :meth:`save` wrote.

        Raises:
            TypeError: no path, or no device.
            FileNotFoundError: no such file.
            IsADirectoryError: a folder.
            ValueError: not a saved image embedding, or a damaged one; a device that torch cannot use here.
        """
        path, device = path_of("path", path), usable_device(device)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not a saved image embedding")
        if not path.is_file():
            raise FileNotFoundError(f"no such embedding: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") in (_FORMAT, _HIGH_RES_FORMAT):
                    # Copies: a tensor that maps the file would change, or crash, when someone overwrites it.
                    features, *high_res = (file.get_tensor(name).to(device, copy=True) for name in _names(file.keys()))
                    return cls(
                        features=features,
                        geometry=_read_geometry(metadata["geometry"]),
                        model_hash=metadata["model_hash"] or None,
                        model_name=metadata["model_name"],
                        image_hash=metadata["image_hash"] or None,
                        high_res=tuple(map(channels_last, high_res)),
                    )
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is a damaged image embedding: {error}") from None
        raise ValueError(f"{path} is not a saved image embedding (format {metadata.get('format')!r})")


def channels_last(features: Tensor) -> Tensor:
    """Return features [B, C, h, w] with the channels of a pixel side by side, as the decoder reads them best."""
    return features.contiguous(memory_format=torch.channels_last)


def _names(names: Sequence[str]) -> list[str]:
    """Return the names of an embedding's tensors in their order."""
    return ["features", *(f"high_res.{level}" for level in range(len(names) - 1))]


def _read_geometry(text: str) -> ImageGeometry:
    original_size, input_size, image_size, *stretched = json.loads(text)
    sizes = [*original_size, *input_size, image_size]
    if any(type(size) is not int for size in sizes):
        raise ValueError(f"the sizes of its geometry must be integers, got {sizes}")
    if stretched not in ([], [False], [True]):
        raise ValueError(f"its geometry must end in true or false, got {stretched}")
    return ImageGeometry(tuple(original_size), tuple(input_size), image_size, *stretched)
