"""The JSON of requests, checked strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from ..modeling.prompt_encoder import MAX_COORDINATE
from ..prompts import check_corners
from .errors import ApiError

MAX_PROMPTS = 1024
MAX_POINTS = 64
Output = Literal["rle", "png", "polygons", "npz"]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Coordinate = Annotated[FiniteFloat, Field(strict=True, ge=0, le=2**24)]
# A box may reach over the image's edges, as in Python.
Side = Annotated[FiniteFloat, Field(strict=True, ge=-MAX_COORDINATE, le=MAX_COORDINATE)]
Box = Annotated[tuple[Side, Side, Side, Side], AfterValidator(check_corners)]
Share = Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)]
# One error says enough, and to note each of 65,536 takes long.
Points = Annotated[list[tuple[Coordinate, Coordinate]], Field(min_length=1, max_length=MAX_POINTS, fail_fast=True)]
Labels = Annotated[list[Annotated[StrictInt, Field(ge=0, le=1)]], Field(max_length=MAX_POINTS, fail_fast=True)]
Request = TypeVar("Request", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MaskReference(_Strict):
    """A mask of an earlier result on the same image, as a hint of where the object is."""

    result: Identifier
    prompt: Annotated[StrictInt, Field(ge=0, lt=MAX_PROMPTS)] = 0
    mask: Annotated[StrictInt, Field(ge=0, lt=16)] | None = Field(None, description="default: the best one")


class PromptRequest(_Strict):
    """One question about the image; any combination of points, a box and a mask."""

    points: Points | None = Field(None, description="clicks as [x, y] in pixels of the image")
    labels: Labels | None = Field(
        None, description="1 for a click on the object, 0 for one on the background; default: all 1"
    )
    box: Box | None = Field(
        None, description="x0, y0, x1, y1 in pixels of the image, x0 <= x1, y0 <= y1; it may reach over the edges"
    )
    mask_input: MaskReference | None = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> PromptRequest:
        if self.points is None and self.box is None:
            raise ValueError("points or a box are needed")
        if self.labels is not None and (self.points is None or len(self.labels) != len(self.points)):
            raise ValueError("as many labels as points are needed")
        return self


class EmbedRequest(_Strict):
    """Nothing but the image."""


class SegmentRequest(_Strict):
    embedding: Identifier | None = Field(None, description="of an earlier answer, in place of the image")
    prompts: Annotated[list[PromptRequest], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    multimask: StrictBool = Field(True, description="three masks a prompt instead of one")
    output: Output = "rle"


class AutomaticRequest(_Strict):
    embedding: Identifier | None = Field(None, description="of an earlier answer, in place of the image")
    points_per_side: Annotated[StrictInt, Field(ge=1, le=64)] = 32
    pred_iou_thresh: Share = 0.88
    stability_score_thresh: Share = 0.95
    box_nms_thresh: Share = 0.7
    output: Output = "rle"


_NAMES = {
    name for model in (MaskReference, PromptRequest, SegmentRequest, AutomaticRequest) for name in model.model_fields
}


def validate(schema: type[Request], values: Any) -> Request:
    """``values`` as a ``schema``; the error names the place, never what stood there."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        path = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
        raise ApiError(
            "invalid_request", [part if isinstance(part, int) or part in _NAMES else "?" for part in path]
        ) from None
