"""What the writer writes the reader reads, or the writer says which keys it cannot write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import sam
from sam import Sam


def test_writing_replaces_whole_or_not_at_all(tmp_path: Path, tiny: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    sam.save_checkpoint(tiny, path)
    before = path.read_bytes()

    def fail(state: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        sam.save_checkpoint(tiny, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_writing_errors(tmp_path: Path, tiny: Sam) -> None:
    with pytest.raises(ValueError, match=r"layout must be one of official, transformers, got 'onnx'"):
        sam.save_checkpoint(tiny, tmp_path / "a.pth", "onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"suffix must be .safetensors, .pth or .pt"):
        sam.save_checkpoint(tiny, tmp_path / "a.onnx")
    by_hand = Sam(tiny.image_encoder, tiny.prompt_encoder, tiny.mask_decoder)
    with pytest.raises(ValueError, match=r"the model has no config"):
        sam.save_checkpoint(by_hand, tmp_path / "a.pth")
