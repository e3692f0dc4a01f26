"""A model that waits, notes what it is asked for, and fails when told to."""

from __future__ import annotations

import threading
from typing import Any

import torch
from waiting import SECONDS

from sam import Sam


class Gate:
    """Holds the model before each pass until it is opened, and notes the passes."""

    def __init__(self, model: Sam) -> None:
        self.model = model
        self.open = threading.Event()
        self.entered = threading.Event()
        self.encoded: list[int] = []
        self.decoded: list[int] = []
        self.faults: list[BaseException] = []
        self.shortage_above: int | None = None
        encode, decode, decode_tokens = model.encode, model.decode, model.decode_tokens
        inside = False  # of decode, which asks decode_tokens for chunks of its own

        def gated_encode(images: Any, batch_size: int | None = None) -> Any:
            self._pass(self.encoded, len(images))
            return encode(images, batch_size)

        def gated_decode(embeddings: Any, batch: Any, multimask_output: bool) -> Any:
            nonlocal inside
            self._pass(self.decoded, len(batch))
            inside = True
            try:
                return decode(embeddings, batch, multimask_output)
            finally:
                inside = False

        def gated_decode_tokens(embeddings: Any, batch: Any, shared: Any = None) -> Any:
            if not inside:
                self._pass(self.decoded, len(batch))
            return decode_tokens(embeddings, batch, shared)

        model.encode = gated_encode  # type: ignore[method-assign,assignment]
        model.decode_tokens = gated_decode_tokens  # type: ignore[method-assign]
        model.decode = gated_decode  # type: ignore[method-assign]

    def _pass(self, passes: list[int], size: int) -> None:
        passes.append(size)
        self.entered.set()
        assert self.open.wait(SECONDS)
        if self.faults:
            raise self.faults.pop(0)
        if self.shortage_above is not None and size > self.shortage_above:
            raise torch.OutOfMemoryError("CUDA out of memory.")
