"""Small helpers around masks, prompts and the frames of videos: ``sam2.utils.misc``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...checks import require
from ...images.frames import VIDEO_ENDINGS, AsyncFrames, decode_video, frame_paths, normalised, read_frame
from ...masks.regions import areas_of, fill_small_holes, label_regions


def get_sdpa_settings() -> tuple[bool, bool, bool]:
    """Return what the official attention asks of the GPU before it chooses a backend.

    Returns:
        whether it is older than Volta, or none; whether flash attention runs on it; whether the plain products stay
        allowed beside it.
    """
    if not torch.cuda.is_available():
        return True, False, True
    major = torch.cuda.get_device_properties(0).major
    return major < 7, major >= 8, major < 8


def get_connected_components(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Label the 8-connected regions of masks, on any device.

    Args:
        mask: [N, 1, H, W], true or not 0 inside.

    Returns:
        labels and areas, both [N, 1, H, W] int32 and 0 outside the mask: a number of the pixel's region, and how many
        pixels it has.

    Raises:
        ValueError: another shape.
        ImportError: no SciPy, which finds regions on a CPU.
    """
    require("mask", mask, Tensor, "a torch.Tensor [N, 1, H, W]")
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask must be [N, 1, H, W], got {list(mask.shape)}")
    inside = mask[:, 0] != 0
    labels, sizes = label_regions(inside)
    return labels[:, None], (areas_of(labels, sizes) * inside)[:, None]


