"""What the pages show runs, and what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sam
from sam.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SERVICE = "".join(re.findall("<!-- service.*?<!-- end of service -->", README, re.DOTALL))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Lines that no test runs from the page, and why.
NOT_RUN = {
    "pip install": "installs",
    "python3 -m venv": "installs",
    ".venv/bin/pip": "installs",
    "make ": "installs, then runs the suite or the demo, which tests/test_cli.py starts",
    "fastsam run": "replaces this process by a program: tests/test_run.py",
    "curl ": "tests/test_service_process.py and tests/test_server_video_files.py send them to a service",
    "python -m sam track": "takes weights of SAM 2: tests/test_track_cli.py",
    "python -m sam quantize": "its gates are for many masks: tests/test_fidelity.py",
    "python -m sam text": "takes a detector: tests/test_text_cli.py",
    "python -m sam verify": "minutes of fp64: tests/test_verify.py",
}
# What the page says for official weights and a GPU, and what stands in their place: the embedded weights, fewer clicks.
IN_PLACE = {
    '["vit_h"](checkpoint="sam_vit_h_4b8939.pth").to("cuda")': '["nano"](checkpoint="sam_vit_h_4b8939.pth")',
    '"configs/sam2.1/sam2.1_hiera_l.yaml", "sam2.1_hiera_large.pt", device="cuda"': (
        '"sam2.1_hiera_t.yaml", device="cpu", hydra_overrides_extra=["++model.image_size=128"]'
    ),
    "points_per_side=32": "points_per_side=2",
    'sam.text.load_detector("llmdet_tiny")': "LeftHalf()",  # loading: tests/test_text_labels.py
    "auto photos/": "auto photos/ --points-per-side 2",
}


class LeftHalf:
    """A detector that finds each image's last label in the left half."""

    def detect(self, images: list[np.ndarray], labels: list[list[str]], threshold: float) -> list[sam.text.Detections]:
        boxes = [torch.tensor([[0, 0, image.shape[1] / 2, image.shape[0]]]) for image in images]
        return [
            sam.text.Detections(box, torch.tensor([0.9]), torch.tensor([len(own) - 1]))
            for box, own in zip(boxes, labels, strict=True)
        ]


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED.findall(README) if name == language]


def lines() -> Iterator[str]:
    """The lines of the blocks of commands, continued ones put together."""
    for block in blocks(""):
        yield from filter(None, block.replace("\\\n", " ").splitlines())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: sam.Sam, photo: np.ndarray) -> Path:
    """A working directory with the files that the page names; the weights in them are the embedded ones."""
    monkeypatch.chdir(tmp_path)
    for name in ("sam_vit_h_4b8939.pth", "sam_vit_b_01ec64.pth"):
        sam.save_checkpoint(nano, tmp_path / name)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/cat.png"):
        Image.fromarray(photo).save(tmp_path / name)
    return tmp_path


def put_in_place(text: str) -> str:
    for shown, stand_in in IN_PLACE.items():
        text = text.replace(shown, stand_in)
    return text


def test_python_blocks(folder: Path, photo: np.ndarray) -> None:
    """One after another, as one program; those of the service run where ``curl`` lines do."""
    scope = {
        "image": photo,
        "point_coords": np.array([[170, 115]]),
        "point_labels": np.array([1]),
        "photo": photo,
        "drawing": photo[:200, :150].copy(),
        "frames": [photo, photo, photo],
        "paths": ["photo.jpg", "photos/cat.png"],
        "torch": torch,
        "LeftHalf": LeftHalf,
    }
    ran = [block for block in blocks("python") if block not in SERVICE]
    assert len(ran) >= 6
    for block in ran:
        exec(compile(put_in_place(block), "README.md", "exec"), scope)
    assert scope["masks"].shape == (3, *photo.shape[:2])  # type: ignore[attr-defined]
    assert scope["first"].masks.shape == (2, 3, *photo.shape[:2])  # type: ignore[attr-defined]
    assert scope["embedding"].image_hash == scope["embeddings"][0].image_hash  # type: ignore[attr-defined, index]
    assert scope["answer"].mask().shape == photo.shape[:2]  # type: ignore[attr-defined]
    assert [each.labels for each in scope["found"]] == [["traffic light"], ["boat"]]  # type: ignore[attr-defined]
    assert scope["result"].objects == ("cat", "dog")  # type: ignore[attr-defined]
    assert scope["prediction"].masks.shape[-2:] == photo.shape[:2]  # type: ignore[attr-defined]


def test_command_lines(folder: Path) -> None:
    ran = [line for line in lines() if not line.startswith(tuple(NOT_RUN))]
    for line in ran:
        program, arguments = line[: len("python -m sam")], shlex.split(put_in_place(line), comments=True)[3:]
        assert program == "python -m sam", f"no test runs {line!r}, and NOT_RUN has no reason"
        assert main(arguments) == 0, line
    assert len(ran) >= 6
    assert list((folder / "out").glob("*.png"))
    assert list((folder / "masks").iterdir())
    assert sam.load_model(folder / "sam_vit_b.safetensors").model_hash == sam.load_model(folder / "folder").model_hash


def test_every_reason_not_to_run_is_needed() -> None:
    shown = list(lines())
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in shown)] == []
    assert [text for text in IN_PLACE if text not in README] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"])
def test_files_that_pages_name_exist(page: str) -> None:
    """Links, and names of files and folders of this repository in code marks."""
    text = FENCED.sub("", (ROOT / page).read_text())
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    named = re.findall(r"`((?:sam|fastsam_kernels|tests|benchmarks)/[\w./*-]*)`", text)
    missing += [name for name in named if not (any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists())]
    assert missing == []
    assert links or named
