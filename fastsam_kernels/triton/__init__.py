"""What the Triton kernels share: launches, tiles and device functions. Only ``math`` imports triton."""