def mask_to_box(masks: Tensor) -> Tensor:
    """Return boxes [B, 1, 4] int32 around masks [B, 1, H, W] bool, last row and column included.

    An empty mask has the box W, H, -1, -1.
    """
    require("masks", masks, Tensor, "a torch.Tensor [B, 1, H, W] of bool")
    height, width = masks.shape[-2:]

    def ends(line: Tensor, length: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(length, dtype=torch.int32, device=masks.device)
        return indices.where(line, length).amin(-1), indices.where(line, -1).amax(-1)

    left, right = ends(masks.any(dim=-2), width)
    top, bottom = ends(masks.any(dim=-1), height)
    return torch.stack([left, top, right, bottom], dim=-1)


def fill_holes_in_mask_scores(mask: Tensor, max_area: float) -> Tensor:
    """Raise the holes of up to ``max_area`` pixels in logits [N, 1, h, w] to 0.1, on any device.

    Raises:
        ValueError: an area that is not more than 0.
    """
    if not max_area > 0:
        raise ValueError(f"max_area must be more than 0 pixels, got {max_area}")
    return fill_small_holes(mask, max_area)


def concat_points(old_point_inputs: dict[str, Tensor] | None, new_points: Tensor, new_labels: Tensor) -> dict[str, Any]:
    """Append points [B, N, 2] and labels [B, N] to those of ``old_point_inputs``, which None is none of."""
    points = {"point_coords": new_points, "point_labels": new_labels}
    if old_point_inputs is None:
        return points
    return {name: torch.cat([old_point_inputs[name], new], dim=1) for name, new in points.items()}


_CUDA = torch.device("cuda")

# Frames of videos --------------------------------------------------------------------------------------------


def _load_img_as_tensor(img_path: str, image_size: int) -> tuple[Tensor, int, int]:
    """Read a JPEG file as [3, image_size, image_size] float32 in 0..1, and its height and width."""
    return read_frame(img_path, image_size)


class AsyncVideoFrameLoader(AsyncFrames):
    """Frames of JPEG files that a thread reads, see :class:`~sam.images.frames.AsyncFrames`."""

    def _progress(self, frames: Iterable[int]) -> Iterable[int]:
        return tqdm(frames, desc="frame loading (JPEG)")


def load_video_frames(
    video_path: str | os.PathLike[str] | bytes,
    image_size: int,
    offload_video_to_cpu: bool,
    img_mean: Sequence[float] = (0.485, 0.456, 0.406),
    img_std: Sequence[float] = (0.229, 0.224, 0.225),
    async_loading_frames: bool = False,
    compute_device: torch.device | str = _CUDA,
) -> tuple[Any, int, int]:
    """Load the frames of a video, stretched to a square and normalised.

    Args:
        video_path: a folder of JPEG files, a video file, or the bytes of one.
        image_size: S, side of the square in pixels.
        offload_video_to_cpu: leave the frames on the CPU; else they go to ``compute_device``.
        img_mean, img_std: mean and standard deviation of the channels, in 0..1.
        async_loading_frames: read a folder's files in a thread while the first frames are in use.
        compute_device: device of the model.

    Returns:
        frames [T, 3, S, S] float32, or an :class:`AsyncVideoFrameLoader`; height and width of the video.

    Raises:
        NotImplementedError: neither a folder nor a video.
        ValueError: files in a folder that have no order, or none.
        OSError: an unreadable frame; the message names it.
        ImportError: a video file without PyAV.
    """
    path = None if isinstance(video_path, bytes) else os.fspath(video_path)
    if path is not None and os.path.isdir(path):
        return load_video_frames_from_jpg_images(
            video_path=path,
            image_size=image_size,
            offload_video_to_cpu=offload_video_to_cpu,
            img_mean=img_mean,
            img_std=img_std,
            async_loading_frames=async_loading_frames,
            compute_device=compute_device,
        )
    if path is None or path.lower().endswith(VIDEO_ENDINGS):
        return load_video_frames_from_video_file(
            video_path=video_path,
            image_size=image_size,
            offload_video_to_cpu=offload_video_to_cpu,
            img_mean=img_mean,
            img_std=img_std,
            compute_device=compute_device,
        )
    raise NotImplementedError(
        f"video_path must be a folder of JPEG files, a video ({', '.join(VIDEO_ENDINGS)}) or its bytes, got {path}"
    )


def load_video_frames_from_jpg_images(
    video_path: str,
    image_size: int,
    offload_video_to_cpu: bool,
    img_mean: Sequence[float] = (0.485, 0.456, 0.406),
    img_std: Sequence[float] = (0.229, 0.224, 0.225),
    async_loading_frames: bool = False,
    compute_device: torch.device | str = _CUDA,
) -> tuple[Any, int, int]:
    """Load a folder of JPEG files named by their frame's number, see :func:`load_video_frames`."""
    if not os.path.isdir(video_path):
        raise NotImplementedError(f"video_path must be a folder of JPEG files, got {video_path}")
    paths, (mean, std) = frame_paths(video_path), _statistics(img_mean, img_std)
    if async_loading_frames:
        loader = AsyncVideoFrameLoader(paths, image_size, offload_video_to_cpu, mean, std, torch.device(compute_device))
        return loader, loader.video_height, loader.video_width
    images, height, width = torch.zeros(len(paths), 3, image_size, image_size), 0, 0
    for index, path in enumerate(tqdm(paths, desc="frame loading (JPEG)")):
        images[index], height, width = _load_img_as_tensor(path, image_size)
    return normalised(images if offload_video_to_cpu else images.to(compute_device), mean, std), height, width


def load_video_frames_from_video_file(
    video_path: str | os.PathLike[str] | bytes,
    image_size: int,
    offload_video_to_cpu: bool,
    img_mean: Sequence[float] = (0.485, 0.456, 0.406),
    img_std: Sequence[float] = (0.229, 0.224, 0.225),
    compute_device: torch.device | str = _CUDA,
) -> tuple[Tensor, int, int]:
    """Load a video file or its bytes with PyAV, see :func:`load_video_frames`."""
    frames, height, width = [], 0, 0
    for pixels, height, width in decode_video(video_path, image_size):  # noqa: B007 - of the last frame
        frames.append(pixels)
    if not frames:
        raise OSError("the video has no frames")
    images = torch.stack(frames)
    images = (images if offload_video_to_cpu else images.to(compute_device)).float().div_(255.0)
    return normalised(images, *_statistics(img_mean, img_std)), height, width


def _statistics(*values: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(value, dtype=torch.float32).reshape(3, 1, 1) for value in values)
