"""``convert IN OUT``: weights from any known layout to the official one or that of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoint import LAYOUTS, read_checkpoint, write_checkpoint
from .options import DTYPES, Steps, add_traceback_option, file_name


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("convert", help="rewrite weights in another layout or file format")
    parser.add_argument("source", type=file_name, metavar="IN", help="file or folder in any known layout")
    parser.add_argument(
        "target", type=file_name, metavar="OUT", help=".safetensors, .pth, .pt, or a folder for transformers"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="official", help="names of the weights (default: official)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights in OUT (default: as in IN)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_traceback_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    target = Path(args.target)
    if target.exists() and not args.force:
        raise ValueError(f"{target} exists; --force replaces it")
    steps = Steps(total=2)
    try:
        with steps.step("read"):
            stored = read_checkpoint(args.source)
        with steps.step("write"):
            dtype = DTYPES[args.dtype] if args.dtype else None
            write_checkpoint(stored.state_dict, stored.config, target, args.layout, dtype, stored.metadata)
    finally:
        steps.close()
    print(f"wrote {target}: {stored.config.variant}, {args.layout} layout")
