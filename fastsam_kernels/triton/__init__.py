"""Shared code of the Triton kernels: launches, tiles and device functions. Only ``math`` imports triton."""
