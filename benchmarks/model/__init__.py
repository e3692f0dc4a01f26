"""Parts of the model against the official way, a module each, with its ``CASES``."""

from . import automatic_masks, click, cold_start, decoder, encoder, stream

PARTS = {
    "automatic_masks": automatic_masks,
    "click": click,
    "cold_start": cold_start,
    "decoder": decoder,
    "encoder": encoder,
    "stream": stream,
}
