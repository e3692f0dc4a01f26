"""``python -m benchmarks COMMAND``: see ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from sam.system.hardware import usable_device

from .measure import DTYPES
from .provenance import CPU_RESULTS, RESULTS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measurements of sam and fastsam_kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    for name, purpose in (
        ("kernels", "every operation: its forms against each other, the truth and the machine's limit"),
        ("model", "parts of the model against the official way"),
        ("all", "both"),
    ):
        cases = commands.add_parser(name, help=purpose)
        cases.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this, or A|B")
        cases.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
        cases.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
        cases.add_argument(
            "--peers",
            default="",
            metavar="LIST",
            help="transformers, segment-anything=PATH, segment-anything-fast=PATH, sam2=PATH, between commas",
        )
        _add_common(cases, device, seconds=3.0)

    tune = commands.add_parser("tune", help="choose tiles on this GPU among those whose numerics pass")
    tune.add_argument("--operation", action="append", help="only this one; may be repeated")
    tune.add_argument("--workers", type=int, default=os.cpu_count(), help="that compile (default: one a core)")
    tune.add_argument("--write", action="store_true", help="change fastsam_kernels/triton/tile_configs/*.json")
    tune.add_argument("--dry-run", action="store_true", help="compile all candidates, no GPU needed; estimate a run")
    tune.add_argument("--arch", type=int, default=90, help="of a dry run (default: %(default)s)")
    tune.add_argument("--gpu-cores", type=int, default=16, help="beside the GPU, of a dry run (default: %(default)s)")
    tune.add_argument("--limit", type=float, default=540.0, help="of the estimate, in seconds (default: %(default)g)")
    _add_common(tune, device, seconds=2.0)

    report = commands.add_parser(
        "compile-report", help="registers, stack and instructions of every kernel, no GPU needed"
    )
    report.add_argument("--operation", action="append", help="only this one; may be repeated")
    report.add_argument("--arch", action="append", metavar="ARCH", help="80, ..., or gfx942; may be repeated")
    report.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    report.add_argument("--write", action="store_true", help="write benchmarks/results/compile_report_triton*")

    predict = commands.add_parser(
        "predict", help="times of an H200 and an A100 by instructions and bytes, no GPU needed"
    )
    predict.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    before = RESULTS / "predicted_a17f9ca.json"
    predict.add_argument("--before", type=Path, default=before, help="of another revision (default: %(default)s)")
    predict.add_argument("--write", action="store_true", help="write benchmarks/results/predicted.md and .json")

    plot = commands.add_parser("plot", help="a picture of results with peers")
    cpu = [RESULTS / name for name in CPU_RESULTS]
    plot.add_argument("results", type=Path, nargs="*", default=cpu, help="(default: those of the CPU)")
    plot.add_argument("--out", type=Path, default=RESULTS / "cpu.png", help="(default: %(default)s)")

    service = commands.add_parser("service", help="the HTTP service under load, beside the engine without HTTP")
    service.add_argument("--clients", type=int, default=48, help="of the closed loop (default: 48)")
    service.add_argument("--rounds", type=int, default=3, help="of engine and service in turn (default: 3)")
    service.add_argument("--seconds", type=float, default=20.0, help="a load (default: 20)")
    service.add_argument("--attacks", action="store_true", help="what others have of it while two clients attack it")
    service.add_argument("--checkpoint", metavar="FILE", help="weights (default: the embedded nano)")
    service.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")

    tables = commands.add_parser("tables", help="the tables of the pages, from the committed results")
    tables.add_argument("--write", action="store_true", help="put them into the pages")
    return parser


def _add_common(parser: argparse.ArgumentParser, device: str, seconds: float) -> None:
    parser.add_argument("--device", default=device, help=f"default here: {device}")
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="may be repeated (default: fp32; on a GPU all)"
    )
    parser.add_argument("--seconds", type=float, default=seconds, help=f"a case (default: {seconds:g})")


def main() -> int:
    args = build_parser().parse_args()
    if args.command == "compile-report":
        return _compile_report(args)
    if args.command == "predict":
        from . import predict

        return predict.run(args.workers, args.write, args.before)
    if args.command == "plot":
        from . import plot

        try:
            return plot.run(args.results, args.out)
        except ImportError as error:
            print(error, file=sys.stderr)
            return 2
    if args.command == "tables":
        from . import tables

        return tables.run(args.write)
    if args.command == "service":
        from . import service

        try:
            if args.attacks:
                return service.run_attacks(args.seconds, args.checkpoint)
            return service.run(args.seconds, args.rounds, args.clients, args.checkpoint, args.json)
        except service.NotStartedError as error:
            print(error, file=sys.stderr)
            return 2
    try:
        device = usable_device(args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    dtypes = [DTYPES[name] for name in args.dtype or (DTYPES if device.type == "cuda" else ["fp32"])]
    if args.command == "tune":
        return _tune(args, device, dtypes)
    from . import peers, runner

    try:
        peers.choose_peers(args.peers, compiled=not args.no_compile)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    group = None if args.command == "all" else args.command
    return runner.run(group, args.case, device, dtypes, args.seconds, not args.no_compile, args.json)


def _tune(args: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype]) -> int:
    from . import tune, tuning_plan

    try:
        tuning_plan.planned(args.operation)
        if args.dry_run:
            return tuning_plan.dry_run(
                args.operation, args.arch, dtypes, args.seconds, args.workers, args.gpu_cores, args.limit
            )
        if args.write:
            tune.check_own_file(device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return tune.run(args.operation, device, dtypes, args.seconds, args.workers, args.write)


def _compile_report(args: argparse.Namespace) -> int:
    from . import compile_report
    from .compile_cases import ARCHES

    known = {str(arch): arch for arch in ARCHES}
    unknown = [arch for arch in args.arch or () if arch not in known]
    if unknown:
        print(f"unknown architecture {unknown[0]!r}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    arches = [known[arch] for arch in args.arch] if args.arch else None
    return compile_report.run(args.operation, arches, args.workers, args.write)


if __name__ == "__main__":
    sys.exit(main())
