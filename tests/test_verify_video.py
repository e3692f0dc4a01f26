"""``verify --video``: models that track rightly pass; a packed weight of a memory that was corrupted is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL_2, draw_weights_that_see

import sam
from sam.cli import main
from sam.inference.eligibility import look
from sam.inference.fused_memory_attention import pack_memory_attention
from sam.inference.fused_memory_encoder import pack_memory_encoder
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base
from sam.verify_video import verify_video


@pytest.fixture
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2)).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_model_passes(model: SAM2Base, dtype: torch.dtype) -> None:
    checks = list(verify_video(model.to(dtype=dtype)))
    assert not [check for check in checks if not check.passed]
    assert [(check.operation, check.case) for check in checks] == [
        ("memory attention", "click"),
        ("memory attention", "box"),
        ("memory encoder", "all objects"),
        ("tracked frame", "all objects"),
    ]
    assert all(check.noise > 0 for check in checks)
    assert checks[-1].mask_iou is not None


def in_attention(model: Any) -> torch.Tensor:
    return (
        look(model.memory_attention).packed(pack_memory_attention, model.memory_attention).packed.layers[0].out.weight
    )


def in_encoder(model: Any) -> torch.Tensor:
    packed = look(model.memory_encoder).packed(pack_memory_encoder, model.memory_encoder).packed
    return packed.blocks[0].second.weight


@pytest.mark.parametrize(
    ("of", "operations"),
    [(in_attention, {"memory attention", "tracked frame"}), (in_encoder, {"memory encoder"})],
    ids=["attention", "encoder"],
)
def test_a_corrupted_weight_is_found(model: SAM2Base, of: Callable[[Any], torch.Tensor], operations: set[str]) -> None:
    """The weights are right; what was made of them is not. A frame does not read the memory that it leaves."""
    of(model)[:3] += 3
    assert {check.operation for check in verify_video(model) if not check.passed} == operations


def test_command(model: SAM2Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sam.save_checkpoint(model, tmp_path / "two.safetensors")
    arguments = ["verify", str(tmp_path / "two.safetensors"), "--device", "cpu", "--video"]
    assert main([*arguments, "--json", str(tmp_path / "checks.json")]) == 0
    assert "all 4 checks within budget" in capsys.readouterr().out
    assert json.loads((tmp_path / "checks.json").read_text())["passed"] is True
    assert main(["verify", "--device", "cpu", "--video"]) == 2
    assert "the embedded model and SAM do not track" in capsys.readouterr().err


def test_a_frame_needs_one_before_it(model: SAM2Base) -> None:
    with pytest.raises(ValueError, match="at least two are needed, got 1"):
        next(verify_video(model, [np.zeros((8, 8, 3), np.uint8)]))
