"""Frames of video files, decoded by PyAV one by one: in this process, or in one whose memory and time are limited.

A file of strangers is decoded apart: of a few containers, which name no other files, and of common codecs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .decode_apart import limit_memory

# What the files of each of FFmpeg's containers begin with, and where.
_CONTAINERS = {"mov": (4, b"ftyp"), "matroska": (0, b"\x1a\x45\xdf\xa3"), "avi": (8, b"AVI ")}
_CODECS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg")
# Decoders hold up to 16 pictures to predict others from, of 3 bytes a pixel with 10 bits a channel.
_BYTES_PER_PIXEL, _BYTES_OF_LIBRARIES = 64, 256 * 2**20
_PADDING = 2**20
_HEAD = struct.Struct("<II")
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from sam.images.videos import write_frames
write_frames(*map(int, sys.argv[2:]))
"""


class VideoError(ValueError):
    """A video file that is not read."""


class UnsupportedVideoError(VideoError):
    """The file is of another container or codec, or has no video."""


class VideoTooLargeError(VideoError):
    """A frame has more pixels than the limit."""


class DamagedVideoError(VideoError):
    """The decoder does not get through, or not in the memory and time that a frame may take."""


# How the process that decodes says why it ends, in place of a frame's height and width.
_ENDS: tuple[type[VideoError] | None, ...] = (None, UnsupportedVideoError, VideoTooLargeError, DamagedVideoError)


def decode_frames(source: str | os.PathLike[str] | bytes, side: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Decode a video, a file or its bytes, frame by frame, with PyAV.

    Yields:
        [side, side, 3] uint8 RGB, stretched by FFmpeg's bilinear scaler, and the frame's height and width.

    Raises:
        ImportError: no PyAV.
        OSError: no video that FFmpeg reads, or damaged; the message names the file and the frame.
    """
    try:
        import av
    except ImportError:
        raise ImportError("reading video files needs PyAV: pip install 'fastsam-kernels[video]'") from None
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
    name, index = ("the video" if isinstance(source, bytes) else opened), 0
    try:
        with av.open(opened) as container:
            if not container.streams.video:
                raise OSError(f"{name} has no video stream")
            for frame in container.decode(video=0):
                yield _stretched(frame, side), frame.height, frame.width
                index += 1
    except av.FFmpegError as error:
        raise OSError(f"{name} cannot be decoded, frame {index}: {error}") from error


def _stretched(frame: Any, side: int) -> np.ndarray:
    pixels: np.ndarray = frame.reformat(width=side, height=side, format="rgb24", interpolation="BILINEAR").to_ndarray()
    return pixels


class VideoApart:
    """A video file that is decoded in another process, frame by frame as they are read."""

    def __init__(self, file: BinaryIO, side: int, max_pixels: int, seconds: float) -> None:
        """Start the process; it has a copy of the file.

        Args:
            file: MP4, MOV, MKV, WebM or AVI.
            side: frames are stretched to a square of so many pixels a side.
            max_pixels: pixels of a frame.
            seconds: time that a frame may take.

        Raises:
            UnsupportedVideoError: a file of another kind.
        """
        self._side, self._seconds = side, seconds
        head = file.read(12)
        kinds = [name for name, (at, mark) in _CONTAINERS.items() if head[at : at + len(mark)] == mark]
        if not kinds:
            raise UnsupportedVideoError("the file is neither MP4, MOV, MKV, WebM nor AVI")
        ours = str(Path(__file__).parents[2])  # first: this process may have another ``sam`` on its path
        arguments = [json.dumps([ours, *sys.path]), list(_CONTAINERS).index(kinds[0]), side, max_pixels]
        with tempfile.TemporaryFile() as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CHILD, *map(str, arguments)],
                stdin=copy,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )

    def read(self) -> tuple[np.ndarray, tuple[int, int]] | None:
        """Return the next frame, [side, side, 3] uint8 RGB, and its (height, width); None after the last.

        Raises:
            UnsupportedVideoError, VideoTooLargeError, DamagedVideoError: there is no next frame, for that reason.
        """
        assert self._process.stdout is not None
        pixels = np.empty((self._side, self._side, 3), np.uint8)
        timer = threading.Timer(self._seconds, self._process.kill)
        timer.start()
        try:
            head = self._process.stdout.read(_HEAD.size)
            height, width = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, len(_ENDS) - 1)
            complete = height == 0 or self._process.stdout.readinto(pixels.data) == pixels.nbytes  # type: ignore[attr-defined]
        finally:
            timer.cancel()
        if height and complete:
            return pixels, (height, width)
        reason = _ENDS[width] if height == 0 else DamagedVideoError
        if reason is not None:
            raise reason(reason.__doc__)
        return None

    def close(self) -> None:
        """End the process; a read that waits for it ends as of a damaged file. May be called again, by any thread."""
        self._process.kill()
        self._process.wait()


def write_frames(container: int, side: int, max_pixels: int) -> None:
    """Decode stdin onto stdout: height, width and pixels of each frame, then zero and the reason of the end."""
    import av

    limit_memory(_BYTES_PER_PIXEL * max_pixels + 3 * side * side + _BYTES_OF_LIBRARIES)
    out, reason = sys.stdout.buffer, None
    try:
        with av.open(sys.stdin.buffer, format=list(_CONTAINERS)[container]) as video:
            for frame in _frames(video, max_pixels):
                out.write(_HEAD.pack(frame.height, frame.width))
                out.write(_stretched(frame, side).data)
                out.flush()
    except VideoError as error:
        reason = type(error)
    except (av.FFmpegError, MemoryError, ValueError):
        reason = DamagedVideoError
    out.write(_HEAD.pack(0, _ENDS.index(reason)))
    out.flush()


def _frames(video: Any, max_pixels: int) -> Iterator[Any]:
    if not video.streams.video:
        raise UnsupportedVideoError
    codec = video.streams.video[0].codec_context
    if codec.name not in _CODECS:
        raise UnsupportedVideoError
    if codec.width * codec.height > max_pixels:
        raise VideoTooLargeError
    codec.thread_count = 1  # each thread holds pictures of its own
    # Of later pictures too, for a stream may change its size; decoders count what they add to each side.
    codec.options = {"max_pixels": str(2 * max_pixels + _PADDING)}
    for frame in video.decode(video=0):
        if frame.width * frame.height > max_pixels:
            raise VideoTooLargeError
        yield frame
