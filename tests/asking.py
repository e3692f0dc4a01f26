"""Requests to a model that replays, held against one that runs eagerly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from comparison import assert_close_l2
from models import random_image

from sam import ImageEmbedding, MaskPrediction, Prompt, Sam
from sam.inference import Graphs
from sam.sessions.interactive import Answer

_run = Graphs.run


class Rerun:
    """Does what a graph does: the same work on the same memory."""

    recorded = 0

    def __init__(self, function: Callable[[], None]) -> None:
        Rerun.recorded += 1
        self._function = function

    def replay(self) -> None:
        self._function()


def run_into_poisoned_outputs(graphs: Graphs, *arguments: object) -> object:
    """``Graphs.run`` with NaN where the results will be."""
    with graphs._lock:  # not while another thread reads its results
        for (place, *_), buffer in graphs._buffers.items():
            if place[0] == "output":
                buffer.tensor.fill_(torch.nan if buffer.tensor.is_floating_point() else -7)
    return _run(graphs, *arguments)  # type: ignore[arg-type]


def random_prompt(rng: np.random.Generator, mask: bool) -> Prompt:
    count = int(rng.integers(0, 10))
    box = np.sort(rng.uniform(0, 48, (2, 2)), axis=0).ravel() if count == 0 or rng.random() < 0.3 else None
    return Prompt(
        rng.uniform(0, 48, (count, 2)) if count else None,
        rng.integers(0, 2, count) if count else None,
        box,
        rng.normal(0, 3, (1, 32, 32)) if mask else None,
    )


def assert_same(result: MaskPrediction, expected: MaskPrediction, what: str) -> None:
    assert_close_l2(result.low_res_logits, expected.low_res_logits, 1e-5, what)
    # One number may lie near zero, where a relative error says nothing.
    torch.testing.assert_close(result.iou_predictions, expected.iou_predictions, rtol=1e-5, atol=1e-5)


def ask_at_random(replaying: Sam, eager: Sam, requests: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    embeddings = [eager.encode(random_image(48 - 4 * i, 40 + 8 * i, seed=i)) for i in range(3)]
    for request in range(requests):
        images = [embeddings[i] for i in rng.integers(0, 3, rng.integers(1, 4))]
        prompts = [[random_prompt(rng, rng.random() < 0.3) for _ in range(rng.integers(1, 5))] for _ in images]
        multimask = bool(rng.integers(2))
        result, expected = (model.predict(images, prompts, multimask) for model in (replaying, eager))
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other, f"request {request}")


def by_prediction(model: Sam, embedding: ImageEmbedding, clicks: list[tuple[float, float, int]]) -> list[np.ndarray]:
    """The masks of a session, asked for one by one."""
    masks, logits = [], None
    for count in range(1, len(clicks) + 1):
        coords, labels = [click[:2] for click in clicks[:count]], [click[2] for click in clicks[:count]]
        result = model.predict(embedding, [Prompt(coords, labels, mask_input=logits)], multimask_output=count == 1)
        best = int(result.iou_predictions[0].argmax())
        logits = result.low_res_logits[0, best][None]
        masks.append(result.masks[0, best].cpu().numpy())
    return masks


CLICKS = [(5.0 + 4 * i, 30.0 - 2 * i, int(i % 3 != 2)) for i in range(12)]


def agree(answer: Answer, mask: np.ndarray) -> bool:
    return answer.mask().shape == mask.shape and float((answer.mask() == mask).mean()) > 0.999
