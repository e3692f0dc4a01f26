"""The Triton implementation of ``window_attention``."""
