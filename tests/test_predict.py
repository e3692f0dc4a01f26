"""``encode`` and ``predict``: ragged prompts, any order, any thread, the same masks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from comparison import assert_close_l2
from models import random_image

from sam import ImageEmbedding, Prompt, Sam

KERNELS = ["reference", "torch"]


@pytest.fixture(scope="module")
def embeddings(nano: Sam, photo: np.ndarray) -> list[ImageEmbedding]:
    return nano.encode([photo, photo[50:180, 300:], random_image(256, 100)])


def random_prompt(rng: np.random.Generator, embedding: ImageEmbedding, with_mask: bool) -> Prompt:
    """0 to 4 points, or a box, or both, or neither; sometimes a mask."""
    height, width = embedding.geometry.original_size
    count = int(rng.integers(0, 5))
    points = rng.uniform((0, 0), (width, height), (count, 2)) if rng.random() < 0.8 else None
    labels = rng.integers(-1, 2, count) if points is not None else None
    box = None
    if rng.random() < 0.4:
        corners = np.sort(rng.uniform((0, 0), (width, height), (2, 2)), axis=0)
        box = corners.ravel()
    mask = rng.normal(0, 5, (1, 128, 128)) if with_mask else None
    return Prompt(points, labels, box, mask)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("multimask_output", [True, False])
def test_ragged_equals_one_by_one(
    nano: Sam, embeddings: list[ImageEmbedding], kernels: str, multimask_output: bool
) -> None:
    """Three images with 9, 0 and 5 prompts of every kind, in one call and one at a time."""
    rng = np.random.default_rng(7)
    prompts = [
        [random_prompt(rng, embedding, with_mask=index % 3 == 2) for index in range(count)]
        for embedding, count in zip(embeddings, (9, 0, 5), strict=True)
    ]
    nano.kernels = kernels
    try:
        together = nano.predict(embeddings, prompts, multimask_output, return_logits=True)
        for embedding, of_image, result in zip(embeddings, prompts, together, strict=True):
            size = embedding.geometry.original_size
            assert result.masks.shape == (len(of_image), 3 if multimask_output else 1, *size)
            for row, prompt in enumerate(of_image):
                alone = nano.predict(embedding, [prompt], multimask_output, return_logits=True)
                what = f"prompt {row} ({kernels})"
                assert_close_l2(result.low_res_logits[row], alone.low_res_logits[0], 1e-5, f"logits of {what}")
                assert_close_l2(result.iou_predictions[row], alone.iou_predictions[0], 1e-5, f"IoU of {what}")
                assert_close_l2(result.masks[row], alone.masks[0], 1e-5, f"full-size logits of {what}")
    finally:
        nano.kernels = "auto"


def test_every_count_from_zero_to_nine(nano: Sam, embeddings: list[ImageEmbedding]) -> None:
    rng = np.random.default_rng(3)
    prompts = [random_prompt(rng, embeddings[0], with_mask=False) for _ in range(9)]
    whole = nano.predict(embeddings[0], prompts)
    for count in range(10):
        part = nano.predict(embeddings[0], prompts[:count])
        assert part.masks.shape[0] == count
        if count:
            assert_close_l2(part.low_res_logits, whole.low_res_logits[:count], 1e-5, f"{count} prompts")


def test_forms_agree(nano: Sam, embeddings: list[ImageEmbedding]) -> None:
    rng = np.random.default_rng(11)
    prompts = [[random_prompt(rng, e, with_mask=i == 1) for i in range(4)] for e in embeddings]
    results = {}
    for kernels in KERNELS:
        nano.kernels = kernels
        results[kernels] = nano.predict(embeddings, prompts)
    nano.kernels = "auto"
    for reference, fast in zip(*results.values(), strict=True):
        assert_close_l2(fast.low_res_logits, reference.low_res_logits, 1e-5, "torch against reference")


def test_masks_are_the_thresholded_logits(nano: Sam, embeddings: list[ImageEmbedding]) -> None:
    prompts = [Prompt([(x, 40)], [1]) for x in range(10, 90, 10)]  # 24 masks: more than one piece of upscaling
    masks = nano.predict(embeddings[1], prompts).masks
    logits = nano.predict(embeddings[1], prompts, return_logits=True).masks
    assert masks.dtype == torch.bool
    assert logits.dtype == torch.float32
    assert torch.equal(masks, logits > nano.mask_threshold)


def test_eight_threads_give_the_single_threaded_masks(nano: Sam, embeddings: list[ImageEmbedding]) -> None:
    rng = np.random.default_rng(5)
    jobs = []
    for _ in range(8 * 5):
        embedding = embeddings[rng.integers(3)]
        height, width = embedding.geometry.original_size
        jobs.append((embedding, Prompt(rng.uniform((0, 0), (width, height), (1, 2)), [1])))
    # Fresh handles, so that the threads also race to make what a handle keeps.
    fresh = {id(e): ImageEmbedding(e.features, e.geometry, e.model_hash, e.model_name) for e in embeddings}

    def ask(job: tuple[ImageEmbedding, Prompt]) -> torch.Tensor:
        return nano.predict(fresh[id(job[0])], [job[1]]).masks

    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(ask, jobs))
    for (embedding, prompt), masks in zip(jobs, concurrent, strict=True):
        # A library may add in another order where cores are taken, which moves few pixels.
        assert (masks == nano.predict(embedding, [prompt]).masks).double().mean() > 0.999


def test_different_images_embed_differently(nano: Sam, photo: np.ndarray) -> None:
    first, second = nano.encode([photo, 255 - photo])
    difference = (first.features - second.features).norm() / first.features.norm()
    assert difference > 0.1
