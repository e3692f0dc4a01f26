"""The reasons why a request that was valid did not get its answer."""

from __future__ import annotations

import torch


class EngineError(RuntimeError):
    """The base of an engine's own errors; ``counter`` names the counter that it is counted in."""

    counter = "failed"


class QueueFullError(EngineError):
    """As many requests are waiting as the engine may hold; try again later."""

    counter = "rejected"


class DeadlineExceededError(EngineError):
    """The request waited for longer than its deadline; what was not computed by then never is."""

    counter = "expired"


class OutOfMemoryError(EngineError):
    """The device is out of memory, even with half the batch; the engine goes on."""

    counter = "failed_out_of_memory"


class EngineFailedError(EngineError):
    """The model raised an error other than a shortage of memory; the engine answers nothing any more."""

    counter = "failed"


class EngineClosedError(EngineError):
    """The engine was closed before the request came, or could not finish it in time."""

    counter = "abandoned"


class StreamError(EngineError):
    """The stream is not where the request takes it to be, or has ended; nothing of it was changed."""

    counter = "refused"


# What allocates besides torch's allocator says so in words only: torch on a CPU, the driver, its libraries, Triton.
_SHORTAGES = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "[CUDA]: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)
