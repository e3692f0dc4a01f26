"""Prompts: as people give them, as requests write them, and as the decoder takes them, batched."""
