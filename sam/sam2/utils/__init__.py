"""The helpers of the official package ``sam2``, at its import paths."""
