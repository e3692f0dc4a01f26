"""``convert IN OUT``: weights from any known layout to the official one or that of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint import read_checkpoint, write_checkpoint
from .model import DTYPES
from .steps import Steps


def run(args: argparse.Namespace) -> None:
    """Read weights in any known layout and write them in another."""
    target = Path(args.target)
    if target.exists() and not args.force:
        raise ValueError(f"{target} exists; --force replaces it")
    steps = Steps(total=2)
    try:
        with steps.step("read"):
            stored = read_checkpoint(args.source)
        with steps.step("write"):
            dtype = DTYPES[args.dtype] if args.dtype else None
            about = stored.metadata, stored.quantization
            write_checkpoint(stored.state_dict, stored.config, target, args.layout, dtype, *about)
    finally:
        steps.close()
    print(f"wrote {target}: {stored.config.variant}, {args.layout} layout")
