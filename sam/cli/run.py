"""``run SCRIPT``: a program for ``segment_anything`` or ``sam2``, unmodified, with this package in their place.

The program, and each Python that it starts, finds it by a ``sitecustomize`` on PYTHONPATH. So it does not reach Pythons
of another installation, nor those that are started without these variables or with -I, -E or -S. Where the name ``sam``
is the program's own, this package is ``_fastsam`` in its processes, and in the pickles of whole models that it writes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOOK = Path(__file__).parent / "run_hook"

DESCRIPTION = """Run a program in a Python of its own, in which, as in every Python process that it starts,
segment_anything and sam2 are this package. In a folder that has a package called sam itself, `python -m sam` is that
package; `fastsam run` serves both."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what is for our parser, and the program with its arguments, which argparse would read.

    The program begins at the first argument after ``run`` that is no option, at ``-m``, or after ``--``.
    """
    if arguments[:1] != ["run"]:
        return list(arguments), []
    start = 1
    while start < len(arguments) and arguments[start].startswith("-") and not _begins_program(arguments[start]):
        start += 1
    separator = arguments[start : start + 1] == ["--"]
    return list(arguments[:start]), list(arguments[start + separator :])


def _begins_program(argument: str) -> bool:
    """Return whether a dash begins the program: a module, the end of our options, or the script on stdin."""
    return argument in ("-", "--") or argument.startswith("-m")


def run(args: argparse.Namespace) -> None:
    """Replace this process by the program, with the official packages served from this one."""
    if not args.program or args.program == ["-m"]:
        raise ValueError("run needs a SCRIPT, or -m MODULE")
    for flag, name in (("-I", "isolated"), ("-E", "ignore_environment"), ("-S", "no_site")):
        if getattr(sys.flags, name):
            raise ValueError(f"python {flag} reads no PYTHONPATH or sitecustomize, by which run reaches the program")
    sys.stdout.flush()
    # Replaces this process, whose modules and variables the program must not find, by ``python SCRIPT`` itself.
    command = [sys.executable, *interpreter_flags(), *args.program]
    os.execve(sys.executable, command, environment(args.replace_local))


def interpreter_flags() -> list[str]:
    """Return the options that this Python was started with."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    unbuffered = getattr(sys.__stdout__, "write_through", False)  # which sys.flags does not tell
    return [*flags, "-u"] if unbuffered else flags


def environment(replace_local: bool) -> dict[str, str]:
    """Return the variables with which a Python, and each that it starts, serves official packages from this one."""
    variables = {**os.environ, "FASTSAM_RUN": sys.prefix}
    paths = os.environ.get("PYTHONPATH")  # an empty one is none, but an empty part of one is the working directory
    others = [path for path in paths.split(os.pathsep) if path != str(HOOK)] if paths else []
    variables["PYTHONPATH"] = os.pathsep.join([str(HOOK), *others])
    if replace_local:
        variables["FASTSAM_REPLACE_LOCAL"] = "1"
    return variables
