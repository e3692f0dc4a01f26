"""Decodes an image in a process of its own, whose memory is limited and which can be ended at any time.

For lossless WebP: each 4x4 pixels of it may ask for Huffman tables of their own, of up to 17 KB, and only who decodes
it learns how many there are. A file of 300 KB and one megapixel takes 360 MB that way, and one call that nothing ends.
For JPEG, PNG and lossy WebP the size of the picture bounds the memory.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .read import Pieces, check_size, decode
from .structure import DamagedImageError, ImageStructure, walk

# libwebp and PIL hold three copies of the pixels, of 4 bytes each; libwebp's encoder makes 2,600 groups at most.
_BYTES_PER_PIXEL, _BYTES_OF_TABLES = 16, 64 * 2**20
_POLL_SECONDS = 0.02
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from sam.images.decode_apart import write_pixels
write_pixels(int(sys.argv[2]), int(sys.argv[3]))
"""


def decode_apart(
    file: BinaryIO, structure: ImageStructure, max_pixels: float | None, check_cancelled: Callable[[], None]
) -> np.ndarray:
    """Decode an image as :func:`sam.images.read.decode` does, but in another process, which is gone afterwards.

    Raises:
        ImageTooLargeError: more pixels than ``max_pixels``.
        DamagedImageError: the decoder does not get through, or not in the memory that such an image needs.
    """
    check_size(structure.width, structure.height, max_pixels)
    memory = _BYTES_PER_PIXEL * structure.width * structure.height + 2 * sum(map(len, structure.pieces))
    with tempfile.TemporaryFile() as needed, tempfile.TemporaryFile() as pixels:
        shutil.copyfileobj(io.BufferedReader(Pieces(file, structure.pieces, check_cancelled)), needed)
        needed.seek(0)
        ours = str(Path(__file__).parents[2])  # first: this process may have another ``sam`` on its path
        arguments = [json.dumps([ours, *sys.path]), memory + _BYTES_OF_TABLES, structure.orientation]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, *map(str, arguments)],
            stdin=needed,
            stdout=pixels,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not _has_ended(process):
                check_cancelled()
        finally:
            process.kill()
            process.wait()
        pixels.seek(0)
        shape = np.frombuffer(pixels.read(8), np.uint32) if process.returncode == 0 else None
        if shape is None:
            raise DamagedImageError("cannot be decoded, or not in the memory that an image of its size needs")
        rgb = np.empty((*shape.tolist(), 3), np.uint8)
        pixels.readinto(rgb.data)
        return rgb


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def write_pixels(memory: int, orientation: int) -> None:
    """Decode what stands on stdin onto stdout, with ``memory`` bytes more than there are now: height, width, pixels."""
    limit_memory(memory)
    file = io.BytesIO(sys.stdin.buffer.read())
    structure = walk(file)
    assert structure is not None
    rgb = decode(file, replace(structure, orientation=orientation), None)
    sys.stdout.buffer.write(np.array(rgb.shape[:2], np.uint32).tobytes())
    sys.stdout.buffer.write(rgb.data)


def limit_memory(more: int) -> None:
    """Let this process have ``more`` bytes of memory than it has now; a system that has no such limit sets none."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # no Linux: then there is no limit, only an end to the process
        return
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
