"""Sessions of video on a service: frames or a file go there, masks come back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..masks import rle
from ..masks.formats import find_format
from ..prompts import wire
from ..prompts.prompt import Prompt
from .answers import (
    IDENTIFIER,
    Answer,
    ServiceError,
    a_count,
    a_dict,
    a_list,
    a_mask,
    a_number,
    a_text,
    possible_sizes,
    read_error,
    read_file,
)
from .connection import Connection, content_of

_PATH = "/v1/video/sessions"
_MAX_OBJECTS, _MAX_SIDE = 1024, 2**16
Prompts = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RemoteFrame:
    """The O objects of a session on one frame.

    Attributes:
        frame: its number, from 0 on.
        objects: their names, in the order in which they were added.
        masks: [O, H, W] bool.
        predicted_iou: [O].
        object_scores: [O] logits, above 0 where an object is seen.
    """

    frame: int
    objects: tuple[str, ...]
    masks: np.ndarray
    predicted_iou: np.ndarray
    object_scores: np.ndarray


@dataclass(frozen=True)
class VideoState:
    """The state of a session: how far it is.

    Attributes:
        next_frame: the number of the frame that comes next.
        last_masks: the number of the last frame whose masks can be read; None before the first.
        objects: the names of its objects.
        tracking: whether it is tracking a video file.
        error: of a file that ended before its last frame, what a request for that frame would raise.
    """

    next_frame: int
    last_masks: int | None
    objects: tuple[str, ...]
    tracking: bool
    error: ServiceError | None


class RemoteVideo:
    """A session of video, as :meth:`Client.open_video` opens it; at the end of its block it is closed.

    Prompts are given by object, whose names are of A-Z, a-z, 0-9, _, . and -: a :class:`sam.Prompt` or its document,
    or a mask [H, W]. What is refused raises :class:`ServiceError`, as in the client's methods, and changes nothing.

    Attributes:
        key: its id on the service.
        next_frame: the number of the frame that comes next.
    """

    def __init__(self, connection: Connection, key: str) -> None:
        self.key, self.next_frame = key, 0
        self._connection, self._path = connection, f"{_PATH}/{key}"
        self._file_begins = 0

    def push(self, image: str | os.PathLike[str] | bytes, prompts: Prompts | None = None) -> RemoteFrame:
        """Send the next frame, a file's path or its bytes: JPEG, PNG or WebP.

        Args:
            prompts: on this frame.
        """
        data, sent = content_of(image), self.next_frame
        fields = {"frame": sent, "prompts": _documents(prompts or {})}
        sizes = possible_sizes(data)
        frame = self._connection.send_file(
            f"{self._path}/frames", "image", data, fields, lambda answer: self._read_frame(answer, sent, sizes), True
        )
        self.next_frame = frame.frame + 1
        return frame

    def prompt(self, prompts: Prompts, frame: int | None = None) -> RemoteFrame | None:
        """Prompt objects on the current frame, or on one to come.

        Returns:
            all objects on the current frame; None for a frame to come.
        """
        request = {"prompts": _documents(prompts), **({} if frame is None else {"frame": frame})}
        return self._connection.ask(f"{self._path}/prompts", request, self._read_any, once=True)

    def remove(self, name: str) -> RemoteFrame | None:
        """Forget an object; returns the others on the current frame."""
        return self._connection.ask(f"{self._path}/remove", {"object": name}, self._read_any, once=True)

    def masks(self, frame: int) -> RemoteFrame:
        """Return the masks of a frame that was tracked."""
        return self._connection.ask(
            f"{self._path}/masks", {"frame": frame}, lambda answer: self._read_frame(answer, frame)
        )

    def masks_as(self, output: str, frame: int) -> bytes:
        """Return the masks of a frame in a format of :data:`sam.masks.formats.FORMATS`, as the service sent them."""
        form = find_format(output)
        request = {"frame": frame, "output": output}
        return self._connection.ask(f"{self._path}/masks", request, lambda answer: read_file(answer, form))

    def send_video(self, video: str | os.PathLike[str] | bytes, prompts: Prompts | None = None) -> None:
        """Send a video file, a path or its bytes, which the service tracks by itself.

        Args:
            prompts: on its first frame.
        """
        fields = {"prompts": _documents(prompts or {})}
        begins = self.state().next_frame
        self._connection.send_file(f"{self._path}/video", "video", content_of(video), fields, _read_state, True)
        self._file_begins = begins

    def frames(self, seconds: float = 0.2) -> Iterator[RemoteFrame]:
        """Yield the frames of the file that was sent, each once it is tracked.

        Args:
            seconds: until the service is asked again for a frame that it does not have yet.

        Raises:
            ServiceError: while iterating, after the frames before it, one that could not be tracked; ``where`` says
                which frame of the file it is.
        """
        frame = self._file_begins
        while True:
            state = self.state()
            while state.last_masks is not None and frame <= state.last_masks:
                yield self.masks(frame)
                frame += 1
            if not state.tracking:
                if state.error is not None:
                    raise state.error
                return
            time.sleep(seconds)

    def state(self) -> VideoState:
        """Return how far the session is."""
        state = self._connection.call("GET", self._path, None, None, _read_state)
        self.next_frame = state.next_frame
        return state

    def close(self) -> None:
        """Close the session; closing one that is not there any more changes nothing."""
        try:
            self._connection.call("DELETE", self._path, None, None, lambda answer: None)
        except ServiceError as error:
            if error.code != "unknown_session":
                raise

    def __enter__(self) -> RemoteVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read_any(self, answer: Answer) -> RemoteFrame | None:
        return None if "next_frame" in a_dict(answer.json()) else self._read_frame(answer)

    def _read_frame(
        self, answer: Answer, number: int | None = None, sizes: set[tuple[int, int]] | None = None
    ) -> RemoteFrame:
        document = a_dict(answer.json())
        image, records = a_dict(document["image"]), a_list(document["objects"], _MAX_OBJECTS)
        height, width = (a_count(image[name], 1, _MAX_SIDE) for name in ("height", "width"))
        frame = a_count(document["frame"], 0)
        if number not in (None, frame) or (sizes is not None and (height, width) not in sizes):
            raise ValueError("not the frame that was asked for")
        self._connection.check_room(len(records), height, width)
        masks = [a_mask(record, height, width) for record in records]
        return RemoteFrame(
            frame,
            tuple(a_text(record["id"]) for record in records),
            np.stack(masks) if masks else np.zeros((0, height, width), bool),
            np.array([a_number(record["predicted_iou"]) for record in records], np.float32),
            np.array([a_number(record["object_score"]) for record in records], np.float32),
        )


def open_video(connection: Connection, fill_hole_area: int) -> RemoteVideo:
    """Open a session on the service at the other end of a connection."""

    def read(answer: Answer) -> str:
        key = a_text(a_dict(answer.json())["session"])
        if not IDENTIFIER.fullmatch(key):
            raise ValueError("not the id of a session")
        return key

    return RemoteVideo(connection, connection.ask(_PATH, {"fill_hole_area": fill_hole_area}, read, once=True))


def _documents(prompts: Prompts) -> list[dict[str, Any]]:
    documents = []
    for name, prompt in prompts.items():
        if isinstance(prompt, np.ndarray):
            encoded = rle.encode(prompt)
            prompt = {"mask": {**encoded, "counts": rle.compress(encoded["counts"])}}
        elif isinstance(prompt, Prompt):
            prompt = wire.to_dict(prompt)
        documents.append({"object": name, **prompt})
    return documents


def _read_state(answer: Answer) -> VideoState:
    document = a_dict(answer.json())
    video, error = document["video"], None
    if video is not None and "error" in a_dict(video):
        error = read_error(video["error"], answer.status, document["request_id"])
    objects = tuple(map(a_text, a_list(document["objects"], _MAX_OBJECTS)))
    tracking = video is not None and video["state"] == "tracking"
    last = a_dict(document["masks"])["last"]
    last = None if last is None else a_count(last, 0)
    return VideoState(a_count(document["next_frame"], 0), last, objects, tracking, error)
