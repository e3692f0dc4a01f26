"""The Triton implementation of ``two_way_attention``."""
