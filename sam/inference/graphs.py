"""CUDA graphs by key: a function of tensors is captured at its first use and replayed from then on."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]

_WARM_UPS = 2  # runs before a capture: kernels are compiled and weights derived in the first
_RECORDING = threading.Lock()  # torch captures one graph at a time
_HEADROOM = 2 << 30  # bytes free on the device below which cached blocks are given back before a capture


@dataclass(frozen=True)
class StackedInput:
    """Tensors that are concatenated into a buffer of ``shape``.

    Buffer rows beyond the tensors are undefined; the captured function must not let them affect valid rows.
    """

    tensors: Sequence[Tensor]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> StackedInput:
        return cls((tensor,), tuple(tensor.shape))


class Recording(Protocol):
    """A function that was recorded with all that it reads and writes."""

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], None]], Recording]


class CudaRecorder:
    """Records on one device; what its graphs allocate comes from a pool of their own, which they share.

    ``torch.cuda.graph`` waits for the whole device and empties the allocator's cache before each capture, which stalls
    every thread for each new shape. Here a capture waits for nobody, and the cache is given back only where little
    memory is left: a capture cannot free any by itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Recording:
        with _RECORDING, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    function()
                if torch.cuda.mem_get_info(self._device)[0] < _HEADROOM:
                    self._stream.synchronize()
                    torch.cuda.empty_cache()
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on allocating meanwhile.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
            before.wait_stream(self._stream)
        return graph


def empty_cache() -> None:
    """Return the allocator's cached blocks to the device, unless another thread captures: torch would fail."""
    with _RECORDING:
        torch.cuda.empty_cache()


class _Buffer:
    """Memory that graphs read; remembers what is in it, so that an image is copied once and not for every click."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._held: list[tuple[weakref.ref[Tensor], int]] = []

    def fill(self, tensors: Sequence[Tensor]) -> None:
        missing = [not self._holds(index, tensor) for index, tensor in enumerate(tensors)]
        self._held = []  # until every copy was made: one that fails leaves something of both
        row = 0
        for tensor, is_missing in zip(tensors, missing, strict=True):
            stop = row + len(tensor)
            if is_missing:
                self.tensor[row:stop].copy_(tensor, non_blocking=True)
            row = stop
        self._held = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]

    def _holds(self, index: int, tensor: Tensor) -> bool:
        # The tensors before this one are as long as they were: all of them are a row each, or there is only one.
        if index >= len(self._held):
            return False
        held, version = self._held[index]
        return held() is tensor and version == _version(tensor) >= 0


def _kind(shape: Sequence[int], tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.memory_format]:
    """Return what a buffer of ``shape`` for tensors like this one is known by; it has their order in memory."""
    memory_format = torch.contiguous_format
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.channels_last
    return tuple(shape), tensor.dtype, memory_format


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


class Graphs:
    """Functions of tensors, recorded by key.

    All share the buffers that they read and write and their scratch memory, so one runs at a time: a lock orders
    threads and an event orders their streams.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        """Begin without a recording; ``recorder`` stands in for CUDA's graphs."""
        self._record: Recorder = recorder or CudaRecorder(device)
        self._device = device
        self._lock = threading.Lock()
        self._done = torch.cuda.Event() if device.type == "cuda" else None
        self._buffers: dict[Hashable, _Buffer] = {}
        self._recordings: dict[Hashable, tuple[Recording, Outputs]] = {}

    @contextmanager
    def run(
        self, key: Hashable, function: Callable[..., Outputs], inputs: Sequence[StackedInput | None]
    ) -> Iterator[tuple[Outputs, float | None]]:
        """Replay ``function(*inputs)`` and hold its outputs for the length of the context.

        Args:
            key: stands for everything that ``function`` does besides reading ``inputs``.
            function: maps tensors, or None, to tensors of the same shapes each time; it may not wait for the device.
            inputs: one for each of its arguments.

        Yields:
            the outputs, which the next run overwrites, and the seconds that the capture took if this was the first use.
        """
        with self._lock:
            stream = torch.cuda.current_stream(self._device) if self._done is not None else None
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            try:
                arguments = [self._filled(index, stacked) for index, stacked in enumerate(inputs)]
                kinds = (_kind(stacked.shape, stacked.tensors[0]) if stacked else None for stacked in inputs)
                key = (key, *kinds)
                seconds = None
                if key not in self._recordings:
                    start = time.perf_counter()
                    self._recordings[key] = self._recorded(function, arguments)
                    seconds = time.perf_counter() - start
                recording, outputs = self._recordings[key]
                recording.replay()
                for output in outputs:
                    torch.autograd.graph.increment_version(output)  # a replay writes unseen
                yield outputs, seconds
            finally:
                # Also after an error: what was begun is still running, and the next request may be on another stream.
                if stream is not None and self._done is not None:
                    self._done.record(stream)

    def clear(self) -> None:
        """Forget every recording, as after a change of the weights."""
        with self._lock:
            if self._recordings and self._done is not None:
                self._done.synchronize()
            self._recordings.clear()

    def _filled(self, index: int, stacked: StackedInput | None) -> Tensor | None:
        if stacked is None:
            return None
        buffer = self._buffer(("input", index), *_kind(stacked.shape, stacked.tensors[0]))
        buffer.fill(stacked.tensors)
        return buffer.tensor

    def _buffer(
        self,
        place: Hashable,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> _Buffer:
        key = (place, shape, dtype, memory_format)
        if key not in self._buffers:
            # Of zeros: rows that were never filled are read too.
            with torch.inference_mode(False):
                zeros = torch.zeros(shape, dtype=dtype, device=self._device)
                self._buffers[key] = _Buffer(zeros.contiguous(memory_format=memory_format))
        return self._buffers[key]

    def _recorded(
        self, function: Callable[..., Outputs], arguments: Sequence[Tensor | None]
    ) -> tuple[Recording, Outputs]:
        # Results go to buffers outside of the pool, so that the next graph may take all of the pool.
        kinds = [_kind(result.shape, result) for result in function(*arguments)]
        outputs = tuple(self._buffer(("output", i), *kind).tensor for i, kind in enumerate(kinds))

        def into_outputs() -> None:
            for output, result in zip(outputs, function(*arguments), strict=True):
                output.copy_(result)

        return self._record(into_outputs), outputs


class GraphsOfWeights:
    """Graphs of one part of the model, which have its weights in them: made anew whenever the weights change."""

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()
        self._graphs: Graphs | None = None
        self._recorded_with: Hashable = None

    def now(self, device: torch.device, weights: Hashable, forget: Callable[[], None] | None = None) -> Graphs:
        """Return the graphs for ``weights``; ``forget`` is called when there are none of them yet."""
        with self._lock:
            if self._graphs is None or weights != self._recorded_with:
                if self._graphs is not None:
                    self._graphs.clear()
                if forget is not None:
                    forget()
                self._graphs, self._recorded_with = Graphs(device, self._recorder), weights
            return self._graphs

    def reset(self) -> None:
        """Record everything anew at its next use."""
        with self._lock:
            self._recorded_with = None
