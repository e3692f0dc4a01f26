"""The Triton implementation of ``connected_components``."""
