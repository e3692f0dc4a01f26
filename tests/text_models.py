"""Small random detectors of transformers, with tokenizers that no file is needed for."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WORDS = ("cat", "dog", "car", "red", "traffic", "light", "remote", "control", "person", "bus", "tree")
NUMBERED = tuple(f"thing{number}" for number in range(300))


def word_tokenizer() -> Any:
    """Return a BERT tokenizer of whole words, with BERT's own places of what cuts captions."""
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    places |= {1030 + place: word for place, word in enumerate((*WORDS, *NUMBERED))}
    vocabulary = {places.get(place, f"[unused{place}]"): place for place in range(1030 + len(WORDS) + len(NUMBERED))}
    return transformers.BertTokenizer(vocab=vocabulary)


def byte_tokenizer() -> Any:
    """Return a CLIP tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def grounding_dino(kind: str = "GroundingDino") -> tuple[Any, Any]:
    """Return a model of either class, of captions of 128 tokens, and its processor."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=3,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=swin,
        text_config=bert,
        num_queries=30,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_text_len=128,
        disable_custom_kernels=True,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    images = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 112})
    return _spread(model), transformers.GroundingDinoProcessor(images, tokenizer)


def owl() -> tuple[Any, Any]:
    """Return an OWLv2 of 36 patches and labels of 16 tokens, and its processor."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    common = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **common,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**common, "image_size": 48, "patch_size": 8}
    config = transformers.Owlv2Config(vision_config=vision, text_config=text, projection_dim=24)
    images = transformers.Owlv2ImageProcessorPil(size={"height": 48, "width": 48})
    model = transformers.Owlv2ForObjectDetection(config)
    return _spread(model), transformers.Owlv2Processor(images, tokenizer)


@torch.no_grad()
def _spread(model: Any) -> Any:
    """Add noise to every parameter: heads begin at constants, and all boxes and scores would be the same."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        inputs = parameter.shape[-1] if parameter.ndim else 1
        parameter += torch.randn(parameter.shape, generator=generator) * 0.25 / inputs**0.5
    return model.eval()
