"""Parts of the model against the official way, one module each, with its ``CASES``."""

from . import automatic_masks, click, cold_start, decoder, encoder, hiera, sam2_masks, stream

# In the order in which they are measured.
PARTS = {
    "decoder": decoder,
    "click": click,
    "encoder": encoder,
    "hiera": hiera,
    "sam2_masks": sam2_masks,
    "automatic_masks": automatic_masks,
    "stream": stream,
    "cold_start": cold_start,
}
