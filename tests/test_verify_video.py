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
from sam.verify import Models
from sam.verify_video import Drift, FrameDrift, compare_videos, drawn_frames, drift_frames, verify_video
from sam.video.object_batch import ObjectBatch


@pytest.fixture
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2)).requires_grad_(False)


@pytest.mark.parametrize(("dtype", "frames"), [(torch.float32, None), (torch.bfloat16, 6)], ids=str)
def test_a_right_model_passes(model: SAM2Base, dtype: torch.dtype, frames: int | None) -> None:
    checks = list(verify_video(model.to(dtype=dtype), drift=frames))
    frames = frames or 20
    assert not [check for check in checks if not check.passed]
    assert [(check.operation, check.case) for check in checks] == [
        ("memory attention", "click"),
        ("memory attention", "box"),
        ("memory encoder", "all objects"),
        ("tracked frame", "all objects"),
        ("tracked video", f"{frames} frames of 64 px"),
    ]
    assert all(check.noise > 0 for check in checks)
    *_, frame, drift = checks
    assert frame.mask_iou is not None
    assert isinstance(drift, Drift)
    assert len(drift.frames) == frames - 1
    assert all(each.noise > 0 for each in drift.frames)
    assert drift.mask_iou == min(each.mask_iou for each in drift.frames) > (0.999 if dtype == torch.float32 else 0.5)
    assert drift.error <= max(each.error for each in drift.frames)
    assert 0.5 < drift.growth < 2


def in_attention(model: Any) -> torch.Tensor:
    return (
        look(model.memory_attention).packed(pack_memory_attention, model.memory_attention).packed.layers[0].out.weight
    )


def in_encoder(model: Any) -> torch.Tensor:
    packed = look(model.memory_encoder).packed(pack_memory_encoder, model.memory_encoder).packed
    return packed.blocks[0].second.weight


@pytest.mark.parametrize(
    ("of", "operations"),
    [
        (in_attention, {"memory attention", "tracked frame", "tracked video"}),
        (in_encoder, {"memory encoder", "tracked video"}),
    ],
    ids=["attention", "encoder"],
)
def test_a_corrupted_weight_is_found(model: SAM2Base, of: Callable[[Any], torch.Tensor], operations: set[str]) -> None:
    """The weights are right; what was made of them is not. A frame does not read the memory that it leaves."""
    of(model)[:3] += 3
    assert {check.operation for check in verify_video(model, drift=4) if not check.passed} == operations


def pointers_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The furthest pointer is lost where there are more than four, and so on no frame that is tracked alone."""
    memories = ObjectBatch._memories

    def faulty(self: Any, choices: Any, lengths: Any) -> Any:
        cut = [each._replace(pointers=each.pointers[: -1 if len(each.pointers) > 4 else None]) for each in choices]
        return memories(self, cut, lengths)

    monkeypatch.setattr(ObjectBatch, "_memories", faulty)


def memories_that_fade(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory is a thousandth weaker than it should be, and so is all that is learnt from it."""
    remember = ObjectBatch._remember
    monkeypatch.setattr(ObjectBatch, "_remember", lambda *given: 0.999 * remember(*given))


def absent_objects_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories are made as if no object were seen."""
    remember = ObjectBatch._remember
    monkeypatch.setattr(
        ObjectBatch, "_remember", lambda self, frame, masks, seen: remember(self, frame, masks, torch.zeros_like(seen))
    )


@pytest.mark.parametrize("fault", [pointers_late, memories_that_fade, absent_objects_forgotten])
def test_a_fault_that_single_steps_do_not_show_is_found(
    model: SAM2Base, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in the fast form alone, it is in what a video leaves behind."""
    fault(monkeypatch)
    *steps, drift = verify_video(model, drift=8)
    assert all(check.passed for check in steps)
    assert not drift.passed
    assert isinstance(drift, Drift)
    assert drift.frames[0].error < 1e-5 < drift.frames[-1].error
    assert all(frame.seen == 2 for frame in drift.frames)


def test_growth_is_that_of_a_line() -> None:
    def drift(*errors: float) -> Drift:
        return Drift("", "", 1, 1, 1, 1, tuple(FrameDrift(error, 1, 1, 2) for error in errors))

    assert drift(1e-6, 2e-6, 4e-6, 8e-6).growth == pytest.approx(2)
    assert drift(3e-6, 3e-6, 3e-6).growth == pytest.approx(1)
    assert drift(1e-6).growth == 1


def test_frames_on_a_cpu_are_as_many_as_it_tracks(model: SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for size in (64, 512, 768, 1024, 2048):
        monkeypatch.setattr(model, "image_size", size)
        counts[size] = drift_frames(model)
    assert counts == {64: 20, 512: 20, 768: 8, 1024: 5, 2048: 5}


def test_whether_objects_are_seen_is_told(model: SAM2Base) -> None:
    """Masks of objects that nobody sees are all alike."""
    head = model.get_parameter("sam_mask_decoder.pred_obj_score_head.layers.2.bias")
    seen = []
    for lower in (0, 100):
        head.sub_(lower)
        drift = compare_videos(Models.of(model), drawn_frames(64, 3))
        seen.append([frame.seen for frame in drift.frames])
    assert seen == [[2, 2], [0, 0]]
    assert (drift.error, drift.mask_iou, drift.passed) == (0, 1, True)


def test_command(model: SAM2Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sam.save_checkpoint(model, tmp_path / "two.safetensors")
    arguments = ["verify", str(tmp_path / "two.safetensors"), "--device", "cpu", "--video"]
    assert main([*arguments, "--frames", "3", "--json", str(tmp_path / "checks.json")]) == 0
    said = capsys.readouterr().out
    assert "drift is measured over 3 frames of 64 px" in said
    assert [line.split(" error")[0].strip() for line in said.splitlines() if "mask IoU" in line][1:] == [
        *("frame 1", "frame 2", "tracked video, 3 frames of 64 px")
    ]
    assert "all 5 checks within budget" in said
    document = json.loads((tmp_path / "checks.json").read_text())
    assert document["passed"] is True
    assert [sorted(frame) for frame in document["checks"][-1]["frames"]] == [["error", "mask_iou", "noise", "seen"]] * 2
    assert main([*arguments, "--frames", "1"]) == 2
    assert "at least two are needed, got 1" in capsys.readouterr().err
    assert main(["verify", "--device", "cpu", "--frames", "4"]) == 2
    assert "--frames is of --video" in capsys.readouterr().err
    assert main(["verify", "--device", "cpu", "--video"]) == 2
    assert "the embedded model and SAM do not track" in capsys.readouterr().err


def test_a_frame_needs_one_before_it(model: SAM2Base) -> None:
    with pytest.raises(ValueError, match="at least two are needed, got 1"):
        next(verify_video(model, [np.zeros((8, 8, 3), np.uint8)]))
