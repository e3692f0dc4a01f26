"""The Triton implementation of ``hypernetwork_masks``."""
