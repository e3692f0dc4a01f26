"""The number of clicks and masks that automatic masks take at a time, from the memory that they may use."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from ..inference.low_rank_decoder import CLICKS_AT_ONCE, SharedImage
from ..modeling.promptable import PromptableModel
from ..system.device_profile import device_profile

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DECODER_BYTES = 40 * 10**6  # activations of the mask decoder a click, 64 x 64 tokens in fp32 (34 MB measured)
_FIXED_BYTES = 64 * 10**6  # statistics and bits of masks, in blocks of a few masks
_REGION_BYTES = 32  # a pixel of a mask whose regions are labelled: labels, their sizes, and positions as int64


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes given as one or with a unit: "500MB", "2 GB", "1.5GiB".

    Raises:
        ValueError: neither, or not more than 0.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"a size of memory is a number of bytes or a string like '2GB' or '500MiB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"a size of memory must be more than 0 bytes, got {size}")
    return size


def free_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device that a new tensor could have: what is free, and what torch keeps for reuse."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


def usual_memory(device: torch.device) -> int:
    """Return the bytes that automatic masks plan with where nothing is said: on a GPU half of what is free now."""
    return max(_FIXED_BYTES, free_memory(device) // 2) if device.type == "cuda" else 2 * 10**9


@dataclass(frozen=True)
class Demands:
    """Hold what clicks need memory for beside the decoder's answers.

    Attributes:
        masks_per_click: masks that are made of a click, at most.
        asked_again: whether each of them is a prompt once more.
        cleans_logits: whether small regions of low-resolution logits are removed, of all that were made at a time.
        cleans_masks: whether small regions of masks of full size are removed, of one after the other at the end.
        low_rank: what can decode clicks without their image tokens; None where these are made.
    """

    masks_per_click: int = 3
    asked_again: bool = False
    cleans_logits: bool = False
    cleans_masks: bool = False
    low_rank: SharedImage | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """A plan that keeps within a budget: half for logits that wait, a quarter each for decoding and for encoding.

    Attributes:
        points_at_once: clicks decoded together.
        masks_at_once: masks of full size, in bits, that exist at a time.
        held_bytes: logits of low resolution that wait for the end of the suppression.
        count_early: whether the masks that are left are counted after each step, which a GPU would have to wait for,
            or stay in place until the suppression.
        low_rank: what decodes clicks without their image tokens; None where these are made, also for want of room.
    """

    points_at_once: int
    masks_at_once: int
    held_bytes: int
    count_early: bool
    low_rank: SharedImage | None = None

    @classmethod
    def plan(
        cls,
        model: PromptableModel,
        size: tuple[int, int],
        points_per_batch: int,
        max_memory: int | None,
        demands: Demands = Demands(),
    ) -> MemoryPlan:
        """Return the plan for masks of ``size`` (height, width).

        Raises:
            ValueError: a single click or mask needs more than ``max_memory``.
        """
        costs, on_cpu = _Costs.of(model, size, demands), model.device.type == "cpu"
        if max_memory is None:
            budget = usual_memory(model.device)
        else:
            if demands.low_rank is not None and max_memory < costs.needed:
                return cls.plan(model, size, points_per_batch, max_memory, replace(demands, low_rank=None))
            costs.check(max_memory, size)
            budget = max_memory if on_cpu else min(max_memory, free_memory(model.device))
        share = max(0, budget - _FIXED_BYTES) // 4
        points = max(points_per_batch, device_profile(model.device).min_clicks_per_batch)
        if max_memory is not None or not on_cpu:
            # Where nothing is said, half goes to decoding: waiting logits are counted as they come.
            decoding = share if max_memory is not None else 2 * share
            points = min(points, costs.clicks_within(decoding))
        return cls(
            points_at_once=points,
            masks_at_once=max(1, min(64, share // costs.mask) if on_cpu else share // costs.mask),
            held_bytes=max(0, 2 * share),
            count_early=on_cpu,
            low_rank=demands.low_rank,
        )


@dataclass(frozen=True)
class _Costs:
    """Bytes that decoding and masks take.

    Attributes:
        tables: of the image, for all its clicks.
        chunk_click: of a click of the decoder's chunk.
        chunk_size: clicks in a chunk.
        more_click: of a click beyond it.
        mask: of a mask of full size.
        regions: of removing small regions of a mask of full size, when all else is done.
    """

    tables: int
    chunk_click: int
    chunk_size: int
    more_click: int
    mask: int
    regions: int

    @classmethod
    def of(cls, model: PromptableModel, size: tuple[int, int], demands: Demands) -> _Costs:
        low_height, low_width = model.low_res_size
        grid_height, grid_width = model.prompt_encoder.image_embedding_size
        tokens, logits = grid_height * grid_width, 4 * low_height * low_width
        on_cpu, masks, shared = model.device.type == "cpu", demands.masks_per_click, demands.low_rank
        element = 4 if on_cpu else model.dtype.itemsize
        # The logits of a click's masks exist three times: in the decoder's chunk, joined, and filtered. Masks that are
        # prompts once more exist as they were and within their limits, and their answers three times.
        kept = (5 if demands.asked_again else 3) * masks * logits
        prompts = masks if demands.asked_again else 1
        made = prompts * _DECODER_BYTES * element // 4 * tokens // 4096
        chunk = -(-model.prompts_per_chunk // prompts)
        if shared is not None:
            made, chunk = shared.click_nbytes, CLICKS_AT_ONCE
        cleaning = masks * _REGION_BYTES * low_height * low_width if demands.cleans_logits else 0
        return cls(
            tables=0 if shared is None else shared.nbytes,
            chunk_click=kept + max(made, cleaning),
            chunk_size=chunk,
            # Beyond a chunk, more clicks only add their logits, on a GPU their image side too.
            more_click=kept + cleaning + (0 if on_cpu else element * tokens * model.prompt_encoder.embed_dim),
            # The words of a mask are compared with their neighbours; its logits are stacked.
            mask=6 * 4 * size[1] * (size[0] // 32 + 2) + logits,
            regions=_REGION_BYTES * size[0] * size[1] if demands.cleans_masks else 0,
        )

    @property
    def needed(self) -> int:
        """Return the bytes that a single click and mask need."""
        return _FIXED_BYTES + max(4 * max(self.tables + self.chunk_click, self.mask), self.regions)

    def check(self, max_memory: int, size: tuple[int, int]) -> None:
        """Raise ``ValueError`` where a single click or mask needs more than ``max_memory``."""
        if max_memory < self.needed:
            raise ValueError(
                f"max_memory of {max_memory / 1e6:.0f} MB is too little for masks of {size[0]}x{size[1]} "
                f"(height x width): at least {self.needed / 1e6:.0f} MB are needed to take them one by one"
            )

    def clicks_within(self, capacity: int) -> int:
        """Return how many clicks ``capacity`` bytes suffice for, in chunks of ``chunk_size``; at least one."""
        left = capacity - self.tables
        chunk = max(1, min(left // self.chunk_click, self.chunk_size))
        left = max(0, left - chunk * self.chunk_click)
        return chunk + (left // self.more_click if chunk == self.chunk_size else 0)
