"""Batches of scenes: drawn by other processes, kept on the device for a while, and augmented there.

Every random number is a function of (seed, step) or (seed, scene), so a resumed run sees what an uninterrupted
one would have seen; the only position to remember is the next scene.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .scenes import SIZE, training_scene
from .team import Team

_NATIVE_SHARE = 0.6  # of the batches at the scale of the scene, which is the scale of the whole canvas
_SMALLEST_WINDOW = 0.55  # of the picture's side; smaller windows of a scene are enlarged


@dataclass(frozen=True)
class Batch:
    """Hold B pictures of ``size`` pixels: [B, 3, size, size] normalised fp32, ids [B, size, size], parents [B, 256]."""

    pixels: Tensor
    ids: Tensor
    parents: Tensor


class _Scenes(Dataset[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scene = training_scene(self.seed, index)
        return scene.image, scene.ids, scene.parents


def draw_scenes(seed: int, first: int, workers: int, team: Team) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this process's training scenes from ``first`` on, drawn ahead by ``workers`` processes (0: in this one)."""
    ahead = 8 if workers else None
    indices = range(first * team.size + team.rank, 2**31, team.size)
    return iter(DataLoader(_Scenes(seed), None, sampler=indices, num_workers=workers, prefetch_factor=ahead))


class ScenePool:
    """Hold the last ``capacity`` scenes on the device; a batch is fresh scenes and others drawn from the pool."""

    def __init__(
        self, seed: int, next_scene: int, capacity: int, workers: int, device: torch.device, team: Team
    ) -> None:
        self.seed, self.capacity = seed, capacity
        self.next_scene = max(next_scene - capacity, 0)
        self._images = torch.zeros(capacity, SIZE, SIZE, 3, dtype=torch.uint8, device=device)
        self._ids = torch.zeros(capacity, SIZE, SIZE, dtype=torch.uint8, device=device)
        self._parents = torch.zeros(capacity, 256, dtype=torch.uint8, device=device)
        self._stream = draw_scenes(seed, self.next_scene, workers, team)
        self._take(next_scene - self.next_scene)  # what an interrupted run had in its pool

    def _take(self, count: int) -> list[int]:
        """Put the next ``count`` scenes into the pool; return their rows."""
        rows = []
        for _ in range(count):
            rows.append(self.next_scene % self.capacity)
            for pool, new in zip((self._images, self._ids, self._parents), next(self._stream), strict=True):
                pool[rows[-1]] = new.to(pool.device, non_blocking=True)
            self.next_scene += 1
        return rows

    def batch(self, images: int, reuse: int, size: int, rng: np.random.Generator, mean: Tensor, std: Tensor) -> Batch:
        """Return ``images`` pictures of ``size`` pixels, a share of 1 / ``reuse`` of them never seen before.

        Args:
            mean, std: [3, 1, 1] of the pixels, for normalisation.
        """
        rows = self._take(math.ceil(images / reuse))
        pool_size = min(self.next_scene, self.capacity)
        rows += rng.integers(0, pool_size, images - len(rows)).tolist()
        side = _window_side(rng, size)
        pixels, ids = [], []
        for row in rows:
            y, x = rng.integers(0, SIZE - side + 1, 2)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            window = (row, slice(y, y + side), slice(x, x + side))
            image, labels = (torch.rot90(pool[window], turns) for pool in (self._images, self._ids))
            pixels.append(image.flip(1) if mirrored else image)
            ids.append(labels.flip(1) if mirrored else labels)
        picture = torch.stack(pixels).permute(0, 3, 1, 2).float()
        labels = torch.stack(ids)
        if side != size:
            picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True, align_corners=False)
            labels = F.interpolate(labels[:, None], (size, size), mode="nearest-exact")[:, 0]
        normalised = (torch.stack([_recolor(rng, image) for image in picture]) - mean) / std
        for index in range(images):
            _pad(rng, normalised[index], labels[index])
        return Batch(normalised, labels, self._parents[rows])


def _window_side(rng: np.random.Generator, size: int) -> int:
    """Draw the side of the window of the scene that is shown: the whole one, or one up to twice enlarged or reduced."""
    if rng.random() < _NATIVE_SHARE:
        return size
    low = _SMALLEST_WINDOW * size
    return round(math.exp(rng.uniform(math.log(low), math.log(SIZE))))


def _recolor(rng: np.random.Generator, image: Tensor) -> Tensor:
    """Change [3, H, W] in 0..255 as another camera or light would."""
    if rng.random() < 0.1:
        image = 255 - image
    if rng.random() < 0.2:
        image = image[rng.permutation(3).tolist()]
    if rng.random() < 0.15:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    if rng.random() < 0.3:
        image = 255 * (image / 255).clamp(0, 1) ** math.exp(rng.normal(0, 0.35))
    if rng.random() < 0.3:
        image = (image - 128) * rng.uniform(0.5, 1.3) + 128 + rng.uniform(-25, 25)
    return image.clamp(0, 255)


def _pad(rng: np.random.Generator, pixels: Tensor, ids: Tensor) -> None:
    """Make some pictures a landscape or a portrait: zeros below or on the right, as the predictor pads."""
    if rng.random() < 0.4:
        edge = round(pixels.shape[-1] * rng.uniform(0.55, 1))
        if rng.random() < 0.5:
            pixels[:, edge:], ids[edge:] = 0, 0
        else:
            pixels[..., edge:], ids[:, edge:] = 0, 0
