"""The command line with a model of SAM 2, which no option has to name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import random_image, randomise
from PIL import Image

import sam
from sam import HieraConfig, Sam2Config
from sam.cli import main

TRUNK = HieraConfig(16, 1, (1, 2, 3, 1), (4,), d_model=64)
SMALL = Sam2Config("custom", TRUNK, image_size=64, memory_attention_layers=1, fuser_layers=1)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = sam.build_from_config(SMALL)
    randomise(model)
    sam.save_checkpoint(model, tmp_path / "two.safetensors")
    Image.fromarray(random_image(40, 70)).save(tmp_path / "photo.png")
    return tmp_path / "two.safetensors"


def test_commands_take_sam2(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, model = str(tmp_path / "photo.png"), ["--checkpoint", str(weights), "--device", "cpu"]
    assert main(["info", str(weights)]) == 0
    assert "Hiera of 16 32 64 128 channels, 1 2 3 1 blocks" in capsys.readouterr().out
    assert main(["segment", photo, "--point", "30,20", "--out", str(tmp_path / "out"), *model]) == 0
    document = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert len(document["masks"]) == 3
    low = ["--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--max-memory", "1GB"]
    assert main(["auto", photo, "--out", str(tmp_path / "auto"), *low, *model]) == 0
    assert list((tmp_path / "auto" / "photo").glob("*.png"))
    assert main(["convert", str(weights), str(tmp_path / "folder"), "--layout", "transformers"]) == 0
    assert sam.load_model(tmp_path / "folder").model_hash == sam.load_model(weights).model_hash
    assert main(["segment", photo, "--point", "30,20", "--out", str(tmp_path), "--variant", "vit_b", *model]) == 2
    assert "these are weights of custom (16 channels, 7 blocks), not of vit_b" in capsys.readouterr().err
