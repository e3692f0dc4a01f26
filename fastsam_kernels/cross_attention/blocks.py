"""Image tokens cut into blocks, for the PyTorch operations of both attentions."""

from __future__ import annotations

from torch import Tensor

# Parts that the image tokens of a lone prompt are split into: a BLAS shares a batch among its threads, but not a
# product so narrow.
_BLOCKS = 8


def block_count(keys: Tensor) -> int:
    """Return how many parts to split image tokens [P, N, C] into."""
    return _BLOCKS if len(keys) == 1 and keys.shape[1] % _BLOCKS == 0 else 1


def split(keys: Tensor, blocks: int) -> Tensor:
    """Split image tokens: [P, N, C] -> [P * blocks, N / blocks, C]."""
    return keys if blocks == 1 else keys.reshape(blocks, -1, keys.shape[2])


def repeat(tokens: Tensor, blocks: int) -> Tensor:
    """Repeat a prompt's tokens for each of its blocks: [P, H * T, C] -> [P * blocks, H * T, C], no copy."""
    return tokens if blocks == 1 else tokens.expand(blocks, -1, -1)


def per_prompt(keys: Tensor, index: Tensor | None, prompts: int) -> Tensor:
    """Return the image tokens of each prompt, [I, N, C] -> [P, N, C]; one image serves all prompts without a copy."""
    if index is None:
        return keys
    return keys.expand(prompts, -1, -1) if len(keys) == 1 else keys.index_select(0, index)
