"""The Triton implementation of ``rel_pos_attention``."""
