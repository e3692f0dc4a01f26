"""Scenes drawn procedurally, with the exact visible mask of every object and of every part of one.

Everything is drawn inside bounding boxes, at the resolution of the picture: a small object costs next to nothing.
A scene is a function of (split, seed, index) alone, so scenes can be drawn by any process in any order.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .shapes import HOLED, SOLID, THIN, Outline, coverage, draw_outline
from .textures import coordinates, fractal_noise, paint, random_color, smooth_noise

SIZE = 512  # pixels a side
MAX_OBJECTS = 250  # ids are bytes, and 0 is the ground
_SMALLEST_OBJECT = 40  # covered pixels below which nothing is labelled
_SPLITS = ("training", "held-out")


@dataclass(frozen=True)
class Scene:
    """Hold a picture and the objects in it.

    Attributes:
        image: [H, W, 3] uint8.
        ids: [H, W] uint8, the object or part that is visible in each pixel, 0 for none.
        parents: [256] uint8, for the id of a part the object it belongs to, 0 otherwise.
    """

    image: np.ndarray
    ids: np.ndarray
    parents: np.ndarray

    def masks(self, min_pixels: int) -> np.ndarray:
        """Return visible masks [N, H, W] of the objects (parts included) and of the parts of ``min_pixels`` or more."""
        owners = self.parents[self.ids]
        masks = [(self.ids == i) | (owners == i) for i in range(1, int(self.ids.max(initial=0)) + 1)]
        visible = [mask for mask in masks if mask.sum() >= min_pixels]
        return np.stack(visible) if visible else np.zeros((0, *self.ids.shape), bool)


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """Return the generator of one scene; the split is part of the key, so that splits share no seeds."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SPLITS.index(split), index)))


def training_scene(seed: int, index: int, size: int = SIZE) -> Scene:
    return draw_scene(scene_rng("training", seed, index), size)


def held_out_scene(index: int, size: int = SIZE) -> Scene:
    """Draw scene ``index`` of the one set that no training run draws, whatever its seed."""
    return draw_scene(scene_rng("held-out", 0, index), size)


def draw_scene(rng: np.random.Generator, size: int = SIZE) -> Scene:
    """Draw a random scene of ``size`` x ``size`` pixels."""
    canvas = _Canvas(rng, size)
    layout = rng.random()
    if layout < 0.2:
        _draw_repeated(canvas)
    elif layout < 0.45:
        _draw_large(canvas)
    elif layout < 0.57:
        _draw_mosaic(canvas)
    else:
        _draw_scattered(canvas)
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 4)):  # thin things across all others
            canvas.add(canvas.outline(THIN, size * rng.uniform(0.12, 0.35)))
    return Scene(_photograph(rng, canvas.image), canvas.ids, canvas.parents)


# Layouts --------------------------------------------------------------------------------------------------


def _draw_scattered(canvas: _Canvas) -> None:
    rng = canvas.rng
    radii = [canvas.radius(0.012, 0.3) for _ in range(rng.integers(2, 15))]
    _stack(canvas, radii)


def _draw_large(canvas: _Canvas) -> None:
    rng = canvas.rng
    radii = [canvas.radius(0.14, 0.42) for _ in range(rng.integers(1, 5))]
    radii += [canvas.radius(0.012, 0.12) for _ in range(rng.integers(0, 8))]
    _stack(canvas, radii)


def _stack(canvas: _Canvas, radii: list[float]) -> None:
    """Draw objects on top of one another, larger ones mostly below smaller ones."""
    for radius in sorted(radii, key=lambda radius: -radius * canvas.rng.uniform(0.5, 1.5)):
        canvas.add(canvas.outline(_any_kind(canvas.rng), radius))


def _draw_repeated(canvas: _Canvas) -> None:
    """Draw a group of things of one kind, on a jittered grid or in heaps, on top of a few others."""
    rng, size = canvas.rng, canvas.size
    for _ in range(rng.integers(0, 3)):
        canvas.add(canvas.outline(_any_kind(rng), canvas.radius(0.1, 0.35)))
    kind = str(rng.choice(SOLID + HOLED))
    radius, color, amplitude = canvas.radius(0.03, 0.12), random_color(rng), rng.uniform(0, 35)
    spread = rng.uniform(1.5, 3.0) * radius
    corner = rng.uniform(-0.3, 0.4, 2) * size
    extent = rng.uniform(0.5, 1.2, 2) * size
    for y in np.arange(corner[1], min(corner[1] + extent[1], size), spread):
        for x in np.arange(corner[0], min(corner[0] + extent[0], size), spread):
            if rng.random() < 0.15 or canvas.count > 48:
                continue
            place = (x + rng.normal(0, 0.12) * spread, y + rng.normal(0, 0.12) * spread)
            outline = draw_outline(rng, kind, place, radius * rng.uniform(0.75, 1.1))
            shade = (color + rng.normal(0, 10)).clip(0, 255).astype(np.float32)
            canvas.add(outline, shade, amplitude)


