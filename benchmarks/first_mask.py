"""``python -m benchmarks.first_mask``: make one mask and end; the process that a cold start is measured by."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import sam

from .measure import DTYPES

CLICK = (190.0, 160.0)


def image() -> np.ndarray:
    """Draw a disc on a gradient, 480 x 640."""
    y, x = np.ogrid[:480, :640]
    disc = (x - CLICK[0]) ** 2 + (y - CLICK[1]) ** 2 < 90**2
    grey = np.where(disc, 220, x * 100 // 640 + y * 60 // 480).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--kernels", required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    model = sam.load_model(device=args.device, dtype=DTYPES[args.dtype], kernels=args.kernels, compile=args.compile)
    predictor = sam.SamPredictor(model)
    predictor.set_image(image())
    _, _, low_res = predictor.predict(np.array([CLICK]), np.array([1]))
    np.save(args.out, low_res)


if __name__ == "__main__":
    main()
