"""Parts of the model against the official way, a module each, with its ``CASES``."""

from . import automatic_masks, click, decoder, encoder

PARTS = {"automatic_masks": automatic_masks, "click": click, "decoder": decoder, "encoder": encoder}
