"""``serve``: the HTTP service and its page."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from .options import add_model_options, add_traceback_option, model_from


def add_parser(commands: Any) -> None:
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
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests waiting (default: 256)")
    parser.add_argument("--deadline", type=float, default=30.0, metavar="S", help="seconds a request (default: 30)")
    parser.add_argument(
        "--cache-mb", type=int, default=1024, metavar="MB", help="of image embeddings kept (default: 1024)"
    )
    add_model_options(parser)
    add_traceback_option(parser)
    parser.set_defaults(run=run, prepare=wait_passively)


def wait_passively() -> None:
    """Start this process anew with OpenMP threads that sleep while they wait, unless the user chose otherwise.

    By default they spin, which takes time from those that read and write requests: on two cores that others used too,
    a request cost 36 to 150 ms of the processor's time, and 23 to 27 ms so. It is read when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(args: argparse.Namespace) -> int:
    try:
        from ..server import Settings, serve
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'fastsam-kernels[serve]'") from None
    from ..engine import Engine

    token = args.token or os.environ.get("SAM_TOKEN") or None
    settings = Settings(args.host, args.port, token, args.insecure)
    secret = os.environ.get("SAM_HANDLE_SECRET")
    limits = (args.max_batch, args.max_queue, args.deadline, args.cache_mb * 10**6)
    engine = Engine(model_from(args), *limits, handle_secret=secret.encode() if secret else None)
    return serve(engine, settings)
