"""``quantize IN OUT``: weights in 8 bits, written only where masks of given images stay what they were."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint import save_checkpoint
from ..fidelity import report
from ..images.read import read_image
from ..modeling.quantization import quantize
from .auto import find_images
from .model import model_from


def run(args: argparse.Namespace) -> int:
    """Quantise, measure and write; return 1 where a gate was not passed and nothing was written, else 0."""
    target = Path(args.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"cannot write to {target}: quantised weights are written as .safetensors")
    if target.exists() and not args.force:
        raise ValueError(f"{target} exists; --force replaces it")
    images = _read(args.images, args.max_images)
    model = model_from(args)
    calibration = None if args.calibration is None else list(_read(args.calibration, args.max_images).values())
    quantized = quantize(model, args.scheme, calibration)
    with tqdm(total=3 * len(images), desc="fidelity", disable=None, leave=False) as bar:
        result = report(model, quantized, images, progress=bar.update)
    folder = target.with_suffix(".fidelity")
    result.write(folder, images)
    print(result.to_markdown())
    if not result.passed and not args.force:
        failed = ", ".join(verdict.name for verdict in result.verdicts if not verdict.passed)
        print(f"{target} was not written: {failed} did not pass; see {folder}, or --force", file=sys.stderr)
        return 1
    about = {"sam_fidelity": "passed" if result.passed else "not passed"}
    save_checkpoint(quantized, target, metadata=about)
    print(f"wrote {target}, and the report to {folder}")
    return 0


def _read(source: str, most: int) -> dict[str, np.ndarray]:
    """Read the images of a folder, or the one image, by their names."""
    if most < 1:
        raise ValueError(f"--max-images must be at least 1, got {most}")
    found = find_images(Path(source))
    return {name: read_image(path) for path, name in list(found.items())[:most]}
