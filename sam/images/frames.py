"""Frames of a video, stretched to the square that a model takes: folders of JPEG files, and video files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .videos import decode_frames

# Endings of files that are frames of a folder, and of files that are videos, in lower case.
FRAME_ENDINGS = (".jpg", ".jpeg")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")

Progress = Callable[..., Iterable[int]]


def frame_paths(folder: str) -> list[str]:
    """Return the JPEG files of a folder in the order of their numbers; other files are passed over.

    Names are numbers, or all the same but for one number or more: ``frame_9.jpg`` comes before ``frame_10.jpg``.

    Raises:
        ValueError: names that have no order, or no JPEG file.
    """
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in FRAME_ENDINGS]
    if not names:
        raise ValueError(f"no images found in {folder}: frames are JPEG files, like 00000.jpg")
    stems = {name: os.path.splitext(name)[0] for name in names}
    shapes: dict[str, str] = {}
    for name in sorted(names):
        shapes.setdefault(re.sub(r"\d+", "#", stems[name]), name)
    if len(shapes) > 1 or "#" not in next(iter(shapes)):
        one, *others = shapes.values()
        examples = f"{one} and {others[0]}" if others else one
        raise ValueError(
            f"{folder}: {examples} have no order; name frames by their number, like 00000.jpg or frame_0.jpg"
        )
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", stems[name])])
    return [os.path.join(folder, name) for name in names]


def read_frame(path: str, image_size: int) -> tuple[Tensor, int, int]:
    """Read a JPEG file as the official loader does: stretched by Pillow, bicubic on 8 bits.

    Returns:
        [3, image_size, image_size] float32 in 0..1, and height and width of the file.

    Raises:
        OSError: unreadable; the message names the file.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            pixels = np.array(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC))
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"the frame {path} cannot be read: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255.0, height, width


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise pixels [..., 3, H, W] float32 in place by ``mean`` and ``std`` [3, 1, 1], on their device."""
    return pixels.sub_(mean.to(pixels.device)).div_(std.to(pixels.device))


class AsyncFrames:
    """Frames of JPEG files that a thread reads while the first ones are in use.

    ``frames[i]`` is [3, S, S] float32; one that the thread has not reached is read at once. Arguments and attributes
    are the official ``AsyncVideoFrameLoader``'s.

    Attributes:
        images: what has been read, None elsewhere.
        exception: what stopped the thread; frames that were read, and those that can be, are given all the same.
        video_height, video_width: size of the first file, in pixels.

    Raises:
        OSError: an unreadable file; the message names it.
    """

    def __init__(
        self,
        img_paths: Sequence[str],
        image_size: int,
        offload_video_to_cpu: bool,
        img_mean: Tensor,
        img_std: Tensor,
        compute_device: torch.device,
    ) -> None:
        self.img_paths = img_paths
        self.image_size = image_size
        self.offload_video_to_cpu = offload_video_to_cpu
        self.img_mean = img_mean
        self.img_std = img_std
        self.compute_device = compute_device
        self.images: list[Tensor | None] = [None] * len(img_paths)
        self.exception: Exception | None = None
        self.video_height: Any = None
        self.video_width: Any = None
        self[0]
        self.thread = Thread(target=self._read_all, daemon=True)
        self.thread.start()

    def _progress(self, frames: Iterable[int]) -> Iterable[int]:
        return frames

    def _read_all(self) -> None:
        try:
            for index in self._progress(range(len(self.images))):
                self[index]
        except Exception as error:
            self.exception = error

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        if image is None:
            image, self.video_height, self.video_width = read_frame(self.img_paths[index], self.image_size)
            image = normalised(image, self.img_mean, self.img_std)
            if not self.offload_video_to_cpu:
                image = image.to(self.compute_device)
            self.images[index] = image
        return image

    def __len__(self) -> int:
        return len(self.images)


def decode_video(source: str | os.PathLike[str] | bytes, image_size: int) -> Iterator[tuple[Tensor, int, int]]:
    """Decode a video as :func:`sam.images.videos.decode_frames` does, to tensors.

    Yields:
        [3, image_size, image_size] uint8 RGB, and the frame's height and width.
    """
    for pixels, height, width in decode_frames(source, image_size):
        yield torch.from_numpy(pixels).permute(2, 0, 1), height, width
