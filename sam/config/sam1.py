"""The one description of a SAM model's shape, and the table of its variants."""

from __future__ import annotations

from dataclasses import dataclass

from .base import ModelConfig
from .checks import (
    COUNTS,
    SIZES,
    builtin,
    builtin_tuple,
    check_whole,
    is_whole,
)

# What the whole numbers of a SamConfig may be.
_WHOLE_NUMBERS = {
    "encoder_embed_dim": SIZES,
    "encoder_depth": COUNTS,
    "encoder_num_heads": SIZES,
    "image_size": SIZES,
    "patch_size": SIZES,
    "window_size": range(SIZES.stop),  # 0: no windows
    "prompt_embed_dim": SIZES,
    "mask_in_chans": SIZES,
    "decoder_depth": COUNTS,
    "decoder_num_heads": SIZES,
    "decoder_mlp_dim": SIZES,
    "num_multimask_outputs": COUNTS,
    "iou_head_depth": COUNTS,
    "iou_head_hidden_dim": SIZES,
}
_MAX_MLP_RATIO = 256


@dataclass(frozen=True)
class SamConfig(ModelConfig):
    """Everything that fixes the parameter shapes and the arithmetic of a SAM model.

    The sizes are those of the paper's figure: a ViT image encoder whose blocks attend inside windows
    except for ``global_attn_indexes``, a prompt encoder and a two-way mask decoder of ``prompt_embed_dim``
    channels. Lengths are in pixels of the padded square input unless said otherwise. Ratios and pixel statistics
    become floats, and block indexes ascend, in whatever way they are given.

    Raises:
        ValueError: a number of another type, out of bounds, or at odds with another.
    """

    variant: str
    encoder_embed_dim: int
    encoder_depth: int
    encoder_num_heads: int
    global_attn_indexes: tuple[int, ...]
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14  # tokens
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        self._settle_shared_fields()
        object.__setattr__(self, "global_attn_indexes", builtin_tuple("global_attn_indexes", self.global_attn_indexes))
        for name in (*_WHOLE_NUMBERS, "mlp_ratio"):
            object.__setattr__(self, name, builtin(getattr(self, name)))
        self._check_numbers()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a positive multiple of patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.encoder_embed_dim % self.encoder_num_heads:
            raise ValueError(
                f"encoder_num_heads={self.encoder_num_heads} must divide encoder_embed_dim={self.encoder_embed_dim}"
            )
        if self.prompt_embed_dim % (2 * self.decoder_num_heads):
            raise ValueError(
                f"twice decoder_num_heads={self.decoder_num_heads} must divide prompt_embed_dim={self.prompt_embed_dim}"
            )
        blocks = range(self.encoder_depth)
        outside = [i for i in self.global_attn_indexes if not is_whole(i, blocks)]
        if outside:
            raise ValueError(f"global_attn_indexes {outside} lie outside 0..{self.encoder_depth - 1}")
        # One spelling each, so that configs of one model are equal.
        object.__setattr__(self, "global_attn_indexes", tuple(sorted(set(self.global_attn_indexes))))
        object.__setattr__(self, "mlp_ratio", float(self.mlp_ratio))

    def _check_numbers(self) -> None:
        for name, allowed in _WHOLE_NUMBERS.items():
            check_whole(name, getattr(self, name), allowed)
        if type(self.mlp_ratio) not in (int, float) or not 0 < self.mlp_ratio <= _MAX_MLP_RATIO:
            raise ValueError(f"mlp_ratio must be above 0 and at most {_MAX_MLP_RATIO}, got {self.mlp_ratio!r}")

    @property
    def grid_size(self) -> int:
        """Return the side of the image embedding, in tokens."""
        return self.image_size // self.patch_size


VARIANTS: dict[str, SamConfig] = {
    config.variant: config
    for config in (
        SamConfig("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        SamConfig("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        SamConfig("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
        SamConfig("nano", 192, 6, 3, (2, 5), image_size=512),
    )
}
