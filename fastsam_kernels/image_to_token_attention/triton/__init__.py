"""The Triton implementation of ``image_to_token_attention``."""
