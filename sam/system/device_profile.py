"""The one table of the numbers that each kind of device takes at a time.

Chunks change neither results nor what is computed. On a CPU they keep one chunk's activations near its cache; a GPU
wants work, and a host that waits for it seldom. What an operation's kernels take at a time is in ``fastsam_kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .hardware import usable_cores


@dataclass(frozen=True)
class DeviceProfile:
    """The numbers that one kind of device takes at a time; None stands for no limit.

    Attributes:
        images_per_pass: images or crops that the encoder takes, in ``encode``, streams, the engine and the generator.
        mlp_tokens_per_chunk: tokens that the MLP of an encoder block takes.
        prompts_per_chunk: prompts that the decoder takes; the image side of one is 4 MB in fp32.
        objects_per_chunk: objects of a video that a frame tracks at once. One at a time, as on a CPU, an object's masks
            do not depend on the last bit on which others there are.
        masks_per_chunk: masks that exist as logits of full size; those of a padded square of 1024 px are 4 MiB.
        min_clicks_per_batch: clicks that automatic masks decode before the host waits for all of them, at least.
        pixels_per_batch: pixels of the masks of one of the engine's batches, one mask per prompt counted.
        preparing_threads: threads that read and resize images beside the model; at most one per core on a GPU's host.
        scored_prompts: prompts that an evaluation scores.
        training_tokens_per_chunk: image tokens, one set per prompt, that a training step decodes.
    """

    images_per_pass: int
    mlp_tokens_per_chunk: int | None
    prompts_per_chunk: int
    objects_per_chunk: int
    masks_per_chunk: int
    min_clicks_per_batch: int
    pixels_per_batch: int
    preparing_threads: int
    scored_prompts: int
    training_tokens_per_chunk: int | None


_CPU = DeviceProfile(
    images_per_pass=1,
    mlp_tokens_per_chunk=2048,
    prompts_per_chunk=4,
    objects_per_chunk=1,
    masks_per_chunk=1,
    min_clicks_per_batch=1,
    pixels_per_batch=2**27,
    preparing_threads=2,  # the model uses the cores itself
    scored_prompts=8,
    training_tokens_per_chunk=8192,
)
_GPU = DeviceProfile(
    images_per_pass=8,
    mlp_tokens_per_chunk=None,
    prompts_per_chunk=128,
    objects_per_chunk=64,
    masks_per_chunk=16,
    min_clicks_per_batch=1024,  # the usual grid
    pixels_per_batch=2**30,
    preparing_threads=8,  # reading and resizing a photograph takes 50 ms of a core; a GPU encodes hundreds per second
    scored_prompts=64,
    training_tokens_per_chunk=None,
)


def device_profile(device: torch.device) -> DeviceProfile:
    """Return how many of everything ``device`` takes at a time: a CPU, or anything else."""
    return _CPU if device.type == "cpu" else _GPU


def preparing_threads(device: torch.device) -> int:
    """Return how many threads prepare images beside a model on ``device``, by default and on this machine."""
    threads = device_profile(device).preparing_threads
    return threads if device.type == "cpu" else min(threads, usable_cores())
