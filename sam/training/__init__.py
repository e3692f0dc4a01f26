"""Training the embedded model: scenes, prompts, losses, the loop, and the evaluation. See ``python -m sam.training -h``."""
