"""``verify [CHECKPOINT]``: hold every operation, on these weights and this machine, against plain PyTorch in fp64."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..images.read import read_image
from ..modeling.promptable import PromptableModel
from ..system.atomic_write import write_atomically
from ..system.products import describe_products
from ..verify import Check, verify
from ..verify_video import Drift, drift_frames, verify_video
from .model import model_from


def run(args: argparse.Namespace) -> int:
    """Run all checks, print one line per check; return 1 if some are over budget, else 0."""
    if args.frames is not None and not args.video:
        raise ValueError("--frames is of --video: images have no drift")
    model = model_from(args)
    image = None if args.image is None else read_image(args.image)
    print(describe(model))
    print(f"fastest products here: {describe_products(model.device)}")
    checks: list[Check] = []
    if args.video:
        frames = drift_frames(model) if args.frames is None else args.frames
        print(f"drift is measured over {frames} frames of {model.image_size} px")
    to_come = verify_video(model, drift=args.frames) if args.video else verify(model, image)
    with tqdm(unit=" checks", disable=None, leave=False) as bar:
        for check in to_come:
            checks.append(check)
            for line in to_lines(check):
                bar.write(line, file=sys.stdout)
            bar.update()
    failed = [check for check in checks if not check.passed]
    if args.json:
        document = {"model": describe(model), "passed": not failed, "checks": [check.to_dict() for check in checks]}
        with write_atomically(args.json) as partial:
            Path(partial).write_text(json.dumps(document, indent=1) + "\n")
    if failed:
        names = ", ".join(dict.fromkeys(check.operation for check in failed))
        print(f"{len(failed)} of {len(checks)} checks over budget: {names}", file=sys.stderr)
        return 1
    print(f"all {len(checks)} checks within budget")
    return 0


def describe(model: PromptableModel) -> str:
    """Return one line on the model, its weights and the machine."""
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    dtype, kernels = str(model.dtype).removeprefix("torch."), model.resolved_kernels
    return f"{model.name} {model.model_hash}, {dtype}, kernels {kernels}, {where}, torch {torch.__version__}"


def to_lines(check: Check) -> list[str]:
    """Return a line on a check, its error, noise, budget and verdict; of drift, one on each frame before it."""
    verdict = "ok" if check.passed else "OVER BUDGET"
    masks = "" if check.mask_iou is None else f", mask IoU {check.mask_iou:.4f}"
    frames: list[str] = []
    if isinstance(check, Drift):
        frames = [
            f"  frame {number:<2} error {frame.error:.1e}, plain PyTorch {frame.noise:.1e}, "
            f"mask IoU {frame.mask_iou:.4f}, objects seen {frame.seen}"
            for number, frame in enumerate(check.frames, 1)
        ]
        masks += f", error times {check.growth:.2f} a frame"
    return [
        *frames,
        f"{check.operation + ', ' + check.case:<50} error {check.error:.1e}, plain PyTorch {check.noise:.1e}, "
        f"budget {check.budget:.1e}{masks}: {verdict}",
    ]
