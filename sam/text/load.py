"""Detectors from folders on disk, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint.errors import CheckpointError, listing
from ..checks import path_of
from ..system.hardware import usable_device
from .grounding_dino import GroundingDino
from .owl import Owl
from .transformers_detector import TransformersDetector

INSTALL = "text prompts need transformers: pip install 'fastsam-kernels[text]'"


class _Kind(NamedTuple):
    """The classes that a kind of detector is made of; image processors are those that need no torchvision."""

    detector: Callable[..., TransformersDetector]
    model: str
    image_processor: str
    processor: str


_DINO = "GroundingDinoImageProcessorPil", "GroundingDinoProcessor"
_KINDS = {
    "grounding-dino": _Kind(GroundingDino, "GroundingDinoForObjectDetection", *_DINO),
    "mm-grounding-dino": _Kind(GroundingDino, "MMGroundingDinoForObjectDetection", *_DINO),
    "owlv2": _Kind(Owl, "Owlv2ForObjectDetection", "Owlv2ImageProcessorPil", "Owlv2Processor"),
}


def load_detector(
    folder: str | os.PathLike[str],
    *,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
    download: bool = False,
    **options: Any,
) -> TransformersDetector:
    """Load a detector as transformers saves it: Grounding DINO, MM-Grounding-DINO, LLMDet or OWLv2.

    Only safetensors are read, and no code of the folder's runs.

    Args:
        folder: with ``config.json``, weights, tokenizer and image processor.
        device: as for :func:`sam.load_model`.
        dtype: of the detector's weights.
        download: take ``folder`` for a name on the Hugging Face Hub where there is no such folder. Nothing is
            downloaded otherwise.
        options: ``batch_size``, and ``score`` of :class:`GroundingDino`.

    Raises:
        CheckpointError: another kind of model, weights missing or of another shape, or files that are none.
        FileNotFoundError: no such folder.
        ImportError: transformers is not installed.
    """
    place = str(folder)
    if not (download and not Path(place).exists()):
        place = str(_checked_folder(path_of("folder", folder)))
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    local = {"local_files_only": not download}
    kind = _kind_of(place, transformers, local)
    try:
        with _quiet(transformers.logging):
            model, report = getattr(transformers, kind.model).from_pretrained(
                place, dtype=dtype, output_loading_info=True, use_safetensors=True, **local
            )
            images = getattr(transformers, kind.image_processor).from_pretrained(place, **local)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **local)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place}: {' '.join(str(error).split())}") from error
    for name, wrong in (("missing_keys", "no weights"), ("mismatched_keys", "weights of another shape")):
        if keys := report[name]:
            raise CheckpointError(f"{place} has {wrong} for {listing(sorted(map(str, keys)))}")
    processor = getattr(transformers, kind.processor)(images, tokenizer)
    return kind.detector(model.to(usable_device(device)), processor, **options)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keep transformers' bars and its table of keys off stderr: what counts in there is raised."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; download=True takes it for a name on the Hub")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no detector as transformers saves it: it has no config.json")
    return folder


def _kind_of(place: str, transformers: Any, local: dict[str, bool]) -> _Kind:
    """Return the kind that the folder's config names."""
    path = Path(place, "config.json")
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        else:
            config, _ = transformers.PreTrainedConfig.get_config_dict(place, **local)
        name = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: {' '.join(str(error).split())}") from error
    if isinstance(name, str) and name.startswith("sam3"):
        raise CheckpointError(f"{place} is SAM 3, which takes text by itself: it is no detector, and not read here")
    if name not in _KINDS:
        raise CheckpointError(f"a detector must be one of {', '.join(_KINDS)}, {place} says model_type {name!r}")
    return _KINDS[name]
