"""The Triton implementation of ``nms``."""
