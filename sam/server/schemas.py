"""Schemas of requests, validated strictly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..amg.defaults import NANO_THRESHOLDS, SAM2_THRESHOLDS, SAM_THRESHOLDS
from ..masks.formats import FORMATS, find_format
from ..prompts import wire
from ..prompts.checks import check_corners
from .errors import ApiError

# Looked up for each request and each description of the routes, so that the table alone says which there are.
Output = Annotated[
    str,
    AfterValidator(lambda name: find_format(name).name),
    Field(json_schema_extra=lambda schema: schema.update(enum=list(FORMATS))),
]
Identifier = Annotated[str, Field(pattern=f"^{wire.IDENTIFIER}$")]
Coordinate = Annotated[FiniteFloat, Field(strict=True, ge=wire.POINTS.low, le=wire.POINTS.high)]
Side = Annotated[FiniteFloat, Field(strict=True, ge=wire.BOX.low, le=wire.BOX.high)]
Box = Annotated[tuple[Side, Side, Side, Side], AfterValidator(check_corners)]
Label = Annotated[StrictInt, Field(ge=wire.LABELS.low, le=wire.LABELS.high)]
Share = Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)]
# One error says enough, and to note each of 65,536 takes long.
Points = Annotated[list[tuple[Coordinate, Coordinate]], Field(min_length=1, max_length=wire.MAX_POINTS, fail_fast=True)]
Labels = Annotated[list[Label], Field(max_length=wire.MAX_POINTS, fail_fast=True)]
Request = TypeVar("Request", bound=BaseModel)
# Of objects of a video: their names, frames, and masks, whose runs are compressed as text or listed.
MAX_OBJECTS, MAX_COUNTS, MAX_RUNS = 64, 2**21, wire.MAX_PROMPTS * wire.MAX_POINTS
ObjectName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
FrameNumber = Annotated[StrictInt, Field(ge=0, le=10**9)]
MaskSide = Annotated[StrictInt, Field(ge=1, le=2**16)]
RunLengths = Annotated[
    list[Annotated[StrictInt, Field(ge=0, le=2**32)]],
    Field(max_length=wire.MAX_PROMPTS * wire.MAX_POINTS, fail_fast=True),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MaskReference(_Strict):
    """A mask of an earlier result on the same image, as a hint of where the object is."""

    result: Identifier
    prompt: Annotated[StrictInt, Field(ge=0, lt=wire.MAX_PROMPTS)] = 0
    mask: Annotated[StrictInt, Field(ge=0, lt=wire.MAX_MASKS)] | None = Field(None, description="default: the best one")


class PromptRequest(_Strict):
    """One question about the image; any combination of points, a box and a mask."""

    points: Points | None = Field(None, description=wire.POINTS.description)
    labels: Labels | None = Field(None, description=wire.LABELS.description)
    box: Box | None = Field(None, description=wire.BOX.description)
    mask_input: MaskReference | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> PromptRequest:
        wire.check_parts(self.points, self.labels, self.box)
        return self


class EmbedRequest(_Strict):
    """A request that holds nothing but the image."""


Prompts = Annotated[list[PromptRequest], Field(min_length=1, max_length=wire.MAX_PROMPTS, fail_fast=True)]


class SegmentRequest(_Strict):
    """Prompts on one image."""

    embedding: Identifier | None = Field(None, description="of an earlier answer, in place of the image")
    prompts: Prompts
    multimask: StrictBool = Field(True, description="three masks per prompt instead of one")
    output: Output = "rle"


def _suited(name: str) -> str:
    values = [thresholds[name] for thresholds in (SAM_THRESHOLDS, SAM2_THRESHOLDS, NANO_THRESHOLDS)]
    return "by default what suits the model: {} for SAM, {} for SAM 2, {} for the embedded nano".format(*values)


class AutomaticRequest(_Strict):
    """Options of masks of everything on one image."""

    embedding: Identifier | None = Field(None, description="of an earlier answer, in place of the image")
    points_per_side: Annotated[StrictInt, Field(ge=1, le=64)] = 32
    pred_iou_thresh: Share | None = Field(None, description=_suited("pred_iou_thresh"))
    stability_score_thresh: Share | None = Field(None, description=_suited("stability_score_thresh"))
    box_nms_thresh: Share = 0.7
    output: Output = "rle"


class MaskRequest(_Strict):
    """A mask of an object, as COCO's run lengths at the frame's size."""

    size: tuple[MaskSide, MaskSide]
    counts: Annotated[str, Field(max_length=MAX_COUNTS)] | RunLengths


class ObjectPrompt(_Strict):
    """A prompt of one object of a video: points, a box or both, or a mask."""

    object: ObjectName
    points: Points | None = Field(None, description=wire.POINTS.description)
    labels: Labels | None = Field(None, description=wire.LABELS.description)
    box: Box | None = Field(None, description=wire.BOX.description)
    mask: MaskRequest | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> ObjectPrompt:
        if self.mask is None:
            wire.check_parts(self.points, self.labels, self.box)
        elif not (self.points is self.labels is self.box is None):
            raise ValueError("a mask stands alone")
        return self


def _check_objects(prompts: list[ObjectPrompt]) -> list[ObjectPrompt]:
    if len({prompt.object for prompt in prompts}) < len(prompts):
        raise ValueError("an object has one prompt")
    return prompts


ObjectPrompts = Annotated[
    list[ObjectPrompt], Field(max_length=MAX_OBJECTS, fail_fast=True), AfterValidator(_check_objects)
]


class SessionRequest(_Strict):
    """Options of a session."""

    fill_hole_area: Annotated[StrictInt, Field(ge=0, le=2**20)] = Field(
        8, description="holes of up to so many low-resolution pixels are filled"
    )


class FrameRequest(_Strict):
    """The next frame of a video, and prompts on it."""

    frame: FrameNumber | None = Field(None, description="the number that it must have; default: the next one")
    prompts: ObjectPrompts = Field(default_factory=list)
    output: Output = "rle"


class VideoRequest(_Strict):
    """A video file, and prompts on its first frame."""

    prompts: ObjectPrompts = Field(default_factory=list)


class ObjectsRequest(_Strict):
    """Prompts on the current frame, or on one to come."""

    frame: FrameNumber | None = Field(None, description="default: the current one, or the first")
    prompts: Annotated[ObjectPrompts, Field(min_length=1)]
    output: Output = "rle"


class RemoveRequest(_Strict):
    """An object that the session shall forget."""

    object: ObjectName
    output: Output = "rle"


class MasksRequest(_Strict):
    """A frame whose masks are to be read."""

    frame: FrameNumber
    output: Output = "rle"


_MODELS = (
    *(MaskReference, PromptRequest, SegmentRequest, AutomaticRequest),
    *(
        MaskRequest,
        ObjectPrompt,
        SessionRequest,
        FrameRequest,
        VideoRequest,
        ObjectsRequest,
        RemoveRequest,
        MasksRequest,
    ),
)
_NAMES = {name for model in _MODELS for name in model.model_fields}
# What a form's field of this name holds, for each schema that has it.
_PROMPTS: dict[type[BaseModel], TypeAdapter[Any]] = {
    SegmentRequest: TypeAdapter(Prompts), **dict.fromkeys((FrameRequest, VideoRequest), TypeAdapter(ObjectPrompts))
}  # fmt: skip
# Fields that are text even if they look like a number.
_TEXTS = ("embedding", "output")
_MAX_SMALL_TEXT = 1024
# How often these occur in the largest valid document, with a margin: they determine a parser's time. A prompt has a
# list of points, each a list, one of labels and a box; four names; and three more, with an identifier, in a reference.
_PER_PROMPT = {"[": wire.MAX_POINTS + 3, "{": 2, ",": 3 * wire.MAX_POINTS + 7, '"': 16, ":": 7}
_MAX_OCCURRENCES = {sign: wire.MAX_PROMPTS * count + 64 for sign, count in _PER_PROMPT.items()}


def read_document(schema: type[Request], document: bytes) -> Request:
    """Validate a JSON document; the error names the place, never the value.

    Raises:
        ApiError: no JSON in UTF-8, or not of the schema.
    """
    try:
        text = document.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ApiError("bad_request") from None
    _check_effort(text)
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise _refusal(error, (), "bad_request") from None


def read_fields(schema: type[Request], fields: dict[str, str]) -> Request:
    """Validate the fields of a form. Each is JSON if it parses as JSON, else text: ``output=png`` needs no quotes.

    Raises:
        ApiError: not of the schema.
    """
    values: dict[str, Any] = {}
    for name, text in fields.items():
        if name == "prompts" and schema in _PROMPTS:
            _check_effort(text)
            try:
                values[name] = _PROMPTS[schema].validate_json(text)
            except ValidationError as error:
                raise _refusal(error, (name,), "invalid_request") from None
        elif len(text) > _MAX_SMALL_TEXT:
            raise ApiError("invalid_request", _known((name,)))
        else:
            values[name] = _json_or_text(name, text)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, (), "invalid_request") from None


def check_inside(prompts: Sequence[PromptRequest | ObjectPrompt], size: tuple[int, int]) -> None:
    """Check that points lie in an image of (height, width), and that boxes meet it.

    Raises:
        ApiError: one does not; it says which.
    """
    for index, prompt in enumerate(prompts):
        outside = wire.find_outside(prompt.points, prompt.box, size)
        if outside is not None:
            raise ApiError("out_of_image", ["prompts", index, *outside])


def _check_effort(text: str) -> None:
    """Refuse text that would keep a parser busy: every other thread waits meanwhile."""
    if any(text.count(sign) > most for sign, most in _MAX_OCCURRENCES.items()):
        raise ApiError("invalid_request", [])


def _json_or_text(name: str, text: str) -> Any:
    if name in _TEXTS and not text.startswith('"'):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _refusal(error: ValidationError, place: tuple[str | int, ...], not_json: str) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(not_json, _known(place) or None)
    return ApiError("invalid_request", _known((*place, *first["loc"])))


def _known(path: Sequence[str | int]) -> list[str | int]:
    return [part if isinstance(part, int) or part in _NAMES else "?" for part in path]
