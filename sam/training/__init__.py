"""Training the embedded model: scenes, prompts, losses, the loop, and the evaluation (``python -m sam.training``)."""
