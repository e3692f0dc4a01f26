"""OpenAPI descriptions of the routes: bodies, answers, examples."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ..masks.formats import FORMATS
from .errors import KINDS
from .schemas import (
    AutomaticRequest,
    EmbedRequest,
    FrameRequest,
    MasksRequest,
    ObjectsRequest,
    RemoveRequest,
    SegmentRequest,
    SessionRequest,
    VideoRequest,
)

DESCRIPTION = """Masks for clicks and boxes on images. Send an image once, as multipart part `image` (JPEG, PNG or
WebP); later prompts name its `embedding`. Points lie in the image, edges included. A box to ask with is x0, y0, x1, y1
with x0 <= x1 and y0 <= y1; it may reach over the image's edges, but must meet the image. The `bbox` of a mask is
COCO's: x, y, width and height in whole pixels, zeros if it is empty. Of a SAM 2 model each prompt's answer has an
`object_score`, a logit that is above 0 where the model sees the object. Errors have a fixed `code` and a
`request_id`.

Videos are tracked in sessions: open one, send it frames one by one or a video file, prompt objects by names of your
own (A-Z, a-z, 0-9, `_`, `.`, `-`; 64 characters), and read masks. Only the newest frame and frames to come can be
prompted; of a new object the first prompt is where it begins. A file is tracked in the background: the session's
`video` says how far it is. If it is damaged, that names the frame, and the masks before it stay. A session that nobody
uses is closed."""

_ID = "0123456789abcdef0123456789abcdef"
_RLE = {"size": [300, 451], "counts": "Xo:1Pb22N1O1O1O"}
_MASK = {"segmentation": _RLE, "area": 5231, "bbox": [120, 80, 95, 71], "predicted_iou": 0.94}
_IMAGE = {"embedding": _ID, "image": {"height": 300, "width": 451}}
_FRAME = {
    "request_id": "9f86d081884c7d65",
    "session": _ID,
    "frame": 0,
    "image": {"height": 300, "width": 451},
    "objects": [{"id": "cat", **_MASK, "object_score": 9.1}],
}
_SESSION = {
    "request_id": "9f86d081884c7d65",
    "session": _ID,
    "frame": 7,
    "next_frame": 8,
    "objects": ["cat"],
    "masks": {"first": 0, "last": 7},
    "seconds_left": 120.0,
    "video": {"state": "tracking", "frames": 8},
}
_EXAMPLES: dict[str, Any] = {
    "embed": {"request_id": "9f86d081884c7d65", **_IMAGE},
    "segment": {
        "request_id": "9f86d081884c7d65",
        **_IMAGE,
        "result": _ID,
        "prompts": [{"best": 0, "masks": [_MASK]}],
    },
    "automatic": {
        "request_id": "9f86d081884c7d65",
        **_IMAGE,
        "masks": [{**_MASK, "point_coords": [[150.5, 110.0]], "stability_score": 0.97, "crop_box": [0, 0, 451, 300]}],
    },
    **dict.fromkeys(("push_frame", "prompt_objects", "remove_object", "read_masks"), _FRAME),
    **dict.fromkeys(("open_session", "session", "push_video"), _SESSION),
    "close_session": {"request_id": "9f86d081884c7d65", "session": _ID},
    "live": {"live": True},
    "ready": {"ready": True},
    "model": {"name": "nano", "versions": [_ID], "platform": "pytorch", "inputs": [], "outputs": [], "parameters": {}},
}
_REQUESTS: dict[str, Any] = {
    "segment": {
        "embedding": _ID,
        "prompts": [
            {
                "points": [[120, 80], [300, 200]],
                "labels": [1, 0],
                "mask_input": {"result": _ID, "prompt": 0, "mask": 1},
            },
            {"box": [10, 20, 200, 240]},
        ],
    },
    "automatic": {"embedding": _ID, "points_per_side": 16},
    "open_session": {},
    "prompt_objects": {"prompts": [{"object": "cat", "points": [[120, 80]]}]},
    "remove_object": {"object": "cat"},
    "read_masks": {"frame": 3, "output": "rle"},
}
# The routes that take a file, and the name of its part.
_FILES = {"embed": "image", "segment": "image", "automatic": "image", "push_frame": "image", "push_video": "video"}
_KINDS = {"image": "image/jpeg, image/png, image/webp", "video": "video/mp4, video/webm, video/quicktime"}
_SEGMENTED = {
    "type": "object",
    "properties": {
        "prompts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["best", "masks"],
                "properties": {
                    "best": {"type": "integer", "description": "the mask of the highest predicted IoU"},
                    "object_score": {
                        "type": "number",
                        "description": "of SAM 2: a logit, above 0 where the model sees the object",
                    },
                    "masks": {"type": "array", "items": {"type": "object"}},
                },
            },
        }
    },
}
_SCHEMAS: dict[str, type[BaseModel]] = {
    "embed": EmbedRequest,
    "segment": SegmentRequest,
    "automatic": AutomaticRequest,
    "open_session": SessionRequest,
    "push_frame": FrameRequest,
    "push_video": VideoRequest,
    "prompt_objects": ObjectsRequest,
    "remove_object": RemoveRequest,
    "read_masks": MasksRequest,
}
# Those whose answers are masks, in any format.
_OF_MASKS = ("segment", "automatic", "push_frame", "prompt_objects", "remove_object", "read_masks")
_TITLES = {
    "embed": "Embed an image for later prompts",
    "segment": "Masks for points and boxes",
    "automatic": "Masks of everything",
    "open_session": "Open a session of video",
    "session": "How far a session is",
    "push_frame": "Masks of all objects on the next frame",
    "push_video": "Track a video file in the background",
    "prompt_objects": "Prompt objects on the current frame, or on one to come",
    "remove_object": "Forget an object",
    "read_masks": "Masks of a frame that was tracked",
    "close_session": "Close a session",
    "live": "The process runs",
    "ready": "Requests are taken",
    "model": "The model's metadata",
    "metrics": "Counters for Prometheus",
}
_REFUSALS = (400, 401, 403, 408, 413, 415, 422, 503, 504, 507)


def route(name: str) -> dict[str, Any]:
    """Return the keyword arguments of a route's decorator."""
    refusals = [401, 403]
    if name in _SCHEMAS:
        refusals = [*_REFUSALS] if name in ("embed", "open_session") else [*_REFUSALS, 404, 409]
    elif name in ("session", "close_session"):
        refusals = [401, 403, 404]
    elif name in ("live", "ready"):
        refusals = []
    elif name == "model":
        refusals = [401, 403, 404]
    responses: dict[int | str, Any] = {status: _error(status) for status in sorted(refusals)}
    if name == "ready":
        responses[503] = {"description": "Not ready", "content": {"application/json": {"schema": {"type": "object"}}}}
    responses[200] = {"description": "The answer", "content": _answer(name)}
    described: dict[str, Any] = {
        "summary": _TITLES[name], "operation_id": name, "response_model": None, "responses": responses,
    }  # fmt: skip
    if name in _SCHEMAS:
        described["openapi_extra"] = {"requestBody": {"required": True, "content": _body(name)}}
    return described


