"""Hiera, the trunk of SAM 2's image encoder: a ViT in stages of growing windows whose first blocks pool.

Sources: Hiera (arXiv 2306.00989), its windowed positions (arXiv 2311.05613), SAM 2 (arXiv 2408.00714). Images flow as
[B, H, W, C] tokens. The fused form: :mod:`sam.inference.fused_hiera`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import MLP, DropPath
from .image_encoder import PatchEmbed, window_partition, window_unpartition

__all__ = [
    "Hiera",
    "MultiScaleAttention",
    "MultiScaleBlock",
    "PatchEmbed",
    "do_pool",
    "window_partition",
    "window_unpartition",
]


class Hiera(nn.Module):
    """Encode normalised pixels [B, 3, H, W] as one map [B, C, h, w] per stage, at strides 4, 8, 16 and 32.

    Args:
        embed_dim, num_heads: channels and heads of the first stage.
        drop_path_rate: probability to drop the last block while training; it grows linearly from 0.
        q_pool: how many stages begin with a block that pools.
        q_stride: stride of that pooling, (rows, columns).
        stages: blocks per stage.
        dim_mul, head_mul: factors by which channels and heads grow from stage to stage.
        window_pos_embed_bkg_spatial_size: (height, width) of the position table that is stretched over the image.
        window_spec: side of a stage's windows, in tokens. The first block of a stage still has the window before.
        global_att_blocks: the blocks that attend to the whole image.
        weights_path: a file of weights of the trunk.
        return_interm_layers: return the maps of all stages and not only the last one's.
    """

    __constants__ = ("q_stride", "stage_ends", "return_interm_layers", "window_spec")

    def __init__(
        self,
        embed_dim: int = 96,
        num_heads: int = 1,
        drop_path_rate: float = 0.0,
        q_pool: int = 3,
        q_stride: tuple[int, int] = (2, 2),
        stages: Sequence[int] = (2, 3, 16, 3),
        dim_mul: float = 2.0,
        head_mul: float = 2.0,
        window_pos_embed_bkg_spatial_size: Sequence[int] = (14, 14),
        window_spec: Sequence[int] = (8, 4, 14, 7),
        global_att_blocks: Sequence[int] = (12, 16, 20),
        weights_path: str | None = None,
        return_interm_layers: bool = True,
    ) -> None:
        super().__init__()
        if len(stages) != len(window_spec):
            raise ValueError(f"window_spec {list(window_spec)} must have one window per stage of {list(stages)}")
        self.window_spec = window_spec
        self.q_stride = q_stride
        self.stage_ends = [sum(stages[: i + 1]) - 1 for i in range(len(stages))]
        if not 0 <= q_pool < len(stages):
            raise ValueError(f"q_pool must be from 0 to {len(stages) - 1}, got {q_pool}")
        self.q_pool_blocks = [end + 1 for end in self.stage_ends[:-1]][:q_pool]
        self.return_interm_layers = return_interm_layers
        self.patch_embed = PatchEmbed((7, 7), (4, 4), (3, 3), embed_dim=embed_dim)
        self.global_att_blocks = global_att_blocks
        self.window_pos_embed_bkg_spatial_size = window_pos_embed_bkg_spatial_size
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *window_pos_embed_bkg_spatial_size))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, embed_dim, window_spec[0], window_spec[0]))

        self.blocks = nn.ModuleList()
        depth, stage = sum(stages), 0
        for index in range(depth):
            dim, window = embed_dim, window_spec[stage]
            if index - 1 in self.stage_ends:
                embed_dim, num_heads = int(embed_dim * dim_mul), int(num_heads * head_mul)
                stage += 1
            self.blocks.append(
                MultiScaleBlock(
                    dim=dim,
                    dim_out=embed_dim,
                    num_heads=num_heads,
                    drop_path=drop_path_rate * index / max(depth - 1, 1),
                    q_stride=q_stride if index in self.q_pool_blocks else None,
                    window_size=0 if index in (global_att_blocks or ()) else window,
                )
            )
        channels = [self.blocks[end].dim_out for end in reversed(self.stage_ends)]
        self.channel_list = channels if return_interm_layers else channels[:1]
        if weights_path is not None:
            self.load_state_dict(torch.load(weights_path, map_location="cpu", weights_only=True), strict=False)

    def _get_pos_embed(self, hw: tuple[int, int]) -> Tensor:
        """Return the positions [1, H, W, C] of a grid of patches (H, W).

        Raises:
            ValueError: a grid that the tiled table does not divide.
        """
        window = self.pos_embed_window
        if hw[0] % window.shape[2] or hw[1] % window.shape[3]:
            step, (height, width) = 4 * window.shape[2], hw
            raise ValueError(f"the image encoder takes sides of multiples of {step} px, got {4 * height} x {4 * width}")
        stretched = F.interpolate(self.pos_embed, size=hw, mode="bicubic")
        tiles = [whole // part for whole, part in zip(stretched.shape, window.shape, strict=True)]
        return (stretched + window.tile(tiles)).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Encode a batch of images.

        Raises:
            ValueError: a side that is no multiple of four windows of the first stage: 32 px.
        """
        x = self.patch_embed(x)
        x = x + self._get_pos_embed((x.shape[1], x.shape[2]))
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.stage_ends[-1] or (index in self.stage_ends and self.return_interm_layers):
                outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def get_layer_id(self, layer_name: str) -> int:
        """Return the number of blocks up to the weight ``layer_name``, for learning rates that decay by layer."""
        if "rel_pos" not in layer_name:
            if "pos_embed" in layer_name or "patch_embed" in layer_name:
                return 0
            if "blocks" in layer_name:
                return int(layer_name.split("blocks")[1].split(".")[1]) + 1
        return self.get_num_layers() + 1

    def get_num_layers(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)


