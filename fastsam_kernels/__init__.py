"""Operations of Segment Anything that are worth a kernel, each checked against a plain PyTorch reference."""

from .dispatch import KERNELS, UnsupportedKernelError, check_kernels, resolve_kernels
from .nms import nms

__all__ = ["KERNELS", "UnsupportedKernelError", "check_kernels", "nms", "resolve_kernels"]
