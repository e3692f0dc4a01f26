"""Pictures of masks and prompts on an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..prompts.prompt import Prompt

# Okabe and Ito's colours, distinct to colour-blind eyes too.
_COLORS = np.array(
    [[86, 180, 233], [230, 159, 0], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]],
    dtype=np.float32,
)
_FILL = 0.45  # weight of the mask's colour over the image


def draw_overlay(
    image: np.ndarray, masks: np.ndarray, prompts: Sequence[Prompt] = (), names: Sequence[str] = ()
) -> Image.Image:
    """Draw masks in colour with a contour, and prompts on top.

    Args:
        image: [H, W, 3] uint8.
        masks: [N, H, W] bool, later ones over earlier ones.
        prompts: their points (object: green disc, background: red disc) and boxes.
        names: of the first prompts, written into their boxes.
    """
    canvas = image.astype(np.float32)
    for index, mask in enumerate(masks):
        color = _COLORS[index % len(_COLORS)]
        canvas[mask] = (1 - _FILL) * canvas[mask] + _FILL * color
        canvas[_contour(mask)] = color
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    radius = max(3, round(min(image.shape[:2]) / 100))
    for prompt in prompts:
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box.tolist()
            corners = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            draw.rectangle(corners, outline=(255, 255, 255), width=max(2, radius // 2))
        if prompt.points is not None:
            for (x, y), label in zip(prompt.points.tolist(), prompt.labels.tolist(), strict=True):
                if label >= 0:
                    fill = (0, 200, 0) if label else (220, 0, 0)
                    disc = (x - radius, y - radius, x + radius, y + radius)
                    draw.ellipse(disc, fill=fill, outline=(255, 255, 255), width=2)
    font = ImageFont.load_default(max(10, 4 * radius)) if names else None
    for prompt, name in zip(prompts, names, strict=False):
        if prompt.box is not None:
            place = (prompt.box[0] + radius, prompt.box[1] + radius)
            draw.text(place, name, fill=(255, 255, 255), font=font, stroke_width=2, stroke_fill=(0, 0, 0))
    return picture


def _contour(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of the mask within 2 px of its edge; the image's border is not an edge."""
    inside = mask
    for _ in range(2):
        padded = np.pad(inside, 1, mode="edge")
        inside = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
