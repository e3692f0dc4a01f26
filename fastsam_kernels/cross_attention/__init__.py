"""The cross-attentions of SAM's mask decoder, whose token side absorbs the projections of the image side.

For image tokens x_n [C] at positions e_n, heads h of d channels, and the tokens t of one prompt:

    token to image:  s_n = (W_k,h (x_n + e_n) + b_k,h) . q_ht / sqrt(d);  o_ht = sum_n softmax_n(s) (W_v,h x_n + b_v,h)
    image to token:  s_t = (W_q,h (x_n + e_n) + b_q,h) . k_ht / sqrt(d)      y_n = W_o concat_h sum_t softmax_t(s) v_ht

K, V and Q of the image are never formed, because the few tokens can carry their weights instead:

    token to image:  a_ht = W_k,h^T q_ht / sqrt(d);  s_n = a_ht . (x_n + e_n)  (b_k is the same for all n: it cancels);
                     o_ht = W_v,h (sum_n softmax_n(s) x_n) + b_v,h
    image to token:  a_ht = W_q,h^T k_ht / sqrt(d), b_ht = b_q,h . k_ht / sqrt(d);  s_t = a_ht . (x_n + e_n) + b_ht;
                     u_ht = W_o,h v_ht + b_o / H;  y_n = sum_ht softmax_t(s) u_ht,  then the residual and the norm.

With N = 4096 and C = 256 that is less work than projecting the image up to about 16 tokens per prompt, and memory sees
the image tokens once. The operations take the absorbed operands a, b and u (:class:`AbsorbedTokens`). Only the queries
of an image that no prompt has touched are worth forming and keeping (``ImageTokens.queries``), for the implementations
in PyTorch: their scores then take 16 products per token and head instead of 256.

Source: Segment Anything (arXiv 2304.02643), appendix A; ``transformer.py`` of segment-anything.
"""

from .limits import MAX_TOKENS
from .operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection

__all__ = ["MAX_TOKENS", "AbsorbedTokens", "ImageTokens", "LayerNormWeights", "ValueProjection"]
