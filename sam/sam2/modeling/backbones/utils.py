"""Windows and patches: ``sam2.modeling.backbones.utils``."""

from ....modeling import image_encoder
from ....modeling.image_encoder import window_partition, window_unpartition

__all__ = ["PatchEmbed", "window_partition", "window_unpartition"]


class PatchEmbed(image_encoder.PatchEmbed):
    """Cuts images [B, 3, H, W] into overlapping patches and embeds them: [B, h, w, C]."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (7, 7),
        stride: tuple[int, int] = (4, 4),
        padding: tuple[int, int] = (3, 3),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__(kernel_size, stride, padding, in_chans, embed_dim)