def _draw_mosaic(canvas: _Canvas) -> None:
    """Draw regions that share borders, as fields or rooms do; some stay unlabelled."""
    rng, size = canvas.rng, canvas.size
    y, x = coordinates(size, size)
    bend = size * rng.uniform(0.01, 0.06)
    u, v = (axis + bend * smooth_noise(rng, size, size, size * rng.uniform(0.1, 0.4)) for axis in (x, y))
    nearest, regions = np.full((size, size), np.inf, np.float32), np.zeros((size, size), np.int64)
    count = int(rng.integers(3, 12))
    for index in range(count):
        place, stretch = rng.uniform(0, size, 2), rng.uniform(0.6, 1.6, 2)
        distance = ((u - place[0]) * stretch[0]) ** 2 + ((v - place[1]) * stretch[1]) ** 2
        closer = distance < nearest
        nearest[closer], regions[closer] = distance[closer], index
    for index in range(count):
        rows, columns = np.nonzero((regions == index).any(1))[0], np.nonzero((regions == index).any(0))[0]
        if len(rows):
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            alpha = (regions[box[1] : box[3], box[0] : box[2]] == index).astype(np.float32)
            canvas.blend(box, alpha, random_color(rng), rng.uniform(0, 35), labelled=rng.random() < 0.85)
    _stack(canvas, [canvas.radius(0.015, 0.12) for _ in range(rng.integers(0, 7))])


def _any_kind(rng: np.random.Generator) -> tuple[str, ...]:
    return (SOLID, HOLED, THIN)[rng.choice(3, p=[0.8, 0.1, 0.1])]


# Objects --------------------------------------------------------------------------------------------------


