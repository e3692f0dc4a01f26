"""Noise, patterns and paint for drawn scenes: small arrays of fp32, about zero mean and unit amplitude."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

Array = np.ndarray


def coordinates(height: int, width: int) -> tuple[Array, Array]:
    """Return rows [height, 1] and columns [1, width] in pixels, which broadcast to a patch."""
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Draw Gaussian noise that changes over ``cell`` pixels, [height, width]."""
    coarse = (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1))
    grid = Image.fromarray(rng.standard_normal(coarse, dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR))


def fractal_noise(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw octaves of noise whose amplitude falls with the frequency, as in photographs."""
    persistence = rng.uniform(0.4, 0.8)
    cell, amplitude, total = max(height, width) / 2, 1.0, np.zeros((height, width), np.float32)
    energy = 0.0
    while cell >= 3:
        total += amplitude * smooth_noise(rng, height, width, cell)
        energy += amplitude**2
        cell, amplitude = cell / 2.3, amplitude * persistence
    return total / math.sqrt(max(energy, 1.0))


def stripes(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw waves or bars of one direction, bent a little."""
    y, x = coordinates(height, width)
    angle, period = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(5), math.log(60)))
    phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period)
    if rng.random() < 0.5:
        phase = phase + rng.uniform(0.3, 1.5) * smooth_noise(rng, height, width, max(height, width) / 3)
    wave = np.sin(phase)
    return np.sign(wave) if rng.random() < 0.4 else wave


def checks(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw a lattice of spots or of squares."""
    y, x = coordinates(height, width)
    angle, period = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(8), math.log(60)))
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    wave = np.sin(u * (2 * math.pi / period)) * np.sin(v * (2 * math.pi / period))
    return np.sign(wave) if rng.random() < 0.5 else 1.5 * wave


def gradient(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw a ramp across the patch."""
    y, x = coordinates(height, width)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x - width / 2) * math.cos(angle) + (y - height / 2) * math.sin(angle)
    return 2 * ramp / max(height, width)


def pattern(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw one of the textures, [height, width]."""
    kind = rng.choice(6, p=[0.22, 0.16, 0.22, 0.16, 0.1, 0.14])
    if kind == 0:
        return smooth_noise(rng, height, width, math.exp(rng.uniform(math.log(12), math.log(120))))
    if kind == 1:
        return smooth_noise(rng, height, width, rng.uniform(2, 8))
    if kind == 2:
        return fractal_noise(rng, height, width)
    if kind == 3:
        return stripes(rng, height, width)
    if kind == 4:
        return checks(rng, height, width)
    return gradient(rng, height, width)


def random_color(rng: np.random.Generator) -> Array:
    """Draw a color [3] in 0..255, often dull."""
    color = rng.uniform(15, 240, 3)
    if rng.random() < 0.45:
        color = color.mean() + rng.uniform(0.05, 0.5) * (color - color.mean())
    return color.astype(np.float32)


def paint(rng: np.random.Generator, height: int, width: int, color: Array, amplitude: float) -> Array:
    """Draw a textured surface [height, width, 3] (or [1, 1, 3] where it is plain) around ``color``."""
    surface = color[None, None]
    layers = rng.choice(3, p=[0.2, 0.55, 0.25])
    for _ in range(layers):
        direction = np.ones(3, np.float32)
        if rng.random() < 0.35:  # the texture changes the hue, not the brightness alone
            direction = rng.normal(0, 1, 3).astype(np.float32)
            direction *= math.sqrt(3) / max(float(np.linalg.norm(direction)), 1e-3)
        surface = surface + (amplitude / layers) * pattern(rng, height, width)[..., None] * direction
    return surface.astype(np.float32)
