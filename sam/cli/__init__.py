"""The command line: ``python -m sam``, or ``fastsam`` once installed."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .parsers import add_commands
from .run import split


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._given: Sequence[str] = ()
        # Of arguments that begin with a minus argparse takes plain numbers for values: no -5,10 and no -1e-3.
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
    """Return the parser of the command line and of all commands."""
    parser = _Parser(prog="fastsam", description="Segment Anything on the command line.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    A mistake of the user's is one line on stderr and status 2; a command that did only a part of its work returns 1.
    """
    own, program = split(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(own, argparse.Namespace(program=program))
    if arguments is None and hasattr(args, "prepare"):
        args.prepare()
    try:
        if hasattr(args, "check"):
            args.check(args)
        # The work of a command, and with it torch, is imported only now: options and their errors need none of it.
        status = import_module(f".{args.command}", __name__).run(args)
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