def _answer(name: str) -> dict[str, Any]:
    if name == "metrics":
        return {"text/plain": {"schema": {"type": "string"}}}
    schema = _SEGMENTED if name == "segment" else {"type": "object"}
    content: dict[str, Any] = {"application/json": {"schema": schema, "example": _EXAMPLES[name]}}
    if name in _OF_MASKS:
        for form in FORMATS.values():
            content.setdefault(form.media_type, {"schema": {"type": "string", "format": "binary"}})
    return content


def _error(status: int) -> dict[str, Any]:
    codes = [code for code, kind in KINDS.items() if kind.status == status]
    schema = {
        "type": "object",
        "required": ["error", "request_id"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {
                    "code": {"type": "string", "enum": codes},
                    "message": {"type": "string"},
                    "where": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                },
            },
            "request_id": {"type": "string"},
        },
    }
    return {
        "description": " ".join(KINDS[code].message for code in codes),
        "content": {"application/json": {"schema": schema}},
    }


def _body(name: str) -> dict[str, Any]:
    schema = _inline(_SCHEMAS[name].model_json_schema())
    fields = {field: value for field, value in schema.get("properties", {}).items() if field != "embedding"}
    required = [field for field in schema.get("required", []) if field in fields]
    content: dict[str, Any] = {}
    if file := _FILES.get(name):
        multipart = {
            "type": "object",
            "properties": {file: {"type": "string", "format": "binary"}, **fields},
            "required": [file, *required],
            "additionalProperties": False,
        }
        encoding = {file: {"contentType": _KINDS[file]}}
        encoding |= {field: {"contentType": "application/json"} for field in fields}
        content["multipart/form-data"] = {"schema": multipart, "encoding": encoding}
    if name in _REQUESTS:
        needed = ["embedding", *required] if "embedding" in schema["properties"] else required
        content["application/json"] = {"schema": {**schema, "required": needed}, "example": _REQUESTS[name]}
    return content


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without references, which would point outside the request's place in the document."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(value) for value in node] if isinstance(node, list) else node

    return resolve(schema)
