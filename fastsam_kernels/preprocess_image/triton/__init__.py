"""The Triton implementation of ``preprocess_image``."""
