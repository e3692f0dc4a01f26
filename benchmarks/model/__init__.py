"""Parts of the model against the official way, a module each, with its ``CASES``."""

from . import decoder

PARTS = {"decoder": decoder}
