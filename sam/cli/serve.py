"""``serve``: the HTTP service and its page."""

from __future__ import annotations

import argparse
import os
import sys


def wait_passively() -> None:
    """Start this process anew with OpenMP threads that sleep while they wait, unless the user chose otherwise.

    By default they spin, which takes time from those that read and write requests: on two cores that others used too,
    a request cost 36 to 150 ms of the processor's time, and 23 to 27 ms so. It is read when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(args: argparse.Namespace) -> int:
    """Serve the model over HTTP until a signal; return the exit status."""
    try:
        from ..server import Settings, serve
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'fastsam-kernels[serve]'") from None
    from ..engine import Engine
    from .model import model_from

    token = args.token or os.environ.get("SAM_TOKEN") or None
    settings = Settings(args.host, args.port, token, args.insecure, max_sessions=args.max_sessions)
    secret = os.environ.get("SAM_HANDLE_SECRET")
    limits = (args.max_batch, args.max_queue, args.deadline, args.cache_mb * 10**6)
    engine = Engine(model_from(args), *limits, handle_secret=secret.encode() if secret else None)
    return serve(engine, settings)
