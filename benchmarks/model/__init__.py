"""Parts of the model against the official way, a module each, with its ``CASES``."""

from . import decoder, encoder

PARTS = {"decoder": decoder, "encoder": encoder}