class MultiScaleBlock(nn.Module):
    """Pre-norm transformer block on [B, H, W, dim]; attends in windows unless ``window_size`` is 0.

    With a ``q_stride`` its queries and its shortcut are pooled, and it returns [B, H / 2, W / 2, dim_out].
    """

    __constants__ = ("window_size", "q_stride")

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] | str = "LayerNorm",
        q_stride: tuple[int, int] | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        window_size: int = 0,
    ) -> None:
        super().__init__()
        norm: Any = partial(getattr(nn, norm_layer), eps=1e-6) if isinstance(norm_layer, str) else norm_layer
        self.dim = dim
        self.dim_out = dim_out
        self.norm1 = norm(dim)
        self.window_size = window_size
        self.q_stride = q_stride
        self.pool = nn.MaxPool2d(kernel_size=q_stride, stride=q_stride, ceil_mode=False) if q_stride else None
        self.attn = MultiScaleAttention(dim, dim_out, num_heads=num_heads, q_pool=self.pool)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm(dim_out)
        self.mlp = MLP(dim_out, int(dim_out * mlp_ratio), dim_out, 2, activation=act_layer)
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, window = x, self.window_size
        x = self.norm1(x)
        if self.dim != self.dim_out:
            shortcut = do_pool(self.proj(x), self.pool)
        if window > 0:
            # The zero padding passes through qkv, so a padded key is the qkv bias and takes part in the softmax.
            x, padded_size = window_partition(x, window)
        x = self.attn(x)
        if self.q_stride:
            window = window // self.q_stride[0]
            if window > 0:
                height, width = (-(-side // window) * window for side in shortcut.shape[1:3])
                padded_size = (height, width)
        if self.window_size > 0:
            x = window_unpartition(x, window, padded_size, (shortcut.shape[1], shortcut.shape[2]))
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MultiScaleAttention(nn.Module):
    """Multi-head self-attention over all of [B, H, W, dim], from pooled queries with a ``q_pool``."""

    __constants__ = ("num_heads",)

    def __init__(self, dim: int, dim_out: int, num_heads: int, q_pool: nn.Module | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.dim_out = dim_out
        self.num_heads = num_heads
        self.q_pool = q_pool
        self.qkv = nn.Linear(dim, dim_out * 3)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all of ``x`` [B, H, W, dim], which may be windows; returns [B, H', W', dim_out]."""
        batch, height, width, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).unbind(2)
        if self.q_pool is not None:
            q = do_pool(q.reshape(batch, height, width, -1), self.q_pool)
            height, width = q.shape[1:3]
            q = q.reshape(batch, height * width, self.num_heads, -1)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, -1))


def do_pool(x: Tensor, pool: nn.Module | None, norm: nn.Module | None = None) -> Tensor:
    """Pool [B, H, W, C] and normalise the result; return ``x`` itself without a ``pool``."""
    if pool is None:
        return x
    x = pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x if norm is None else norm(x)
