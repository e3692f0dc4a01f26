"""The image encoder of SAM: a ViT with windowed and global attention and decomposed relative position.

Sources: Segment Anything (arXiv 2304.02643), ViTDet (arXiv 2203.16527), MViTv2 (arXiv 2112.01526) for the
relative position. Images flow as [B, H, W, C] tokens; only the neck works on [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import LayerNorm2d, MLPBlock
from .weight_cache import WeightCache


class ImageEncoderViT(WeightCache):
    """Encode normalised pixels [B, 3, img_size, img_size] as [B, out_chans, grid, grid], grid = img_size / patch_size.

    Without absolute positions it takes [B, 3, H, W] of any size: relative positions are resized to the grid.
    """

    __constants__ = ("img_size",)

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        qkv_bias: bool = True,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        global_attn_indexes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.img_size = img_size
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(
            kernel_size=(patch_size, patch_size),
            stride=(patch_size, patch_size),
            in_chans=in_chans,
            embed_dim=embed_dim,
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, embed_dim)) if use_abs_pos else None
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                norm_layer=norm_layer,
                act_layer=act_layer,
                use_rel_pos=use_rel_pos,
                rel_pos_zero_init=rel_pos_zero_init,
                window_size=0 if index in global_attn_indexes else window_size,
                input_size=(grid, grid),
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of images.

        Raises:
            ValueError: no batch of images, or images of a grid of patches that the absolute positions do not have.
        """
        fused = self._fused(x)
        if fused is not None:
            return fused
        x = self.embed_patches(x)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return tokens [B, grid_h, grid_w, embed_dim] of the patches, at their positions.

        Raises:
            ValueError: as :meth:`forward`.
        """
        if pixels.ndim != 4:
            raise ValueError(f"the image encoder takes [B, 3, H, W], got {list(pixels.shape)}")
        x = self.patch_embed(pixels)
        if self.pos_embed is None:
            return x
        if x.shape[1:3] != self.pos_embed.shape[1:3]:
            (rows, columns), (height, width) = self.pos_embed.shape[1:3], x.shape[1:3]
            raise ValueError(
                f"the image encoder has positions for {rows}x{columns} patches, an image of {self.img_size} px, "
                f"got {list(pixels.shape)}, which is {height}x{width} patches"
            )
        return x + self.pos_embed


class Block(nn.Module):
    """Pre-norm transformer block on [B, H, W, dim]; attends in windows unless ``window_size`` is 0."""

    __constants__ = ("window_size",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        act_layer: type[nn.Module] = nn.GELU,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            use_rel_pos=use_rel_pos,
            rel_pos_zero_init=rel_pos_zero_init,
            input_size=input_size if window_size == 0 else (window_size, window_size),
        )
        self.norm2 = norm_layer(dim)
        self.mlp = MLPBlock(embedding_dim=dim, mlp_dim=int(dim * mlp_ratio), act=act_layer)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        attended = self.norm1(x)
        if self.window_size > 0:
            # The zero padding passes through qkv, so a padded key is the qkv bias and takes part in the softmax.
            attended, padded_size = window_partition(attended, self.window_size)
        attended = self.attn(attended)
        if self.window_size > 0:
            attended = window_unpartition(attended, self.window_size, padded_size, (x.shape[1], x.shape[2]))
        x = x + attended
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention over all of [B, H, W, dim], with decomposed relative position."""

    __constants__ = ("num_heads", "scale", "use_rel_pos")

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            if input_size is None:
                raise ValueError("use_rel_pos=True needs input_size, the (height, width) of the tokens")
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all of ``x`` [B, H, W, dim], which may be windows."""
        batch, height, width, _ = x.shape
        tokens = height * width
        q, k, v = (
            self.qkv(x)
            .reshape(batch, tokens, 3, self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)  # [3, B, heads, tokens, head_dim]
            .flatten(1, 2)
            .unbind(0)
        )
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.use_rel_pos:
            size = (height, width)
            scores = add_decomposed_rel_pos(scores, q, self.rel_pos_h, self.rel_pos_w, size, size)
        out = scores.softmax(dim=-1) @ v  # [B * heads, tokens, head_dim]
        out = out.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(out)


def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut [B, H, W, C] into windows, zero-padding bottom and right to whole windows.

    Returns:
        windows [B * windows, window_size, window_size, C] in row-major order, and the padded (H, W).
    """
    batch, height, width, channels = x.shape
    # Rounded up without a negative number, which the TorchScript ONNX exporter divides towards zero.
    rows, columns = ((side + (window_size - 1)) // window_size for side in (height, width))
    padded_h, padded_w = rows * window_size, columns * window_size
    x = F.pad(x, (0, 0, 0, padded_w - width, 0, padded_h - height))
    x = x.view(batch, rows, window_size, columns, window_size, channels)
    return x.transpose(2, 3).reshape(-1, window_size, window_size, channels), (padded_h, padded_w)


def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Invert :func:`window_partition`: [B * windows, window_size, window_size, C] -> [B, H, W, C]."""
    rows, columns = pad_hw[0] // window_size, pad_hw[1] // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, pad_hw[0], pad_hw[1], windows.shape[-1])
    return x[:, : hw[0], : hw[1]].contiguous()


def resize_rel_pos(rel_pos: Tensor, length: int) -> Tensor:
    """Resize a table [L, C] linearly to [length, C]."""
    if rel_pos.shape[0] == length:
        return rel_pos
    return F.interpolate(rel_pos.t()[None], size=length, mode="linear")[0].t()


def get_rel_pos(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Return the table's row for every pair of positions along one axis.

    ``rel_pos`` is [L, C]. A table of another length than 2 * max(q_size, k_size) - 1 is resized linearly;
    the shorter of two unequal axes is stretched over the longer.

    Returns:
        [q_size, k_size, C]
    """
    rel_pos = resize_rel_pos(rel_pos, 2 * max(q_size, k_size) - 1)
    q_stretch, k_stretch = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
    q_coords = torch.arange(q_size, dtype=torch.float32, device=rel_pos.device)[:, None] * q_stretch
    k_coords = torch.arange(k_size, dtype=torch.float32, device=rel_pos.device)[None, :] * k_stretch
    return rel_pos[(q_coords - k_coords + (k_size - 1) * k_stretch).long()]


def add_decomposed_rel_pos(
    attn: Tensor,
    q: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    q_size: tuple[int, int],
    k_size: tuple[int, int],
) -> Tensor:
    """Add q . R_h[h_i - h_j] + q . R_w[w_i - w_j] to the scores; q is the query *before* scaling.

    Args:
        attn: [B, q_h * q_w, k_h * k_w] scores.
        q: [B, q_h * q_w, C] unscaled queries.
        rel_pos_h, rel_pos_w: [L, C] tables.
    """
    batch, _, channels = q.shape
    grid_q = q.view(batch, *q_size, channels)
    rel_h = torch.einsum("bhwc,hkc->bhwk", grid_q, get_rel_pos(q_size[0], k_size[0], rel_pos_h))
    rel_w = torch.einsum("bhwc,wkc->bhwk", grid_q, get_rel_pos(q_size[1], k_size[1], rel_pos_w))
    bias = rel_h[..., :, None] + rel_w[..., None, :]  # [B, q_h, q_w, k_h, k_w]
    return attn + bias.flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Project non-overlapping patches: [B, in_chans, H, W] -> [B, H / patch, W / patch, embed_dim]."""

    def __init__(
        self,
        kernel_size: tuple[int, int] = (16, 16),
        stride: tuple[int, int] = (16, 16),
        padding: tuple[int, int] = (0, 0),
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)
