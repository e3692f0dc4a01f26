"""Settings of the service, and its limits by default."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """Settings of one service.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        token: secret that clients send; None lets everyone in.
        insecure: listen beyond this machine without a token.
        max_body_bytes: size of a request, counted as it arrives.
        max_text_bytes: size of the JSON in it.
        max_pixels: pixels of an image, read from its header before anything is decoded.
        max_output_pixels: pixels of all masks of an answer whose format needs them.
        result_cache_bytes: size of all low-resolution logits stored as mask inputs for later prompts.
        max_sessions: sessions of video open at a time.
        session_seconds: time after which a session that nobody uses is closed.
        max_session_objects: objects of a session, those to come included.
        max_session_prompts: prompts of a session that it keeps: of frames to come, and of those that it learnt from.
        max_session_bytes: size of a session's tensors, beyond which it takes no prompts.
        max_session_mask_bytes: size of a session's masks; those of the oldest frames go first.
        max_videos: video files that are decoded at a time.
        max_video_pixels: pixels of a frame of a video file.
        frame_seconds: time for a frame of a video file to be decoded.
        drain_seconds: time to answer accepted requests before the process ends.
        max_connections: connections open at a time; the longest silent one is closed for the next.
        max_uploads: number of bodies of more than 64 KiB that are read at a time.
        max_held_bytes: size of all bodies, in memory or on disk, from their first byte until the image is decoded.
        max_unread_bytes: size of all answers that clients have not read; the oldest is dropped for the next.
        head_seconds: time for a request's head to arrive, and for the next one on a connection to begin.
        body_seconds: time by which a body may lag behind 32 KiB per second.
        unread_seconds: time in which a client must read some of its answer.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    insecure: bool = False
    max_body_bytes: int = 64 * MEBIBYTE
    max_text_bytes: int = 4 * MEBIBYTE
    max_pixels: int = 50_000_000
    max_output_pixels: int = 500_000_000
    result_cache_bytes: int = 64 * MEBIBYTE
    max_sessions: int = 16
    session_seconds: float = 120.0
    max_session_objects: int = 32
    max_session_prompts: int = 512
    max_session_bytes: int = 512 * MEBIBYTE
    max_session_mask_bytes: int = 32 * MEBIBYTE
    max_videos: int = 4
    max_video_pixels: int = 9_000_000
    frame_seconds: float = 20.0
    drain_seconds: float = 25.0
    max_connections: int = 400
    max_uploads: int = 32
    max_held_bytes: int = 1024 * MEBIBYTE
    max_unread_bytes: int = 256 * MEBIBYTE
    head_seconds: float = 15.0
    body_seconds: float = 5.0
    unread_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"the port must be 0 to 65535, got {self.port}")
        if self.max_sessions < 0:
            raise ValueError(f"max_sessions must not be negative, got {self.max_sessions}")
        if self.token is not None and (len(self.token) < 8 or not self.token.isascii() or not self.token.isprintable()):
            raise ValueError("the token must be at least 8 printable ASCII characters")
        if not (self.loopback or self.token or self.insecure):
            raise ValueError(
                f"{self.host} can be reached from other machines: give --token, or --insecure to let everyone in"
            )

    @property
    def loopback(self) -> bool:
        """Return whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
