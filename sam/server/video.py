"""The routes of video: a session is opened, fed with frames or a file, prompted, read and closed."""

from __future__ import annotations

import asyncio
import importlib.util
import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ..engine import QueueFullError, TrackedFrame
from ..images.videos import DamagedVideoError, UnsupportedVideoError, VideoApart, VideoError, VideoTooLargeError
from ..masks import rle
from ..masks.formats import find_format
from ..prompts import wire
from ..video.frames import VideoFrame, frame_of, frame_of_video
from . import answering, openapi, outputs
from .answering import FEW_PROMPTS, FEW_RUNS
from .bodies import Upload
from .errors import ApiError
from .schemas import (
    FrameRequest,
    MasksRequest,
    ObjectPrompt,
    ObjectsRequest,
    RemoveRequest,
    SessionRequest,
    VideoRequest,
    check_inside,
)
from .service import Service
from .sessions import VideoRun, VideoSession
from .uploads import decode_image

_SESSIONS = "/v1/video/sessions"
_CODES: dict[type[VideoError], str] = {
    UnsupportedVideoError: "unsupported_video", VideoTooLargeError: "video_too_large", DamagedVideoError: "bad_video"
}  # fmt: skip
# Until a frame of a file is tried again, where as many requests wait as may.
_RETRY_SECONDS = 0.2
Answer = TrackedFrame | None
Prompts = dict[Hashable, Any]
Step = Callable[[Service, VideoSession, Any, Upload], Awaitable[Answer]]


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes of video to the application."""

    @app.post(_SESSIONS, **openapi.route("open_session"))
    async def open_session(request: Request) -> Response:
        async def work(upload: Upload) -> Response:
            parameters = await answering.read_parameters(service, SessionRequest, upload)
            session = service.sessions.open(parameters.fill_hole_area)
            return _state(service, session, request)

        return await answering.answer(request, service, work)

    @app.get(_SESSIONS + "/{session}", **openapi.route("session"))
    async def state(session: str, request: Request) -> Response:
        return _state(service, service.sessions.find(session), request)

    @app.delete(_SESSIONS + "/{session}", **openapi.route("close_session"))
    async def close(session: str, request: Request) -> Response:
        service.sessions.find(session)
        service.sessions.close(session)
        return JSONResponse({"request_id": request.state.request_id, "session": session})

    @app.post(_SESSIONS + "/{session}/frames", **openapi.route("push_frame"))
    async def push(session: str, request: Request) -> Response:
        return await _answer(request, service, session, FrameRequest, _push)

    @app.post(_SESSIONS + "/{session}/prompts", **openapi.route("prompt_objects"))
    async def prompt(session: str, request: Request) -> Response:
        return await _answer(request, service, session, ObjectsRequest, _prompt)

    @app.post(_SESSIONS + "/{session}/masks", **openapi.route("read_masks"))
    async def masks(session: str, request: Request) -> Response:
        return await _answer(request, service, session, MasksRequest, _read)

    @app.post(_SESSIONS + "/{session}/remove", **openapi.route("remove_object"))
    async def remove(session: str, request: Request) -> Response:
        return await _answer(request, service, session, RemoveRequest, _remove)

    @app.post(_SESSIONS + "/{session}/video", **openapi.route("push_video"))
    async def push_video(session: str, request: Request) -> Response:
        return await _answer(request, service, session, VideoRequest, _push_video, "video")


async def _answer(
    request: Request, service: Service, key: str, schema: type[Any], step: Step, file: str = "image"
) -> Response:
    """Answer with the masks that ``step`` gives, or with the session's state; those to one session one by one."""
    service.sessions.find(key)  # before the body is read

    async def work(upload: Upload) -> Response:
        with service.sessions.using(key) as session:
            parameters = await answering.read_parameters(service, schema, upload)
            async with session.lock:
                answer = await step(service, session, parameters, upload)
            if answer is None:
                return _state(service, session, request)
            return await _masks(service, session, answer, parameters.output, request)

    return await answering.answer(request, service, work, file)


