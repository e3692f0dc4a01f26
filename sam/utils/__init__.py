"""The helpers of the official package, at its import paths."""
