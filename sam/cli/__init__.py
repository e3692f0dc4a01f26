"""The command line: ``python -m sam``, or ``fastsam`` once installed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from . import auto, convert, demo, info, run, segment, serve, verify


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._given: Sequence[str] = ()
        # Of what begins with a minus, argparse only takes a single plain number for a value: no -5,10 and no -1e-3.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf\b|nan\b)", re.IGNORECASE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        files = [argument for argument in self._given if argument.startswith("-") and Path(argument).exists()]
        if files and "--" not in self._given:
            message += f"; a name that begins with a minus comes last, behind --: -- {files[0]}"
        self.exit(2, f"{self.prog}: error: {message} (--help shows the usage)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastsam", description="Segment Anything on the command line.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (segment, auto, serve, info, verify, convert, demo, run):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake of the user's is one line on stderr and exit status 2.

    A command that could do a part of its work only returns 1.
    """
    own, program = run.split(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(own, argparse.Namespace(program=program))
    if arguments is None and hasattr(args, "prepare"):
        args.prepare()
    try:
        status = args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"fastsam {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastsam {args.command}: interrupted", file=sys.stderr)
        return 130
    return status or 0


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
