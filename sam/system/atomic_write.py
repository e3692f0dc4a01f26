"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checks import path_of


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, moved over it when the block ends well and removed when it does not.

    Raises:
        ValueError: an empty name, or a URL.
        FileNotFoundError: no such folder.
        OSError: no file can be made there, or none of that name.
    """
    target = path_of("path", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: no such folder: {target.parent}")
    # Short, and nothing of the target's: with more of it, a name that is allowed would not be.
    partial = target.with_name(f".{secrets.token_hex(8)}.partial{target.suffix}")
    with _naming(target):
        partial.touch()
    mode = partial.stat().st_mode  # the mode of any new file here; safetensors would leave it private
    try:
        yield partial
        partial.chmod(mode)
        with _naming(target):
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside ``target`` to fill, which takes its name when the block ends well."""
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)
    with _naming(target):
        partial.mkdir()
    try:
        yield partial
        with _naming(target):
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """Return the folder that stands for ``target`` until it is whole: always the same, so none is left for good."""
    return target.with_name(f".{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}.partial")


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let errors name ``target``, which the user knows, and no file of ours."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from None