def _state(service: Service, session: VideoSession, request: Request) -> Response:
    stream, run = session.stream, session.run
    document: dict[str, Any] = {
        "request_id": request.state.request_id,
        "session": session.key,
        "frame": stream.frame,
        "next_frame": stream.next_frame,
        "objects": list(stream.objects),
        "masks": {"first": min(session.masks, default=None), "last": max(session.masks, default=None)},
        "seconds_left": round(service.sessions.seconds_left(session), 1),
        "video": None,
    }
    if run is not None:
        state = "tracking" if not run.ended else "done" if run.error is None else "failed"
        document["video"] = {"state": state, "frames": run.frames}
        if run.error is not None:
            document["video"]["error"] = run.error.body("")["error"]
    return JSONResponse(document)


async def _masks(
    service: Service, session: VideoSession, answer: TrackedFrame, output: str, request: Request
) -> Response:
    form, limit = find_format(output), service.settings.max_output_pixels
    height, width = answer.size
    document = {
        "request_id": request.state.request_id,
        "session": session.key,
        "frame": answer.frame,
        "image": {"height": height, "width": width},
    }
    headers = {"X-Frame": str(answer.frame), "X-Objects": ",".join(map(str, answer.objects))}

    def respond(check: Callable[[], None]) -> Response:
        masks = outputs.object_masks(answer, form, limit, check)
        return outputs.response(form, masks, "objects", document, headers)

    if not form.needs_pixels and sum(len(encoded["counts"]) for encoded in answer.rles) <= FEW_RUNS:
        return respond(lambda: None)
    return await service.encode(respond)


# Steps of requests ---------------------------------------------------------------------------------------------


async def _push(service: Service, session: VideoSession, parameters: FrameRequest, upload: Upload) -> Answer:
    file, stream = upload.file, session.stream
    if file is None:
        raise ApiError("invalid_request", ["image"])
    _check_idle(session)
    if parameters.frame not in (None, stream.next_frame):
        raise ApiError("wrong_frame", ["frame"])

    def prepare() -> VideoFrame:
        image = decode_image(file, service.settings.max_pixels, anyio.from_thread.check_cancelled)
        try:
            return frame_of(service.engine.model, image)
        except ValueError:
            raise ApiError("bad_image") from None

    frame = await service.decode(prepare)
    upload.close()
    prompts = await _prompts(service, session, parameters.prompts, frame.size, fresh=True)
    return await session.result(stream.push(frame, prompts, parameters.frame))


async def _prompt(service: Service, session: VideoSession, parameters: ObjectsRequest, upload: Upload) -> Answer:
    _refuse_file(upload)
    stream, frame = session.stream, parameters.frame
    if frame is not None and frame < (stream.next_frame if stream.frame is None else stream.frame):
        raise ApiError("wrong_frame", ["frame"])
    size = stream.size if any(stream.size) else None  # frames to come are taken to be of the size of this one
    prompts = await _prompts(service, session, parameters.prompts, size, fresh=frame not in (None, stream.frame))
    return await session.result(stream.prompt(prompts, frame))


async def _remove(service: Service, session: VideoSession, parameters: RemoveRequest, upload: Upload) -> Answer:
    _refuse_file(upload)
    known = session.stream.session
    if known is not None and parameters.object not in dict(known.kept_prompts):
        raise ApiError("unknown_object", ["object"])
    return await session.result(session.stream.remove(parameters.object))


async def _read(service: Service, session: VideoSession, parameters: MasksRequest, upload: Upload) -> Answer:
    _refuse_file(upload)
    if parameters.frame not in session.masks:
        raise ApiError("unknown_frame", ["frame"])
    return session.masks[parameters.frame]


async def _push_video(service: Service, session: VideoSession, parameters: VideoRequest, upload: Upload) -> Answer:
    """Begin to track a video file, whose first frame is decoded by now; the answer is the session's state."""
    file, settings = upload.file, service.settings
    if file is None:
        raise ApiError("invalid_request", ["video"])
    _check_idle(session)
    if importlib.util.find_spec("av") is None:
        raise ApiError("no_video_files")
    run, side = VideoRun(), service.engine.model.image_size

    def start() -> None:  # noted at once: who cancels this has no other way to end the process
        run.decoder = VideoApart(file, side, settings.max_video_pixels, settings.frame_seconds)

    with service.sessions.place_for_video():
        try:
            await service.decode(start)
            frame = await _next_frame(service, run)
            if frame is None:
                raise ApiError("unsupported_video")
            prompts = await _prompts(service, session, parameters.prompts, frame.size, fresh=True)
        except BaseException as error:
            run.close()
            if isinstance(error, UnsupportedVideoError):
                raise ApiError("unsupported_video") from None
            raise
        session.begin(run, _track(service, session, run, frame, prompts))
    return None


