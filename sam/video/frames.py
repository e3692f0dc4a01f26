"""Frames of a video as tracking takes them, one after the other: of files, folders, arrays, or as they come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import naming, require
from ..images.frames import VIDEO_ENDINGS, decode_video, frame_paths, normalised, read_frame
from ..images.prepare import prepare_image
from ..images.read import read_image
from ..modeling.promptable import PromptableModel


class VideoFrame(NamedTuple):
    """A frame as the image encoder takes it.

    Attributes:
        pixels: [3, S, S], normalised, on the device and in the dtype of the model.
        size: (height, width) of the frame as it was given.
        backbone: its maps and their positions, where it has been encoded.
    """

    pixels: Tensor
    size: tuple[int, int]
    backbone: dict[str, list[Tensor]] | None = None


def open_frames(model: PromptableModel, source: Any, reverse: bool = False) -> tuple[Iterator[VideoFrame], int | None]:
    """Return the frames of a video, and how many there are: None where nobody knows before the end.

    Each source is resized as officially: JPEG files of a folder by Pillow, videos by FFmpeg, arrays as images are.

    Args:
        model: whose square they are stretched to.
        source: a folder of JPEG files, a video file, or arrays [H, W, 3] uint8 RGB and files of images, as a sequence
            or as they come.
        reverse: from the last frame to the first; takes a folder or a sequence.

    Raises:
        ValueError: a folder whose files have no order, or frames that cannot be taken backwards.
        TypeError: no source of frames.
        OSError, ImportError: while iterating, an unreadable frame, or a video file without PyAV.
    """
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if os.path.isdir(path):
            files = frame_paths(path)
            return (_of_file(model, file) for file in (reversed(files) if reverse else files)), len(files)
        if not path.lower().endswith(VIDEO_ENDINGS):
            raise ValueError(f"frames must be a folder of JPEG files or a video ({', '.join(VIDEO_ENDINGS)}): {path}")
        if reverse:
            raise ValueError(f"{path} cannot be tracked backwards: a video file is decoded forwards")
        if not os.path.exists(path):
            raise FileNotFoundError(f"no such video: {path}")
        return (frame_of_video(model, *frame) for frame in decode_video(path, model.image_size)), None
    require("frames", source, Iterable, "a folder, a video file, or an iterable of arrays or files of images")
    if isinstance(source, Sequence) or (isinstance(source, np.ndarray) and source.ndim == 4):
        order = range(len(source))[:: -1 if reverse else 1]
        return (_of_image(model, index, source[index]) for index in order), len(source)
    if reverse:
        raise ValueError("frames that come one by one cannot be tracked backwards: give a list of them")
    return (_of_image(model, index, image) for index, image in enumerate(source)), None


def _of_image(model: PromptableModel, index: int, image: Any) -> VideoFrame:
    with naming(f"frame {index}"):
        return frame_of(model, image)


def frame_of(model: PromptableModel, image: Any) -> VideoFrame:
    """Return an image, an array [H, W, 3] or a file, as a frame."""
    require("the frame", image, (np.ndarray, str, os.PathLike), "a numpy array [H, W, 3] of uint8, or a file")
    prepared = prepare_image(image if isinstance(image, np.ndarray) else read_image(image), model.image_geometry)
    pixels = model.encoder_input(torch.from_numpy(prepared.pixels).to(model.device), prepared)
    return VideoFrame(pixels, prepared.geometry.original_size)


def _of_file(model: PromptableModel, path: str) -> VideoFrame:
    pixels, height, width = read_frame(path, model.image_size)
    return VideoFrame(_normalised(model, pixels), (height, width))


def frame_of_video(model: PromptableModel, pixels: Tensor, height: int, width: int) -> VideoFrame:
    """Return a picture [3, S, S] uint8 RGB, stretched from one of height and width, as a frame."""
    return VideoFrame(_normalised(model, pixels.float().div_(255.0)), (height, width))


def _normalised(model: PromptableModel, pixels: Tensor) -> Tensor:
    pixels = pixels.to(model.device)
    return normalised(pixels, model.pixel_mean / 255, model.pixel_std / 255).to(model.dtype)
