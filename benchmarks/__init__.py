"""Measurements: ``python -m benchmarks --help``. Not part of the installed packages."""

import torch

torch.backends.cudnn.allow_tf32 = False  # or fp32 convolutions on a GPU, and the budgets that they give, have 10 bits
