"""The options of every command. Nothing here imports torch: a command's work is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ..amg.defaults import NANO_THRESHOLDS, SAM2_THRESHOLDS, SAM_THRESHOLDS
from ..checks import path_of
from ..images.read import MAX_MEGAPIXELS
from ..masks.formats import FORMATS, MaskFormat
from ..prompts import wire
from .run import DESCRIPTION as RUN_DESCRIPTION
from .serve import wait_passively
from .text_options import add_text

# As ``fastsam_kernels.KERNELS`` and ``SCHEMES``, ``sam.checkpoint.LAYOUTS``, and the dtypes of ``.model``.
# These modules import torch.
KERNELS = ("auto", "reference", "torch", "triton")
LAYOUTS = ("official", "transformers")
DTYPES = ("fp32", "fp16", "bf16")
SCHEMES = ("int8", "fp8")

AUTOMATIC_SETTINGS: tuple[tuple[str, type, Any, str], ...] = (
    ("points_per_side", int, 32, "clicks along a side of the grid"),
    ("points_per_batch", int, 64, "clicks decoded together"),
    ("pred_iou_thresh", float, SAM_THRESHOLDS["pred_iou_thresh"], "drop masks whose predicted IoU is at or below this"),
    (
        "stability_score_thresh",
        float,
        SAM_THRESHOLDS["stability_score_thresh"],
        "drop masks whose stability is below this",
    ),
    ("stability_score_offset", float, 1.0, "how far stability moves the threshold, in logits"),
    ("box_nms_thresh", float, 0.7, "IoU of boxes above which the worse of two masks is dropped"),
    ("crop_n_layers", int, 0, "layers of crops to look at besides the whole image"),
    ("crop_nms_thresh", float, 0.7, "as --box-nms-thresh, between crops"),
    ("crop_overlap_ratio", float, 512 / 1500, "overlap of crops, as a share of the shorter side"),
    ("crop_n_points_downscale_factor", int, 1, "how much thinner the grid is per layer"),
    ("min_mask_region_area", int, 0, "fill holes and drop islands smaller than this, in pixels"),
)


def mask_formats() -> dict[str, MaskFormat | None]:
    """Return what ``--format`` takes: None, a PNG per mask, or an entry of the table of formats."""
    others = {name: form for name, form in FORMATS.items() if name not in ("rle", "png")}
    return {"png": None, "coco": FORMATS["rle"], "labels": FORMATS["png"], **others}


def add_commands(commands: Any) -> None:
    """Add the parser of every command."""
    adders = (add_segment, add_auto, add_track, add_serve, add_info, add_verify)
    for add in (*adders, add_convert, add_quantize, add_demo, add_run):
        add(commands)
    add_text(commands, _add_common)


def add_segment(commands: Any) -> None:
    """Add the parser of ``segment``."""
    parser = commands.add_parser("segment", help="masks for clicks and boxes on one image")
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument(
        "--point",
        action="append",
        default=[],
        type=_argument(wire.parse_point),
        metavar=wire.POINT_TEXT,
        help="a click in pixels; label 1 (default) is the object, 0 the background; may be repeated",
    )
    parser.add_argument("--box", type=_argument(wire.parse_box), metavar=wire.BOX_TEXT, help="a box in pixels")
    parser.add_argument("--single", action="store_true", help="one mask in place of three alternatives")
    parser.add_argument(
        "--out",
        type=file_name,
        default="out",
        metavar="DIR",
        help="folder for the results (default: out); those of this image's last run are replaced",
    )
    _add_format(parser, "png: one PNG per mask, with run lengths in the JSON")
    parser.add_argument("--force", action="store_true", help="replace also what something else than this image made")
    _add_common(parser, megapixels=True)
    parser.set_defaults(check=_check_segment)


def _check_segment(args: argparse.Namespace) -> None:
    if not args.point and args.box is None:
        raise ValueError("nothing to segment: give --point X,Y or --box X0,Y0,X1,Y1")


def add_auto(commands: Any) -> None:
    """Add the parser of ``auto``."""
    parser = commands.add_parser(
        "auto",
        help="masks of everything in an image or a folder of images",
        epilog="The embedded nano rates its own masks low: with SAM's thresholds next to nothing of them is left. So "
        "other defaults suit it, which are named beside SAM's.",
    )
    parser.add_argument("source", type=file_name, metavar="IMAGE_OR_FOLDER", help="a photograph, or a folder of them")
    parser.add_argument(
        "--out",
        "--output",
        type=file_name,
        default="out",
        metavar="DIR",
        help="folder for the results (default: out)",
    )
    _add_format(parser, "png: one folder per image, with a PNG per mask and metadata.csv")
    parser.add_argument("--convert-to-rle", action="store_const", dest="format", const="coco", help="as --format coco")
    parser.add_argument("--overlay", action="store_true", help="also draw the masks on the image")
    parser.add_argument("--force", action="store_true", help="replace results that are there, whatever made them")
    parser.add_argument("--max-memory", metavar="SIZE", help="for clicks and masks, such as 500MB (default: about 2GB)")
    settings = parser.add_argument_group("automatic masks")
    for name, kind, default, purpose in AUTOMATIC_SETTINGS:
        others = {"the embedded nano": NANO_THRESHOLDS.get(name, default), "SAM 2": SAM2_THRESHOLDS.get(name, default)}
        differing = [f"{value:g} for {model}" for model, value in others.items() if value != default]
        suited = "; " + ", ".join(differing) if differing else ""
        option = f"--{name.replace('_', '-')}"
        settings.add_argument(option, type=kind, metavar="N", help=f"{purpose} (default: {default:.3g}{suited})")
    _add_common(parser, megapixels=True)


class Place(NamedTuple):
    """An object and the frame of a prompt."""

    object: str
    frame: int


_PLACE_TEXT = "[OBJECT@FRAME:]"


def _placed(parse: Callable[[str], Any]) -> Callable[[str], tuple[Place, Any]]:
    """Return a parser of what ``parse`` takes with an object, a frame or both before it: object 1 on frame 0."""

    def placed(text: str) -> tuple[Place, Any]:
        before, _, rest = text.rpartition(":")
        name, at, frame = before.partition("@")
        if at and not frame.isdecimal():
            raise ValueError(f"{text!r} begins with no {_PLACE_TEXT}")
        return Place(name or "1", int(frame or 0)), parse(rest)

    return placed


def _parse_mask(text: str) -> tuple[int, str]:
    frame, colon, path = text[1:].partition(":") if text.startswith("@") else ("0", ":", text)
    if not colon or not frame.isdecimal() or not path:
        raise ValueError(f"{text!r} is not [@FRAME:]FILE")
    return int(frame), path


def add_track(commands: Any) -> None:
    """Add the parser of ``track``."""
    parser = commands.add_parser(
        "track",
        help="masks of objects through a video, with SAM 2",
        epilog="A run that was ended goes on with the same command from the last saved state. The embedded model does "
        "not track: --checkpoint takes weights of SAM 2.",
    )
    parser.add_argument("video", type=file_name, metavar="VIDEO", help="a video, or a folder of JPEG files")
    prompts: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
        (
            "--point",
            _placed(wire.parse_point),
            _PLACE_TEXT + wire.POINT_TEXT,
            "a click in pixels, on object 1 and frame 0 unless said otherwise, as in cat@12:30,40; may be repeated",
        ),
        ("--box", _placed(wire.parse_box), _PLACE_TEXT + wire.BOX_TEXT, "a box in pixels, likewise; may be repeated"),
        (
            "--mask",
            _parse_mask,
            "[@FRAME:]FILE",
            "a picture of labels, as DAVIS has them: each value but 0 is the mask of the object of that name",
        ),
    )
    for option, parse, metavar, text in prompts:
        parser.add_argument(option, action="append", default=[], type=_argument(parse), metavar=metavar, help=text)
    parser.add_argument("--out", type=file_name, default="out", metavar="DIR", help="folder of results (default: out)")
    parser.add_argument("--overlay", action="store_true", help="also draw the masks on the frames, as overlay.gif")
    for option, default, text in (
        ("--fill-holes", 8, "fill holes of up to N low-resolution pixels"),
        ("--save-every", 25, "save the state every N frames"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    _add_common(parser)
    parser.set_defaults(check=_check_track)


def _check_track(args: argparse.Namespace) -> None:
    if not (args.point or args.box or args.mask):
        raise ValueError("nothing to track: give --point X,Y, --box X0,Y0,X1,Y1 or --mask FILE")
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {args.save_every}")


def add_serve(commands: Any) -> None:
    """Add the parser of ``serve``."""
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP, with a page to click on",
        epilog="Replicas that serve each other's handles share the variable SAM_HANDLE_SECRET, 16 to 64 bytes.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--token", help="what clients must show (default: the variable SAM_TOKEN, if it is set)")
    parser.add_argument("--insecure", action="store_true", help="let other machines in without a token")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="prompts decoded together (default: 16)")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait (default: 256)")
    parser.add_argument(
        "--max-sessions", type=int, default=16, metavar="N", help="videos tracked at a time, by SAM 2 (default: 16)"
    )
    parser.add_argument("--deadline", type=float, default=30.0, metavar="S", help="seconds per request (default: 30)")
    parser.add_argument(
        "--cache-mb", type=int, default=1024, metavar="MB", help="of image embeddings kept (default: 1024)"
    )
    _add_common(parser)
    parser.set_defaults(prepare=wait_passively)


def add_info(commands: Any) -> None:
    """Add the parser of ``info``."""
    parser = commands.add_parser("info", help="what a checkpoint holds, and what would run it here")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=file_name,
        metavar="CHECKPOINT",
        help="file or folder (default: the embedded nano)",
    )
    parser.add_argument(
        "--env",
        action="store_true",
        help="this machine alone, for a report of a bug: no paths, no secrets",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    _add_traceback(parser)


def add_verify(commands: Any) -> None:
    """Add the parser of ``verify``."""
    parser = commands.add_parser(
        "verify", help="hold every operation, on your weights and machine, against plain PyTorch in fp64"
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=file_name, metavar="CHECKPOINT", help="weights (default: the embedded nano)"
    )
    parser.add_argument(
        "--image", type=file_name, metavar="FILE", help="look at this photograph (default: a drawn one)"
    )
    parser.add_argument("--video", action="store_true", help="hold tracking, and not images, on drawn frames")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="of --video: over how many frames drift is measured (default: 20; on a CPU fewer above 512 px, 5 at 1024)",
    )
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write the checks there")
    _add_common(parser, checkpoint=False)


def add_convert(commands: Any) -> None:
    """Add the parser of ``convert``."""
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
    _add_traceback(parser)


def add_quantize(commands: Any) -> None:
    """Add the parser of ``quantize``."""
    parser = commands.add_parser(
        "quantize",
        help="rewrite weights in 8 bits, if the masks of your images stay what they were",
        epilog="The report, beside OUT, holds measures, gates and pictures of the masks that differ most. Where a gate "
        "is not passed nothing is written, and the status is 1.",
    )
    parser.add_argument("checkpoint", type=file_name, metavar="IN", help="file or folder in any known layout")
    parser.add_argument("target", type=file_name, metavar="OUT", help="a .safetensors file")
    parser.add_argument("--scheme", choices=SCHEMES, default="int8", help="of the encoder's blocks (default: int8)")
    parser.add_argument("--images", type=file_name, required=True, metavar="DIR", help="on which it is measured")
    parser.add_argument(
        "--calibration", type=file_name, metavar="DIR", help="other images, of whose activations outliers are smoothed"
    )
    parser.add_argument("--max-images", type=int, default=32, metavar="N", help="of a folder (default: 32)")
    parser.add_argument("--force", action="store_true", help="replace OUT, and write what did not pass")
    _add_common(parser, checkpoint=False, quantize=False)


def add_demo(commands: Any) -> None:
    """Add the parser of ``demo``."""
    parser = commands.add_parser("demo", help="clicks, a box and a correction on photographs from scikit-image")
    parser.add_argument(
        "--out", type=file_name, default="out", metavar="DIR", help="folder for the overlays (default: out)"
    )
    _add_common(parser)


def add_run(commands: Any) -> None:
    """Add the parser of ``run``."""
    parser = commands.add_parser(
        "run",
        help="run a program written for segment_anything or sam2, unmodified, with this package in their place",
        description=RUN_DESCRIPTION,
        usage="fastsam run [-h] [--replace-local] (SCRIPT | -m MODULE) [ARGUMENTS ...]",
    )
    parser.add_argument(
        "--replace-local", action="store_true", help="also in place of a copy of one of them of the program's own"
    )
    _add_traceback(parser)


def _add_format(parser: argparse.ArgumentParser, png: str) -> None:
    listed = [f"{name}: {form.description}" for name, form in mask_formats().items() if form is not None]
    parser.add_argument(
        "--format", choices=mask_formats(), default="png", help=f"{'; '.join([png, *listed])} (default: png)"
    )


def _add_common(
    parser: argparse.ArgumentParser, checkpoint: bool = True, megapixels: bool = False, quantize: bool = True
) -> None:
    """Add the options of a model; ``checkpoint``: an option too, else the command has an argument of that name."""
    if megapixels:
        parser.add_argument(
            "--max-megapixels",
            type=float,
            default=MAX_MEGAPIXELS,
            metavar="N",
            help=f"refuse larger images (default: {MAX_MEGAPIXELS:g}; 0 lifts the limit)",
        )
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=file_name,
            metavar="FILE",
            help="weights in any known layout (default: the embedded nano)",
        )
    parser.add_argument(
        "--variant",
        "--model-type",
        help="what the weights must be, for example vit_b or sam2.1_tiny (default: inferred)",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="side of the model's input (default: the weights')"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="of the operations (default: auto)")
    if quantize:
        parser.add_argument(
            "--quantize", choices=SCHEMES, help="multiply in 8 bits in the image encoder (default: as the weights are)"
        )
    _add_traceback(parser)


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``parse`` with its ``ValueError`` as argparse's, whose message reaches the user."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


@_argument
def file_name(text: str) -> str:
    """Return the name of a file or folder as given, if it is one."""
    path_of("it", text)
    return text
