"""``verify``: right models pass; a derived weight that was corrupted is found, and its operation named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, TINY_2, random_model

import sam
from sam import Sam
from sam.cli import main
from sam.inference import low_rank_tokens
from sam.inference.eligibility import look
from sam.inference.packed_weights import PackedDecoder, pack_decoder
from sam.modeling.promptable import PromptableModel
from sam.verify import drawn_image, verify


def failed(model: PromptableModel) -> set[str]:
    return {check.operation for check in verify(model) if not check.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_right_model_passes(kernels: str, dtype: torch.dtype) -> None:
    model = random_model(TINY).to(dtype=dtype)
    model.kernels = kernels
    checks = list(verify(model))
    assert not [check for check in checks if not check.passed]
    names = {check.operation for check in checks}
    assert {"rel_pos_attention", "two-way attention, image tokens", "hypernetwork_masks", "image to masks"} <= names
    assert all(check.mask_iou is not None for check in checks if check.operation == "image to masks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_model_of_sam2_passes(dtype: torch.dtype) -> None:
    checks = list(verify(random_model(TINY_2).to(dtype=dtype)))
    assert not [check for check in checks if not check.passed]
    names = [(check.operation, check.case) for check in checks]
    assert {
        ("window_attention", "block 1, windows of 8, pooled"),
        ("encoder block", "block 5, global"),
        ("image encoder", "finer features, 1/8 of the image"),
        ("object score", "all prompts"),
    } <= set(names)
    low_rank = {case for operation, case in names if operation.startswith("low-rank image tokens")}
    assert low_rank == ({"8 clicks of automatic masks"} if dtype == torch.float32 else set())


def test_a_wrong_table_of_low_rank_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only automatic masks read these tables: everything else is right."""
    make = low_rank_tokens._update

    def wrong(*arguments: Any) -> low_rank_tokens.Update:
        made = make(*arguments)
        return made._replace(squares=1.5 * made.squares)

    monkeypatch.setattr(low_rank_tokens, "_update", wrong)
    assert failed(random_model(TINY_2)) == {"low-rank image tokens, masks", "low-rank image tokens, scores"}


@pytest.mark.parametrize("kept", ["finer 0", "positions"])
def test_a_corrupted_value_of_the_encoder_of_sam2_is_found(kept: str) -> None:
    model = random_model(TINY_2)
    model.encode(drawn_image(64))
    value = model.image_encoder._packed[kept].value
    (value[0] if kept == "finer 0" else next(iter(value.values())))[:3] += 3
    assert "image encoder" in {check.operation for check in verify(model) if not check.passed}


def packed(model: Sam) -> PackedDecoder:
    return look(model.mask_decoder).packed(pack_decoder, model.mask_decoder)


def in_upscaling(model: Sam) -> None:
    upscaling = packed(model).upscaling
    assert upscaling is not None
    upscaling.weight1[0, :3] += 3  # of a few channels: the norm takes away what all have in common


def in_hypernetworks(model: Sam) -> None:
    packed(model).hypernetworks[1, 4][0][0][0] += 3


def in_positions(model: Sam) -> None:
    model.prompt_encoder.get_dense_pe()[0] += 3


@pytest.mark.parametrize(
    ("corrupting", "operation"),
    [
        (in_upscaling, "hypernetwork_masks"),
        (in_hypernetworks, "hypernetwork_masks"),
        (in_positions, "positional encoding"),
    ],
)
def test_what_is_kept_is_checked(corrupting: Callable[[Sam], None], operation: str) -> None:
    """The weights are right; what was made of them is not."""
    model = random_model(TINY)
    model.predict(model.encode(drawn_image(128)), [sam.Prompt(), sam.Prompt([(9, 9)], [1])])
    corrupting(model)
    assert operation in failed(model)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "tiny.safetensors", tmp_path / "checks.json"
    sam.save_checkpoint(random_model(TINY), path)
    assert main(["verify", str(path), "--device", "cpu", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["passed"] is True
    assert f"all {len(document['checks'])} checks within budget" in capsys.readouterr().out

    def corrupted(args: object) -> Sam:
        model = sam.load_model(path, device="cpu")
        model.predict(model.encode(drawn_image(128)), [sam.Prompt()])
        in_upscaling(model)
        return model

    monkeypatch.setattr("sam.cli.verify.model_from", corrupted)
    assert main(["verify", str(path), "--json", str(out)]) == 1
    assert "checks over budget: hypernetwork_masks" in capsys.readouterr().err
    document = json.loads(out.read_text())
    assert document["passed"] is False
    assert {check["operation"] for check in document["checks"] if not check["passed"]} >= {"hypernetwork_masks"}


def test_an_encoder_that_is_not_ours_is_a_part_of_the_whole() -> None:
    class Foreign(torch.nn.Module):
        img_size = 128

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = random_model(TINY)
    model.image_encoder = Foreign(model.image_encoder)  # type: ignore[assignment]
    names = [check.operation for check in verify(model, drawn_image(128))]
    assert "rel_pos_attention" not in names
    assert "image encoder" in names


def test_the_drawn_image_is_the_same_everywhere() -> None:
    image = drawn_image(128)
    assert image.shape == (96, 128, 3)
    assert image.dtype == np.uint8
    assert len(np.unique(image)) > 100
    assert np.array_equal(image, drawn_image(128))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nano_from_the_command_line(dtype: str) -> None:
    assert main(["verify", "--device", "cpu", "--dtype", dtype]) == 0
