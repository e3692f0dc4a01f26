"""Video files that tests make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_clip(path: Path, pictures: Sequence[np.ndarray], codec: str = "mpeg4") -> Path:
    """A video of pictures of even sides, each of which is encoded by itself; needs PyAV."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=5)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def without_frame(path: Path, index: int) -> bytes:
    """The file with zeros in place of a frame."""
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[index]
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    return bytes(content)
