"""Outlines of drawn objects, and their antialiased coverage inside a bounding box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SOLID = ("ellipse", "circle", "polygon", "star", "blob", "blob", "rectangle", "lobes", "sector")
HOLED = ("ring", "frame")
THIN = ("bar", "curve")
_SUPERSAMPLING = 2


@dataclass(frozen=True)
class Outline:
    """Hold a shape in pixels: polygons filled one after the other, or a line.

    Attributes:
        rings: [K, 2] polygons (x, y); the first is filled, later ones are cut out unless ``union``.
        union: later rings are added instead of cut out.
        stroke: width of a line along the only ring, in pixels; 0 fills.
    """

    rings: tuple[np.ndarray, ...]
    union: bool = False
    stroke: float = 0.0

    def bounds(self) -> tuple[float, float, float, float]:
        points = np.concatenate(self.rings)
        margin = self.stroke / 2 + 2
        low, high = points.min(0) - margin, points.max(0) + margin
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def draw_outline(rng: np.random.Generator, kind: str, center: tuple[float, float], radius: float) -> Outline:
    """Draw a shape of ``kind`` about ``center``, about ``radius`` pixels to either side, turned at random."""
    angle, aspect = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 1.0)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

    def placed(points: np.ndarray) -> np.ndarray:
        return points @ turn * radius + np.array(center)

    around = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    circle = np.stack([np.cos(around), np.sin(around)], 1)
    if kind == "circle":
        return Outline((placed(circle),))
    if kind == "ellipse":
        return Outline((placed(circle * [1, aspect]),))
    if kind == "polygon":
        corners = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
        reach = rng.uniform(0.65, 1.1, len(corners))
        return Outline((placed(np.stack([np.cos(corners), np.sin(corners)], 1) * reach[:, None]),))
    if kind == "star":
        corners = np.linspace(0, 2 * math.pi, 2 * rng.integers(4, 10), endpoint=False)
        reach = np.where(np.arange(len(corners)) % 2, 1.0, rng.uniform(0.4, 0.75))
        return Outline((placed(np.stack([np.cos(corners), np.sin(corners)], 1) * reach[:, None]),))
    if kind == "blob":
        return Outline((placed(circle * _wobble(rng, around)[:, None] * [1, max(aspect, 0.5)]),))
    if kind == "rectangle":
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, aspect]
        return Outline((placed(corners),))
    if kind == "lobes":  # two or three bodies that make one object
        bodies = []
        for _ in range(rng.integers(2, 4)):
            size, shift = rng.uniform(0.35, 0.7), rng.uniform(-0.45, 0.45, 2)
            bodies.append(placed(circle * size * [1, rng.uniform(0.5, 1)] + shift))
        return Outline(tuple(bodies), union=True)
    if kind == "sector":
        part = np.linspace(0, rng.uniform(2.4, 5.2), 48)
        arc = np.stack([np.cos(part), np.sin(part)], 1)
        return Outline((placed(np.vstack([arc, [[0, 0]]]) if rng.random() < 0.5 else arc),))
    if kind == "ring":
        return Outline((placed(circle * [1, aspect]), placed(circle * [1, aspect] * rng.uniform(0.4, 0.8))))
    if kind == "frame":
        outer = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [1, aspect]
        shift = rng.uniform(-0.15, 0.15, 2) * aspect
        return Outline((placed(outer), placed(circle * aspect * rng.uniform(0.4, 0.75) + shift)))
    if kind == "bar":
        half = rng.uniform(0.03, 0.13)
        return Outline((placed(np.array([[-1, -half], [1, -half], [1, half], [-1, half]]) * 1.4),))
    if kind == "curve":
        knots = np.stack([np.linspace(-1.3, 1.3, 6), np.cumsum(rng.normal(0, 0.4, 6))], 1)
        at = np.linspace(0, 5, 48)
        line = np.stack([np.interp(at, np.arange(6), knots[:, axis]) for axis in (0, 1)], 1)
        smooth = np.stack([_moving_average(line[:, axis], 9) for axis in (0, 1)], 1)
        return Outline((placed(smooth),), stroke=max(3.0, radius * rng.uniform(0.08, 0.3)))
    raise ValueError(f"no such shape: {kind!r}")


def coverage(outline: Outline, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the share of each pixel of ``box`` (x0, y0, x1, y1) that the shape covers: [height, width] fp32."""
    x0, y0, x1, y1 = box
    scale = _SUPERSAMPLING
    picture = Image.new("L", ((x1 - x0) * scale, (y1 - y0) * scale), 0)
    draw = ImageDraw.Draw(picture)
    for index, ring in enumerate(outline.rings):
        points = [(float(x), float(y)) for x, y in (ring - [x0, y0]) * scale]
        if outline.stroke:
            draw.line(points, fill=255, width=max(1, round(outline.stroke * scale)), joint="curve")
        else:
            draw.polygon(points, fill=255 if index == 0 or outline.union else 0)
    return np.asarray(picture.reduce(scale), np.float32) / 255


def _wobble(rng: np.random.Generator, around: np.ndarray) -> np.ndarray:
    reach = np.ones_like(around)
    for frequency in range(2, 7):
        reach += rng.normal(0, 0.22 / frequency**0.6) * np.cos(frequency * around + rng.uniform(0, 2 * math.pi))
    return reach.clip(0.3, 1.8)


def _moving_average(values: np.ndarray, length: int) -> np.ndarray:
    padded = np.pad(values, length // 2, mode="edge")
    return np.convolve(padded, np.full(length, 1 / length), "valid")
