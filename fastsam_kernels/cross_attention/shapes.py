"""The classes of shapes that the cross-attentions have tiles for, by the padded number of a prompt's tokens."""

from __future__ import annotations

from ..triton.tiles import ShapeClass

_CLICK_TOKENS = 8


class TokenShape(ShapeClass):
    """Up to 8 tokens, as those of a click, and up to 16."""

    UP_TO_8 = "8 tokens"
    UP_TO_16 = "16 tokens"

    @classmethod
    def of(cls, tokens: int) -> TokenShape:
        """Return the class of prompts of so many tokens."""
        return cls.UP_TO_8 if padded_tokens(tokens) == _CLICK_TOKENS else cls.UP_TO_16


def padded_tokens(tokens: int) -> int:
    """Return the power of two that a prompt's tokens are padded to: at least 8, the tokens of a click."""
    return max(1 << (tokens - 1).bit_length(), _CLICK_TOKENS)
