"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to, moved over it when the block ends well and removed when it does not."""
    target = Path(path)
    unique = f"{os.getpid()}-{threading.get_ident()}"
    partial = target.with_name(f".{target.stem}.{unique}.partial{target.suffix}")
    partial.touch()
    mode = partial.stat().st_mode  # what any new file gets here; safetensors would leave it private
    try:
        yield partial
        partial.chmod(mode)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
