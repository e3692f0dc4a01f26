"""The Triton implementation of ``mask_statistics`` and ``packed_masks``, which one kernel computes."""