class _Canvas:
    """Hold a picture in progress, its labels, and the objects put on it so far."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size, self.count = rng, size, 0
        self.image = np.empty((size, size, 3), np.float32)
        self.image[:] = paint(rng, size, size, random_color(rng), rng.uniform(0, 35))
        self.ids = np.zeros((size, size), np.uint8)
        self.parents = np.zeros(256, np.uint8)
        self.part_rate = rng.uniform(0, 0.6)

    def radius(self, low: float, high: float) -> float:
        """Draw a radius, log-uniform between two shares of the picture's side, in pixels."""
        return self.size * math.exp(self.rng.uniform(math.log(low), math.log(high)))

    def outline(self, kinds: tuple[str, ...], radius: float) -> Outline:
        """Draw a shape anywhere; a large one keeps its centre inside the picture."""
        margin = min(radius / self.size, 0.3)
        x, y = self.rng.uniform(margin / 2, 1 - margin / 2, 2) * self.size
        return draw_outline(self.rng, str(self.rng.choice(kinds)), (x, y), radius)

    def add(self, outline: Outline, color: np.ndarray | None = None, amplitude: float | None = None) -> None:
        """Put an object on top, perhaps with a shadow below it and parts on it."""
        rng = self.rng
        box = self._clip(outline)
        if box is None or self.count >= MAX_OBJECTS:
            return
        alpha = coverage(outline, box)
        if (alpha > 0.5).sum() < _SMALLEST_OBJECT:
            return
        if rng.random() < 0.2:
            self._cast_shadow(box, alpha)
        color = random_color(rng) if color is None else color
        amplitude = rng.uniform(0, 40) if amplitude is None else amplitude
        me = self.blend(box, alpha, color, amplitude, labelled=True)
        if min(alpha.shape) > 0.04 * self.size and rng.random() < self.part_rate:
            for _ in range(rng.integers(1, 4)):
                self._add_part(box, alpha, color, me)

    def blend(
        self, box: tuple[int, int, int, int], alpha: np.ndarray, color: np.ndarray, amplitude: float, labelled: bool
    ) -> int:
        """Paint ``alpha`` [h, w] of ``box`` with a shaded texture; returns the new id, 0 where there is none."""
        x0, y0, x1, y1 = box
        height, width = alpha.shape
        surface = paint(self.rng, height, width, color, amplitude) + self._shading(alpha)
        below = self.image[y0:y1, x0:x1]
        below += alpha[..., None] * (surface - below)
        if not labelled or self.count >= MAX_OBJECTS:
            self.ids[y0:y1, x0:x1][alpha > 0.5] = 0
            return 0
        self.count += 1
        self.ids[y0:y1, x0:x1][alpha > 0.5] = self.count
        return self.count

    def _add_part(self, box: tuple[int, int, int, int], body: np.ndarray, color: np.ndarray, owner: int) -> None:
        """Draw a detail inside the object: a part with an id of its own, or a mark that belongs to it."""
        rng, (x0, y0, x1, y1) = self.rng, box
        reach = min(body.shape) / 2
        place = (rng.uniform(0.25, 0.75) * (x1 - x0) + x0, rng.uniform(0.25, 0.75) * (y1 - y0) + y0)
        outline = draw_outline(rng, str(rng.choice(SOLID + HOLED + THIN)), place, reach * rng.uniform(0.2, 0.6))
        clipped = self._clip(outline)
        if clipped is None:
            return
        left, top, right, bottom = (max(clipped[0], x0), max(clipped[1], y0), min(clipped[2], x1), min(clipped[3], y1))
        if right - left < 3 or bottom - top < 3:
            return
        inner = (left, top, right, bottom)
        alpha = coverage(outline, inner) * body[top - y0 : bottom - y0, left - x0 : right - x0]
        visible = alpha > 0.5
        if visible.sum() < _SMALLEST_OBJECT:
            return
        if rng.random() < 0.5 and self.count < MAX_OBJECTS:
            part = self.blend(inner, alpha, random_color(rng), rng.uniform(0, 30), labelled=True)
            self.parents[part] = owner
        else:
            before = self.ids[top:bottom, left:right].copy()
            tint = (color + rng.uniform(-60, 60)).clip(0, 255).astype(np.float32)
            self.blend(inner, alpha * rng.uniform(0.4, 0.9), tint, rng.uniform(0, 20), labelled=False)
            self.ids[top:bottom, left:right] = before

    def _shading(self, alpha: np.ndarray) -> np.ndarray:
        """Draw the light on a body, [h, w, 1] or zero: a side that is lit, a ball, or a rim."""
        rng, (height, width) = self.rng, alpha.shape
        kind = rng.choice(4, p=[0.4, 0.25, 0.2, 0.15])
        if kind == 0:
            return np.zeros((1, 1, 1), np.float32)
        y, x = coordinates(height, width)
        v, u = 2 * y / height - 1, 2 * x / width - 1
        if kind == 1:
            angle = rng.uniform(0, 2 * math.pi)
            light = rng.uniform(10, 45) * (u * math.cos(angle) + v * math.sin(angle))
        elif kind == 2:
            shift = rng.uniform(-0.4, 0.4, 2)
            light = -rng.uniform(15, 60) * ((u - shift[0]) ** 2 + (v - shift[1]) ** 2).clip(0, 2)
        else:
            solid = Image.fromarray((alpha * 255).astype(np.uint8))
            inner = solid.filter(ImageFilter.GaussianBlur(max(1.0, min(alpha.shape) * rng.uniform(0.02, 0.08))))
            light = (np.asarray(inner, np.float32) / 255 - 1) * rng.uniform(-90, 90)
        return light[..., None].astype(np.float32)

    def _cast_shadow(self, box: tuple[int, int, int, int], alpha: np.ndarray) -> None:
        rng = self.rng
        dx, dy = (int(d) for d in rng.integers(-round(self.size / 40), round(self.size / 40) + 1, 2))
        x0, y0 = max(box[0] + dx, 0), max(box[1] + dy, 0)
        x1, y1 = min(box[2] + dx, self.size), min(box[3] + dy, self.size)
        if x1 <= x0 or y1 <= y0:
            return
        moved = alpha[y0 - box[1] - dy : y1 - box[1] - dy, x0 - box[0] - dx : x1 - box[0] - dx]
        self.image[y0:y1, x0:x1] *= 1 - rng.uniform(0.15, 0.5) * moved[..., None]

    def _clip(self, outline: Outline) -> tuple[int, int, int, int] | None:
        left, top, right, bottom = outline.bounds()
        box = (max(math.floor(left), 0), max(math.floor(top), 0))
        end = (min(math.ceil(right), self.size), min(math.ceil(bottom), self.size))
        return (*box, *end) if end[0] - box[0] >= 3 and end[1] - box[1] >= 3 else None


# The camera -----------------------------------------------------------------------------------------------


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light the whole scene, then do to it what a camera does: [H, W, 3] fp32 -> uint8."""
    size = image.shape[0]
    light = 1 + rng.uniform(0, 0.25) * smooth_noise(rng, size, size, size * rng.uniform(0.2, 0.5))
    if rng.random() < 0.15:  # the edge of a shadow from outside the picture
        outline = draw_outline(rng, "polygon", tuple(rng.uniform(0, size, 2)), size * rng.uniform(0.3, 0.7))
        light = light * (1 + rng.uniform(-0.45, 0.35) * coverage(outline, (0, 0, size, size)))
    image = image * light[..., None]
    if rng.random() < 0.25:
        image = image + rng.uniform(3, 18) * fractal_noise(rng, size, size)[..., None]
    if rng.random() < 0.3:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    mean = image.mean()
    image = (image - mean) * rng.uniform(0.55, 1.15) + mean + rng.uniform(-25, 25)
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 2.5)))
    if rng.random() < 0.55:
        cell = math.exp(rng.uniform(0, math.log(3)))
        channels = 1 if rng.random() < 0.5 else 3
        grain = [smooth_noise(rng, size, size, cell) for _ in range(channels)]
        noisy = np.asarray(picture, np.float32) + rng.uniform(1, 14) * np.stack(grain, 2)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(35, 92)))
        picture = Image.open(file)
    return np.array(picture)
