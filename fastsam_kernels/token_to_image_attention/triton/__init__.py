"""The Triton implementation of ``token_to_image_attention``."""
