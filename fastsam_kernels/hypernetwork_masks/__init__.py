"""Upscaling of the image tokens and their product with the hypernetwork vectors."""

from .api import hypernetwork_masks
from .eager import masks_of_products
from .weights import UpscalingWeights, pack_upscaling

__all__ = ["UpscalingWeights", "hypernetwork_masks", "masks_of_products", "pack_upscaling"]