async def _track(
    service: Service, session: VideoSession, run: VideoRun, frame: VideoFrame | None, prompts: Prompts
) -> None:
    """Track the frames of a file one after the other, each as one request."""
    while frame is not None:
        await _track_frame(service, session, frame, prompts)
        run.frames, prompts = run.frames + 1, {}
        frame = await _next_frame(service, run)


async def _track_frame(
    service: Service, session: VideoSession, frame: VideoFrame, prompts: dict[Hashable, Any]
) -> None:
    while True:
        try:
            service.admit()
            try:
                await session.result(session.stream.push(frame, prompts, deadline=math.inf))
                return
            finally:
                service.release()
        except ApiError as error:
            if error.code != "queue_full":
                raise
        except QueueFullError:
            pass
        except answering.ENGINE_ERRORS as error:
            raise answering.error_of(error) from None
        await asyncio.sleep(_RETRY_SECONDS)


async def _next_frame(service: Service, run: VideoRun) -> VideoFrame | None:
    """Return the next frame of a file; None after the last.

    Raises:
        ApiError: it cannot be read; the error says which frame it is.
    """

    def read() -> VideoFrame | None:
        assert run.decoder is not None
        decoded = run.decoder.read()
        if decoded is None:
            return None
        pixels, size = decoded
        return frame_of_video(service.engine.model, torch.from_numpy(pixels).permute(2, 0, 1), *size)

    try:
        return await anyio.to_thread.run_sync(read, limiter=service.reading_videos)
    except VideoError as error:
        raise ApiError(_CODES[type(error)], ["frame", run.frames]) from None


def _check_idle(session: VideoSession) -> None:
    if session.is_running:
        raise ApiError("session_busy")


def _refuse_file(upload: Upload) -> None:
    if upload.file is not None:
        raise ApiError("invalid_request", ["image"])


# Prompts -------------------------------------------------------------------------------------------------------


async def _prompts(
    service: Service, session: VideoSession, given: list[ObjectPrompt], size: tuple[int, int] | None, fresh: bool
) -> Prompts:
    """Return the prompts of a request by object, checked against the frame's size and what the session may hold.

    Args:
        size: of the frame; None where none has come yet.
        fresh: they are for a frame to come, where clicks do not join earlier ones.
    """
    _check_room(service, session, given, fresh)
    text = sum(len(prompt.mask.counts) for prompt in given if prompt.mask is not None)

    def convert() -> Prompts:
        if size is not None:
            check_inside(given, size)
        return {each.object: _converted(each, index, size, service) for index, each in enumerate(given)}

    if not text and len(given) <= FEW_PROMPTS:
        return convert()
    return await service.encode(lambda check: convert())


def _check_room(service: Service, session: VideoSession, given: list[ObjectPrompt], fresh: bool) -> None:
    stream, settings = session.stream, service.settings
    if not given or stream.session is None:
        return
    kept = stream.session.kept_prompts
    objects = {name for name, _ in kept} | {prompt.object for prompt in given}
    full = len(kept) + len(given) > settings.max_session_prompts or len(objects) > settings.max_session_objects
    if full or stream.nbytes > settings.max_session_bytes:
        raise ApiError("session_full")
    for index, prompt in enumerate(given):
        if not fresh and len(prompt.points or ()) + stream.session.num_points(prompt.object) > wire.MAX_POINTS:
            raise ApiError("session_full", ["prompts", index, "points"])


def _converted(prompt: ObjectPrompt, index: int, size: tuple[int, int] | None, service: Service) -> Any:
    if prompt.mask is None:
        return wire.from_dict({"points": prompt.points, "labels": prompt.labels, "box": prompt.box})
    height, width = prompt.mask.size
    too_large = height * width > service.settings.max_pixels
    if too_large or size not in (None, (height, width)) or len(prompt.mask.counts) > height * width + 1:
        raise ApiError("invalid_request", ["prompts", index, "mask", "size"])
    try:
        return rle.decode(prompt.mask.model_dump())
    except ValueError:
        raise ApiError("invalid_request", ["prompts", index, "mask", "counts"]) from None
