"""The image encoder and its neck: ``sam2.modeling.backbones.image_encoder``."""

from ....modeling.feature_pyramid import FpnNeck, ImageEncoder

__all__ = ["FpnNeck", "ImageEncoder"]
