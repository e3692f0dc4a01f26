"""What a device multiplies fast: the one place of the package that asks."""

from __future__ import annotations

import torch


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Tell whether matrix products in bf16 are faster than in fp32 on ``device``: it has instructions for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16_products()


def _cpu_has_bf16_products() -> bool:
    # No environment variable changes this: those that limit oneDNN or ATen leave the capabilities as they are.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
