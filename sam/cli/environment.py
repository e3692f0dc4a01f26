"""The machine in a bug report: versions, hardware and kernels; no path, user, host or secret."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from fastsam_kernels import int8_form, resolve_kernels, why_not_quantized

from ..system.hardware import cpu_name, multiplies_bf16_fast, usable_cores, usable_device
from ..system.products import describe_products

_PACKAGES = (
    "fastsam-kernels", "torch", "triton", "numpy", "pillow", "safetensors", "scipy", "fastapi", "uvicorn", "httptools",
    "python-multipart", "prometheus-client", "av", "scikit-image", "transformers", "opencv-python-headless",
)  # fmt: skip
# What changes results or speed, and holds a number or a word.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_NO_CUDA_MEMORY_CACHING", "TRITON_INTERPRET",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Return facts by name, in the order a reader wants them; each is a number, a word or a line."""
    device = usable_device()
    facts: dict[str, Any] = {package: version(package) for package in _PACKAGES}
    facts["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()} {' '.join(platform.libc_ver())}"
    facts["cpu"] = f"{cpu_name()}, {usable_cores()} cores, {torch.get_num_threads()} threads"
    facts["cpu instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["cuda of torch"] = torch.version.cuda or "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
    facts["device"] = str(device)
    facts["fast in bf16"] = multiplies_bf16_fast(device)
    facts["fastest products"] = describe_products(device)
    facts["int8"] = int8_form(device)
    facts["fp8"] = why_not_quantized("fp8", device) or "here"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        facts[f"kernels in {str(dtype).removeprefix('torch.')}"] = resolve_kernels("auto", device, dtype)
    facts.update({name: os.environ[name] for name in _VARIABLES if name in os.environ})
    return facts


def version(package: str) -> str:
    """Return the version of a package that is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
