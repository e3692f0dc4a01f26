"""``python -m sam.training``: train the embedded model; ``python -m sam.training evaluate``: measure weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException

from ..build_sam import NANO_CHECKPOINT
from ..system.hardware import usable_cores, usable_device
from .evaluate import evaluate_checkpoint
from .loop import run, stored_settings
from .provenance import EMBEDDED, SCRATCH, origin
from .team import run_together
from .trainer import Settings


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sam.training", description="Train the small model on scenes that are drawn as it goes."
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of training; the schedule is fitted to it (default: 60)")
    length.add_argument("--steps", type=int, help="instead of minutes: a run that repeats exactly to its end")
    parser.add_argument("--out", type=Path, default=Path("out/training"), help="folder (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, as it would have gone on")
    parser.add_argument(
        "--init",
        default=EMBEDDED,
        metavar="CHECKPOINT",
        help=f"where to start: '{EMBEDDED}', '{SCRATCH}' or a file (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="times the images a step (default: 1 on a CPU, 8 on a GPU)")
    parser.add_argument("--reuse", type=int, help="times a scene is used (default: 8 on a CPU, 4 on a GPU)")
    parser.add_argument(
        "--pool",
        type=int,
        help="scenes a process keeps to use again (default: 512 over all on a CPU, 2048 on a GPU)",
    )
    parser.add_argument(
        "--processes", type=int, help="that train together, a thread each (default: a core each on a CPU)"
    )
    parser.add_argument("--peak", type=float, help="learning rate of the plateau (default: 4e-4, from scratch 1e-3)")
    parser.add_argument(
        "--workers", type=int, help="processes that draw for it (default: none on a CPU, else all cores but one)"
    )
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints (default: %(default)s)")
    _add_device(parser)
    commands = parser.add_subparsers(dest="command", metavar="evaluate")
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on held-out scenes")
    evaluate.add_argument("checkpoint", nargs="?", type=Path, default=NANO_CHECKPOINT, help="(default: the embedded)")
    evaluate.add_argument("--scenes", type=int, default=500, help="(default: %(default)s)")
    evaluate.add_argument("--out", type=Path, help="folder of the table and the picture (default: the checkpoint's)")
    evaluate.add_argument("--workers", type=int, help="processes that score on a CPU (default: a core each)")
    _add_device(evaluate)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="(default: cuda if there is one, else cpu)")


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        device = usable_device(args.device)
        if args.command == "evaluate":
            workers = usable_cores() if args.workers is None else args.workers
            out = args.out or args.checkpoint.parent
            print(evaluate_checkpoint(args.checkpoint, args.scenes, device, out, workers))
        else:
            _train(args, device)
    except (ValueError, OSError, ImportError, ProcessException) as error:
        print(f"sam.training: error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(args: argparse.Namespace, device: torch.device) -> None:
    stored = args.out / "state.pt"
    if args.resume:
        settings = stored_settings(args.out)
    elif stored.exists():
        raise ValueError(f"{args.out} holds a run; --resume goes on with it, another --out starts a new one")
    else:
        settings = _settings(args, device)
        origin(settings.init)  # a file that cannot be read is said here, not by every process
    if not 1 <= settings.processes <= (1 if device.type == "cuda" else 256):
        raise ValueError(f"{settings.processes} processes cannot train on {device}: 1 on a GPU, 1 to 256 on a CPU")
    workers = args.workers if args.workers is not None else max(usable_cores() - 1, 1) if device.type == "cuda" else 0
    minutes = 60.0 if args.minutes is None and args.steps is None else args.minutes
    length = (minutes, args.steps)
    run_together(settings.processes, run, settings, device, workers, length, args.out, args.resume, args.save_minutes)


def _settings(args: argparse.Namespace, device: torch.device) -> Settings:
    on_gpu = device.type == "cuda"
    processes = (1 if on_gpu else usable_cores()) if args.processes is None else args.processes
    return Settings(
        seed=args.seed,
        init=args.init,
        images=args.images or (8 if on_gpu else 1),
        reuse=args.reuse or (4 if on_gpu else 8),
        pool=args.pool or (2048 if on_gpu else -(-512 // max(processes, 1))),
        peak=args.peak or (1e-3 if args.init == SCRATCH else 4e-4),
        processes=processes,
    )


if __name__ == "__main__":  # worker processes may import this module
    sys.exit(main())
