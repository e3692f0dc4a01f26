"""Options, help and mistakes of the command line need no torch, which takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys

import fastsam_kernels
from sam.checkpoint import LAYOUTS
from sam.cli import model, parsers

COMMANDS = ("segment", "auto", "serve", "info", "verify", "convert", "demo", "run", "text")

# One process: what one of these lines imported, the ones behind it would be blamed for, so it stops there.
PROBE = """
import contextlib, io, json, sys
from sam.cli import main

for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    expected = 0 if arguments and arguments[-1] in ("--help", "--version") else 2
    assert status == expected, (arguments, status, said.getvalue())
    assert said.getvalue()
    loaded = {"torch", "fastsam_kernels", "fastapi", "skimage"} & set(sys.modules)
    assert not loaded, (arguments, loaded)
print("done")
"""


def test_help_version_and_usage_errors_import_no_torch() -> None:

    lines = [["--help"], ["--version"], [], ["paint"], ["run"]]
    lines += [[command, "--help"] for command in COMMANDS]
    lines += [[command, "--no-such-option"] for command in COMMANDS]
    lines += [
        ["segment", "x.png"],
        ["segment", "x.png", "--point", "1"],
        ["segment", "x.png", "--box", "a,b"],
        ["auto", "x.png", "--format", "pickle"],
        ["text", "x.png", "--detector", "d"],
        ["text", "x.png", "--detector", "d", "--label", "cat=often"],
        ["serve", "--port", "x"],
        ["info", ""],
        ["verify", "--dtype", "int8"],
        ["convert", "a.pth"],
        ["demo", "--kernels", "magic"],
    ]
    command = [sys.executable, "-c", PROBE, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_choices_are_those_of_the_parts_that_import_torch() -> None:
    assert parsers.KERNELS == fastsam_kernels.KERNELS
    assert parsers.LAYOUTS == LAYOUTS
    assert tuple(model.DTYPES) == parsers.DTYPES
