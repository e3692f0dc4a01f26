"""The modules themselves: exactness where shortcuts tempt, dtypes, and gradients."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close_l2, assert_close_max
from models import TINY, random_image, random_model
from torch._subclasses.fake_tensor import FakeTensorMode

import sam
from sam import Prompt, Sam
from sam.inference import fused_decoder
from sam.inference.packed_weights import pack_decoder
from sam.modeling.image_encoder import (
    Attention,
    Block,
    add_decomposed_rel_pos,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from sam.prompts.labels import LABEL_ABSENT


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 3), (6, 9, 3), (5, 7, 14), (14, 14, 14)])
def test_windows_round_trip(height: int, width: int, window: int) -> None:
    x = torch.randn(2, height, width, 4)
    windows, padded = window_partition(x, window)
    rows, columns = -(-height // window), -(-width // window)
    assert windows.shape == (2 * rows * columns, window, window, 4)
    assert padded == (rows * window, columns * window)
    assert torch.equal(window_unpartition(windows, window, padded, (height, width)), x)
    assert torch.equal(windows[1, 0, 0], x[0, 0, window]) if columns > 1 else True


def test_attention_by_hand() -> None:
    """Every score written out: scaled q.k, and the relative terms with q unscaled."""
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, use_rel_pos=True, rel_pos_zero_init=False, input_size=(3, 2)).double()
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    tokens = [(h, w) for h in range(3) for w in range(2)]
    qkv = attention.qkv(x)[0]
    out = torch.zeros(3, 2, 8, dtype=torch.float64)
    for head in range(2):
        q, k, v = (qkv[..., part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
        for hi, wi in tokens:
            scores = []
            for hj, wj in tokens:
                score = q[hi, wi] @ k[hj, wj] / 2
                score = score + q[hi, wi] @ attention.rel_pos_h[hi - hj + 2]
                scores.append(score + q[hi, wi] @ attention.rel_pos_w[wi - wj + 1])
            weights = torch.stack(scores).softmax(0)
            out[hi, wi, head * 4 : head * 4 + 4] = sum(
                weight * v[h, w] for weight, (h, w) in zip(weights, tokens, strict=True)
            )
    assert_close_max(attention(x)[0].detach(), attention.proj(out).detach(), 1e-12, "attention by hand")


def test_padded_window_keys_take_part() -> None:
    """A padded position is the qkv bias, and leaving it out of the softmax is wrong."""
    torch.manual_seed(0)
    block = Block(8, 2, use_rel_pos=True, rel_pos_zero_init=False, window_size=4)
    torch.nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(1, 5, 5, 8)
    normed = block.norm1(x)
    corner = block.attn(F.pad(normed, (0, 0, 0, 3, 0, 3))[:, 4:, 4:])[:, :1, :1]  # the window of one real token
    alone = block.attn.proj(block.attn.qkv(normed[:, 4:, 4:])[..., 16:])  # what it would be without padded keys
    y = x[:, 4:, 4:] + corner
    expected = y + block.mlp(block.norm2(y))
    assert_close_max(block(x)[:, 4:, 4:].detach(), expected.detach(), 1e-6, "the corner window")
    assert (corner - alone).abs().max() > 1e-2


def test_relative_position_tables_of_another_length() -> None:
    table = torch.randn(9, 4)
    assert torch.equal(get_rel_pos(5, 5, table)[0], table[torch.arange(4, -1, -1)])
    resized = F.interpolate(table.t()[None], 13, mode="linear")[0].t()
    torch.testing.assert_close(get_rel_pos(7, 7, table)[2, 5], resized[2 - 5 + 6])
    stretched = get_rel_pos(2, 4, torch.randn(7, 4))  # axes of two lengths
    assert stretched.shape == (2, 4, 4)


def test_bias_uses_the_unscaled_query() -> None:
    q, h, w = torch.randn(1, 6, 4), torch.randn(5, 4), torch.randn(3, 4)
    bias = add_decomposed_rel_pos(torch.zeros(1, 6, 6), q, h, w, (3, 2), (3, 2))
    torch.testing.assert_close(bias[0, 5, 0], q[0, 5] @ h[2 - 0 + 2] + q[0, 5] @ w[1 - 0 + 1])


# Prompts --------------------------------------------------------------------------------------------------


def test_padding_point_and_box_corners(tiny: Sam) -> None:
    encoder = tiny.prompt_encoder
    coords, labels = torch.tensor([[[3.0, 5.0], [7.0, 1.0]]]), torch.tensor([[1, -1]])
    sparse, dense = encoder((coords, labels), None, None)
    assert sparse.shape == (1, 3, 64)  # two points and the padding point
    for row in (1, 2):  # a point labelled -1 is a padding point, wherever it is
        torch.testing.assert_close(sparse[0, row], encoder.not_a_point_embed.weight[0])
    at = encoder.pe_layer._pe_encoding(torch.tensor([3.5, 5.5]) / 128)
    torch.testing.assert_close(sparse[0, 0], at + encoder.point_embeddings[1].weight[0])
    assert dense.shape == (1, 64, 8, 8)
    sparse, _ = encoder((coords, labels), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None)
    assert sparse.shape == (1, 4, 64)  # with a box there is no padding point
    corner = encoder.pe_layer._pe_encoding(torch.tensor([3.5, 4.5]) / 128) + encoder.point_embeddings[3].weight[0]
    torch.testing.assert_close(sparse[0, 3], corner)
    assert encoder(None, None, None)[0].shape == (1, 0, 64)


def test_absent_tokens_change_nothing(tiny: Sam) -> None:
    """Token padding is masked exactly: 7 tokens padded to 12 give what 7 give."""
    features = torch.randn(2, 64, 8, 8)
    coords, labels = torch.rand(3, 2, 2) * 128, torch.tensor([[1, -1]] * 3)
    padded_coords = F.pad(coords, (0, 0, 0, 5), value=1e4)
    padded_labels = F.pad(labels, (0, 5), value=LABEL_ABSENT)
    index = torch.tensor([0, 1, 0])
    for kernels in ("reference", "torch"):
        results = []
        for some_coords, some_labels in ((coords, labels), (padded_coords, padded_labels)):
            logits, iou = fused_decoder.decode(
                pack_decoder(tiny.mask_decoder),
                features,
                tiny.prompt_encoder.get_dense_pe(),
                tiny.prompt_encoder.embed_tokens(some_coords, some_labels),
                tiny.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1),
                mask_slice=slice(1, None),
                image_index=index,
                token_mask=some_labels != LABEL_ABSENT,
                kernels=kernels,
            )
            results.append((logits, iou))
        assert_close_l2(results[1][0], results[0][0], 1e-6, f"logits, {kernels}")
        assert_close_l2(results[1][1], results[0][1], 1e-6, f"IoU, {kernels}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_are_encoded_in_fp32_in_a_half_model(dtype: torch.dtype) -> None:
    """bf16 coordinates would be 4 px apart at 512..1024."""
    full, half = random_model(TINY), random_model(TINY).to(dtype)
    assert half.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.dtype == torch.float32
    assert half.pixel_mean.dtype == half.pixel_std.dtype == torch.float32
    assert half.dtype == dtype
    assert torch.equal(full.prompt_encoder.get_dense_pe(), half.prompt_encoder.get_dense_pe())
    coords = torch.tensor([[[100.25, 77.5], [101.0, 77.5]]])
    one = full.prompt_encoder.pe_layer.forward_with_coords(coords, (128, 128))
    assert torch.equal(one, half.prompt_encoder.pe_layer.forward_with_coords(coords, (128, 128)))
    assert half.prompt_encoder.embed_tokens(coords, torch.ones(1, 2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one, full.prompt_encoder.pe_layer.forward_with_coords(coords, (128, 128)))


def test_bf16_model_gives_nearly_the_fp32_masks(nano: Sam, photo: np.ndarray) -> None:
    half = sam.load_model(device="cpu", dtype=torch.bfloat16)
    prompts = [Prompt([(170, 115)], [1]), Prompt(box=(135, 85, 208, 148))]
    full_masks = nano.predict(nano.encode(photo), prompts).masks
    result = half.predict(half.encode(photo), prompts)
    assert result.iou_predictions.dtype == result.low_res_logits.dtype == torch.float32
    both = (full_masks & result.masks).sum((-1, -2)) / (full_masks | result.masks).sum((-1, -2))
    assert both.min() > 0.9


def test_under_autocast(nano: Sam, photo: np.ndarray) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = nano.predict(nano.encode(photo), [Prompt([(170, 115)], [1])])
    expected = nano.predict(nano.encode(photo), [Prompt([(170, 115)], [1])])
    assert_close_l2(result.low_res_logits, expected.low_res_logits, 0.05, "autocast")


def test_fp64_model(tiny: Sam) -> None:
    """The same computation in fp64, down to the positional encoding: the truth for later comparisons."""
    wide = copy.deepcopy(tiny).double()
    image = random_image(100, 128)
    prompts = [Prompt([(5, 9)], [1])]
    assert wide.prompt_encoder.get_dense_pe().dtype == torch.float64
    expected = wide.predict(wide.encode(image), prompts)
    actual = tiny.predict(tiny.encode(image), prompts)
    assert_close_l2(actual.low_res_logits, expected.low_res_logits, 1e-5, "fp32 against fp64")


# Gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_gradients_reach_every_parameter(kernels: str) -> None:
    model = random_model(TINY).requires_grad_(True)
    features = model.image_encoder(model.preprocess(torch.rand(1, 3, 128, 96) * 255))
    points = torch.rand(2, 3, 2) * 128, torch.tensor([[0, 1, -1]] * 2)
    boxes, masks = torch.rand(2, 4) * 128, torch.randn(2, 1, 32, 32)
    loss = torch.zeros(())
    for dense_input in (None, masks):
        sparse, dense = model.prompt_encoder(points, boxes, dense_input)
        sparse = torch.cat([sparse, model.prompt_encoder(points, None, None)[0]], dim=1)
        logits, iou = fused_decoder.decode(
            pack_decoder(model.mask_decoder),
            features,
            model.prompt_encoder.get_dense_pe(),
            sparse,
            dense,
            mask_slice=slice(None),
            kernels=kernels,
        )
        loss = loss + logits.square().mean() + iou.square().mean()
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # A key's bias adds the same to every score of a query: the softmax takes it out again.
    assert all(name.endswith("k_proj.bias") for name in silent), silent


def test_gradcheck_of_the_decoder() -> None:
    widths = {"prompt_embed_dim": 16, "decoder_num_heads": 2, "decoder_mlp_dim": 8}
    config = sam.SamConfig("custom", 16, 1, 1, (), image_size=32, mask_in_chans=4, **widths)
    model = random_model(config).double()
    pe = model.prompt_encoder.get_dense_pe()
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    for kernels in ("reference", "torch"):

        def masks(features: torch.Tensor, sparse: torch.Tensor, kernels: str = kernels) -> torch.Tensor:
            packed = pack_decoder(model.mask_decoder)
            alternatives = slice(1, None)
            return fused_decoder.decode(packed, features, pe, sparse, dense, mask_slice=alternatives, kernels=kernels)[
                0
            ]

        features = torch.randn(1, 16, 2, 2, dtype=torch.float64, requires_grad=True)
        sparse = torch.randn(2, 1, 16, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(masks, (features, sparse))


def test_the_prompt_encoder_is_traced_compiled_and_mapped(tiny: Sam) -> None:
    """The checks of values read nothing where there are none to be read."""

    def encode(coords: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return tiny.prompt_encoder((coords, labels), boxes, None)[0]

    coords, labels, boxes = torch.rand(3, 2, 2) * 99, torch.tensor([[1, 0]] * 3), torch.rand(3, 4) * 99
    expected = encode(coords, labels, boxes)
    assert torch.equal(encode(coords.requires_grad_(), labels, boxes), expected)
    coords = coords.detach()
    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    assert torch.equal(compiled(coords, labels, boxes), expected)
    mapped = torch.func.vmap(encode)(coords[:, None], labels[:, None], boxes[:, None])
    torch.testing.assert_close(mapped[:, 0], expected)
    derivative = torch.func.jacfwd(encode)(coords[:1], labels[:1], boxes[:1])
    torch.testing.assert_close(derivative, torch.func.jacrev(encode)(coords[:1], labels[:1], boxes[:1]))
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes_only:
        assert encode(*(shapes_only.from_tensor(tensor) for tensor in (coords, labels, boxes))).shape == expected.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(encode, (coords, labels, boxes), check_trace=False)
    assert torch.equal(traced(coords, 1 - labels, boxes), encode(coords, 1 - labels, boxes))


def test_lora_in_place_of_the_projections(tiny: Sam) -> None:
    """Fine-tunes wrap ``qkv``, ``q_proj`` and ``v_proj`` in modules of their own."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    image, prompts = random_image(60, 60), [Prompt([(4, 4)], [1])]
    expected = tiny.predict(tiny.encode(image), prompts).low_res_logits
    for block in tiny.image_encoder.blocks:
        block.attn.qkv = Wrapped(block.attn.qkv)
    for layer in tiny.mask_decoder.transformer.layers:
        layer.cross_attn_token_to_image.v_proj = Wrapped(layer.cross_attn_token_to_image.v_proj)
    # A wrapped projection runs as it is instead of being folded: the same result with other roundings.
    assert_close_l2(tiny.predict(tiny.encode(image), prompts).low_res_logits, expected, 1e-5, "wrapped projections")


def test_kernels_resolve_where_the_model_is(tiny: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # or Triton forms run on the CPU
    assert tiny.kernels == "auto"
    assert tiny.resolved_kernels == "torch"
    with pytest.raises(ValueError, match=r"kernels must be one of auto, reference, torch, triton, got 'cuda'"):
        tiny.kernels = "cuda"
    with pytest.raises(ValueError, match=r"kernels must be one of"):
        sam.load_model(kernels="fast")
    tiny.kernels = "triton"
    with pytest.raises(
        ValueError, match=r"'triton' implementation of \w+ cannot run here: it needs a CUDA device, got cpu"
    ):
        tiny.predict(tiny.encode(random_image(9, 9)), [Prompt([(1, 1)], [1])])


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match=r"encoder_num_heads=5 must divide encoder_embed_dim=64"):
        sam.SamConfig("custom", 64, 2, 5, ())
    with pytest.raises(ValueError, match=r"global_attn_indexes \[7\] lie outside 0..1"):
        sam.SamConfig("custom", 64, 2, 2, (0, 7))
    assert sam.SamConfig.from_json(TINY.to_json()) == TINY
