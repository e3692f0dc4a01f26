"""Execution without the cost of Python: compiled functions and CUDA graphs, over a few shapes known beforehand.

``load_model(compile=True)`` gives a model a :class:`Runtime`. The blocks of the encoder are compiled, each kind once,
with the operations of ``fastsam_kernels`` inside. The decoder runs over *buckets*, a number of images, prompts and
tokens that smaller requests are padded to: on a CUDA device each is a graph that is replayed, elsewhere a compiled
function. Padding is exact: absent tokens are masked out of every attention, and absent prompts are rows that nobody
reads.
"""

from . import direct_calls  # noqa: F401 - gives the modules their fused forms
from .buckets import Bucket
from .graphs import Graphs, StackedInput
from .runtime import Runtime, WarmupStep

__all__ = ["Bucket", "Graphs", "Runtime", "StackedInput", "WarmupStep"]
