"""The descriptions of SAM 2's models: the table, the way through JSON, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sam.config import SAM2_VARIANTS, HieraConfig, Sam2Config

TINY = SAM2_VARIANTS["sam2.1_tiny"]


def test_the_table_has_four_sizes_of_two_releases() -> None:
    sizes = {variant.split("_", 1)[1]: config for variant, config in SAM2_VARIANTS.items()}
    assert {size: config.image_encoder.channel_list for size, config in sizes.items()} == {
        "tiny": [768, 384, 192, 96],
        "small": [768, 384, 192, 96],
        "base_plus": [896, 448, 224, 112],
        "large": [1152, 576, 288, 144],
    }
    assert [c.version for c in SAM2_VARIANTS.values()] == ["2"] * 4 + ["2.1"] * 4
    for config in sizes.values():
        first = SAM2_VARIANTS[config.variant.replace("2.1", "2")]
        assert first.image_encoder == config.image_encoder


@pytest.mark.parametrize("variant", SAM2_VARIANTS)
def test_a_config_survives_json(variant: str) -> None:
    config = replace(SAM2_VARIANTS[variant], image_size=512, memory_temporal_stride_for_eval=2)
    assert Sam2Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 1000}, "image_size must be a positive multiple of 32, got 1000"),
        ({"image_size": 0}, "image_size must be a whole number from 1 to 65536"),
        ({"num_maskmem": 7.0}, "num_maskmem must be a whole number from 0 to 256"),
        ({"pred_obj_scores": 1}, "pred_obj_scores must be true or false, got 1"),
        ({"sigmoid_scale_for_mem_enc": "20"}, "sigmoid_scale_for_mem_enc must be a number"),
        ({"sigmoid_bias_for_mem_enc": float("nan")}, "sigmoid_bias_for_mem_enc must be a number"),
        ({"pixel_std": (1, 0, 1)}, "pixel_std must not be 0"),
        ({"image_encoder": {"embed_dim": 96}}, "incomplete HieraConfig"),
        ({"image_encoder": {"embed_dims": 96}}, r"unknown HieraConfig fields \['embed_dims'\]"),
    ],
)
def test_what_no_model_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (1, 0, 7, 2)}, r"stages must be a whole number"),
        ({"window_spec": (8, 4, 14)}, "one window per stage"),
        ({"global_att_blocks": (5, 12)}, r"global_att_blocks \[12\] lie outside 0..11"),
        ({"num_heads": 5}, "num_heads=5 must divide embed_dim=96"),
        ({"fpn_top_down_levels": (2, 4)}, r"fpn_top_down_levels \[4\] lie outside 0..3"),
        ({"q_pool": 4}, "q_pool must be a whole number from 0 to 3"),
    ],
)
def test_what_no_encoder_can_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY.image_encoder, **changes)


def test_lists_and_numbers_of_another_kind_are_taken() -> None:
    encoder = HieraConfig(96, 1, [1, 2, 7, 2], [5, 7, 9], dim_mul=2)  # type: ignore[arg-type]
    assert encoder == TINY.image_encoder
