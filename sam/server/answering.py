"""The steps of every request to the model: its body, its admission, its deadline, and what its errors are called."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import TypeVar

import anyio
from fastapi import Request, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from .. import engine as engines
from .bodies import Upload
from .errors import ApiError
from .schemas import read_document, read_fields
from .service import Service, cancel_on_disconnect

Parameters = TypeVar("Parameters", bound=BaseModel)
# Up to these sizes a request is validated and answered on the event loop; larger ones go to a thread.
SMALL_TEXT, FEW_PROMPTS, FEW_RUNS = 2**16, 32, 2**13
_CODES: dict[type[Exception], str] = {
    TimeoutError: "deadline_exceeded",
    engines.DeadlineExceededError: "deadline_exceeded",
    engines.QueueFullError: "queue_full",
    engines.OutOfMemoryError: "out_of_memory",
    engines.EngineClosedError: "draining",
    engines.EngineFailedError: "model_failed",
}
ENGINE_ERRORS = tuple(_CODES)


def error_of(error: Exception) -> ApiError:
    """Return what clients see of one of :data:`ENGINE_ERRORS`."""
    return ApiError(_CODES[type(error)])


async def answer(
    request: Request, service: Service, work: Callable[[Upload], Awaitable[Response]], file: str = "image"
) -> Response:
    """Read the body, admit, and answer with ``work``'s response, within the deadline and while the client stays.

    Args:
        work: takes the body, which it may close; it is closed afterwards.
        file: the name of the part that is a file.
    """
    deadline = asyncio.get_running_loop().time() + service.engine.deadline
    service.check_open()
    try:
        with service.answering(), closing(await service.bodies.read(request, deadline, file)) as upload:
            service.admit()
            try:
                return await _compute(request, lambda: work(upload), deadline)
            finally:
                service.release()
    except MemoryError:
        raise ApiError("out_of_memory") from None
    except ClientDisconnect:
        return Response(status_code=499)


async def _compute(request: Request, work: Callable[[], Awaitable[Response]], deadline: float) -> Response:
    try:
        with anyio.fail_after(max(0.001, deadline - asyncio.get_running_loop().time())):
            response = await cancel_on_disconnect(request.receive, work)
    except ENGINE_ERRORS as error:
        raise error_of(error) from None
    return response if response is not None else Response(status_code=499)


async def read_parameters(service: Service, schema: type[Parameters], upload: Upload) -> Parameters:
    """Validate the texts of a body.

    Raises:
        ApiError: they are not of the schema.
    """
    return await service.interpret(lambda: read_text(schema, upload), upload.text_size, SMALL_TEXT)


def read_text(schema: type[Parameters], upload: Upload) -> Parameters:
    """Validate the texts of a body in this thread; see :func:`read_parameters`."""
    text = upload.text
    return read_document(schema, text) if isinstance(text, bytes) else read_fields(schema, text)
