"""The options of ``text``; as those of every command, they need no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..checks import path_of
from ..prompts import wire


def add_text(commands: Any, add_common: Callable[..., None]) -> None:
    """Add the parser of ``text``, with the options that all commands with a model have."""
    parser = commands.add_parser(
        "text",
        help="masks of what labels name in one image, with a detector",
        epilog="The detector is a folder as transformers saves it, of Grounding DINO, MM-Grounding-DINO, LLMDet or "
        "OWLv2, and needs the extra text. Nothing is downloaded.",
    )
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        type=parse_label,
        metavar="LABEL[=THRESHOLD]",
        help="what to find, as in --label cat --label 'traffic light=0.4'; may be repeated",
    )
    parser.add_argument("--detector", metavar="FOLDER", required=True, help="of the detector")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="N", help="of scores (default: 0.3)")
    parser.add_argument(
        "--negative", action="append", default=[], metavar="LABEL", help="drop what is rather this; may be repeated"
    )
    parser.add_argument(
        "--within", type=_parse_box, metavar=wire.BOX_TEXT, help="objects with their centre in this box"
    )
    parser.add_argument(
        "--nms-thresh", type=float, default=0.5, metavar="N", help="IoU of boxes of a label (default: 0.5)"
    )
    parser.add_argument("--agnostic-nms", action="store_true", help="also between boxes of different labels")
    parser.add_argument("--mask-nms-thresh", type=float, metavar="N", help="IoU of masks likewise (default: keep all)")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for the results (default: out)")
    parser.add_argument("--force", action="store_true", help="replace also what something else than this image made")
    add_common(parser, megapixels=True)
    parser.set_defaults(check=_check)


def parse_label(text: str) -> tuple[str, float | None]:
    """Return a label written as ``LABEL`` or ``LABEL=THRESHOLD``, and its threshold."""
    label, equals, number = text.rpartition("=")
    if not equals:
        return text, None
    try:
        return label, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL[=THRESHOLD]") from None


def _parse_box(text: str) -> list[float]:
    try:
        return wire.parse_box(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check(args: argparse.Namespace) -> None:
    if not args.label:
        raise ValueError("nothing to find: give --label LABEL")
    for name in ("detector", "out"):
        path_of(f"--{name}", getattr(args, name))
