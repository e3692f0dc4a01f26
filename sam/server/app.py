"""The routes of the service, and the steps of one request."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .. import __version__
from ..embedding import ImageEmbedding
from ..engine import AutomaticOptions, Engine, KeyedImage, PromptMasks
from ..masks.formats import find_format
from ..prompts import wire
from ..prompts.prompt import Prompt
from . import answering, openapi, outputs, video
from .answering import FEW_PROMPTS, FEW_RUNS
from .bodies import Upload
from .errors import ApiError
from .middleware import Gatekeeper
from .schemas import AutomaticRequest, EmbedRequest, PromptRequest, SegmentRequest, check_inside
from .service import Service
from .settings import Settings
from .uploads import decode_image

T = TypeVar("T")
STATIC = Path(__file__).parent / "static"
PAGE = (("/", "index.html"), *((f"/{name}", name) for name in ("page.js", "film.js", "masks.js", "page.css")))
# Answers of up to this many prompts are stored, so that a later prompt can refer to their masks.
_REMEMBERED_PROMPTS = 16
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """Make the ASGI application around an engine; ``app.state.service`` is its state.

    It warms up when it is started and does not close the engine.
    """
    service = Service(engine, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        await anyio.to_thread.run_sync(lambda: None)  # anyio loads at its first use, which shall not be a request
        yield
        service.sessions.close_all()

    app = FastAPI(
        title="Segment Anything", version=__version__, description=openapi.DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Gatekeeper, service=service)
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    _add_model_routes(app, service)
    video.add_routes(app, service)
    _add_other_routes(app, service)
    for route in app.routes:
        service.metrics.declare(getattr(route, "path", "other"), getattr(route, "responses", None) or (200,))
    service.metrics.declare("other", (404,))
    return app


def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError({404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request"))
    assert isinstance(error, ApiError)
    request.app.state.service.metrics.errors.labels(error.code).inc()
    return JSONResponse(error.body(request.state.request_id), error.status, error.headers)


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embed", **openapi.route("embed"))
    async def embed(request: Request) -> Response:
        return await _answer(request, service, EmbedRequest, _embed)

    @app.post("/v1/segment", **openapi.route("segment"))
    async def segment(request: Request) -> Response:
        return await _answer(request, service, SegmentRequest, _segment)

    @app.post("/v1/automatic", **openapi.route("automatic"))
    async def automatic(request: Request) -> Response:
        return await _answer(request, service, AutomaticRequest, _automatic)


def _add_other_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v2/health/live", **openapi.route("live"))
    async def live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready", **openapi.route("ready"))
    async def ready() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2/models/{name}", **openapi.route("model"))
    async def model(name: str) -> Response:
        if name != service.engine.model.name:
            raise ApiError("unknown_model")
        return JSONResponse(_describe(service.engine))

    @app.get("/metrics", **openapi.route("metrics"))
    async def metrics() -> Response:
        service.metrics.ready.set(service.ready)
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, name in PAGE:
        app.get(path, include_in_schema=False)(_static(STATIC / name))


def _static(path: Path) -> Callable[[], Awaitable[Response]]:
    """Serve the file from memory: no request chooses a range or a date of it."""
    content, kind = path.read_bytes(), mimetypes.guess_type(path.name)[0]
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}

    async def page() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return page


async def _answer(
    request: Request,
    service: Service,
    schema: type[Any],
    work: Callable[[Service, Any, _Subject, str], Awaitable[Response]],
) -> Response:
    async def checked_work(upload: Upload) -> Response:
        parameters, subject = await _validate(service, schema, upload)
        upload.close()
        return await work(service, parameters, subject, request.state.request_id)

    return await answering.answer(request, service, checked_work)


class _Subject:
    """The image of a request: a cached embedding, or pixels that may become one."""

    def __init__(self, key: str, source: ImageEmbedding | KeyedImage) -> None:
        self.key = key
        self.source = source

    @property
    def size(self) -> tuple[int, int]:
        return self.source.geometry.original_size

    def json(self) -> dict[str, Any]:
        return {"embedding": self.key, "image": {"height": self.size[0], "width": self.size[1]}}


async def _validate(service: Service, schema: type[BaseModel], upload: Upload) -> tuple[Any, _Subject]:
    parameters = await answering.read_parameters(service, schema, upload)
    key = getattr(parameters, "embedding", None)
    if (key is None) == (upload.file is None):
        raise ApiError("invalid_request", ["image"])
    subject = await _subject(service, key, upload)
    if isinstance(parameters, SegmentRequest):
        prompts = parameters.prompts
        await service.interpret(lambda: check_inside(prompts, subject.size), len(prompts), FEW_PROMPTS)
    return parameters, subject


async def _subject(service: Service, key: str | None, upload: Upload) -> _Subject:
    if key is not None:
        embedding = service.engine.embedding(key)
        if embedding is None:
            raise ApiError("unknown_embedding")
        return _Subject(key, embedding)
    file = upload.file
    assert file is not None

    def prepare() -> KeyedImage:
        image = decode_image(file, service.settings.max_pixels, anyio.from_thread.check_cancelled)
        try:
            return service.engine.prepare(image)
        except ValueError:
            raise ApiError("bad_image") from None

    prepared = await service.decode(prepare)
    return _Subject(prepared.key, prepared)


async def _embed(service: Service, parameters: EmbedRequest, subject: _Subject, request_id: str) -> Response:
    await asyncio.wrap_future(service.engine.embed(_pixels(subject)))
    return JSONResponse({"request_id": request_id, **subject.json()})


def _pixels(subject: _Subject) -> KeyedImage:
    assert isinstance(subject.source, KeyedImage)
    return subject.source


async def _segment(service: Service, parameters: SegmentRequest, subject: _Subject, request_id: str) -> Response:
    prompts = await service.interpret(
        lambda: [_prompt(service, prompt, subject.key) for prompt in parameters.prompts],
        len(parameters.prompts),
        FEW_PROMPTS,
    )
    remembered = len(prompts) <= _REMEMBERED_PROMPTS
    future = service.engine.segment(subject.source, prompts, parameters.multimask, keep_logits=remembered)
    answers: list[PromptMasks] = await asyncio.wrap_future(future)
    result = None
    if remembered:
        logits = [answer.low_res_logits for answer in answers if answer.low_res_logits is not None]
        result = service.results.put(subject.key, logits, [answer.best for answer in answers])
    form, limit = find_format(parameters.output), service.settings.max_output_pixels

    def respond(check: Callable[[], None]) -> Response:
        masks = outputs.prompt_masks(answers, form, subject.size, limit, check)
        document = {"request_id": request_id, **subject.json(), "result": result}
        headers = {"X-Embedding": subject.key, **({"X-Result": result} if result else {})}
        return outputs.response(form, masks, "prompts", document, headers)

    runs = sum(len(encoded["counts"]) for answer in answers for encoded in answer.rles)
    if not form.needs_pixels and runs <= FEW_RUNS:
        return respond(lambda: None)
    return await service.encode(respond)


def _prompt(service: Service, prompt: PromptRequest, embedding: str) -> Prompt:
    reference = prompt.mask_input
    mask_input = None
    if reference is not None:
        mask_input = service.results.mask_input(reference.result, embedding, reference.prompt, reference.mask)
    return wire.from_dict(vars(prompt), mask_input)


async def _automatic(service: Service, parameters: AutomaticRequest, subject: _Subject, request_id: str) -> Response:
    options = AutomaticOptions(**parameters.model_dump(exclude={"embedding", "output"}))
    records = await asyncio.wrap_future(service.engine.automatic(subject.source, options))
    form, limit = find_format(parameters.output), service.settings.max_output_pixels

    def respond(check: Callable[[], None]) -> Response:
        masks = outputs.automatic_masks(records, form, subject.size, limit, check)
        document = {"request_id": request_id, **subject.json()}
        return outputs.response(form, masks, "masks", document, {"X-Embedding": subject.key})

    return await service.encode(respond)


def _describe(engine: Engine) -> dict[str, Any]:
    """Return metadata in the form of the Open Inference Protocol."""
    model = engine.model
    return {
        "name": model.name,
        "versions": [] if model.model_hash is None else [model.model_hash],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, 3]}],
        "outputs": [{"name": "masks", "datatype": "BOOL", "shape": [-1, -1, -1, -1]}],
        "parameters": {
            "image_size": model.image_size,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernels": model.resolved_kernels,
        },
    }
