"""The programs of ``sam.examples``, as their first lines say that they are called."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sam.examples
from sam import load_model
from sam.examples import automatic_to_coco, batch_engine, drop_in, fine_tuning, many_prompts, video_frames
from sam.masks import rle

NAMES = [module.name for module in pkgutil.iter_modules(sam.examples.__path__)]


@pytest.fixture
def photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A photograph of coins, 384x303, in the working directory."""
    data = pytest.importorskip("skimage").data
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.coins()).save("coins.png")
    return Path("coins.png")


def covers_the_coin(mask: np.ndarray) -> bool:
    """Whether a mask is about the coin at (155, 51), a disc of 21 pixels."""
    rows, columns = np.indices(mask.shape)
    disc = np.hypot(columns - 155, rows - 51) < 21
    return bool((mask & disc).sum() > 0.6 * (mask | disc).sum())


def test_drop_in(photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_in.main(str(photograph), "155", "51")
    assert covers_the_coin(np.array(Image.open("mask.png")))
    assert "mask.png: " in capsys.readouterr().out


def test_many_prompts_draws_the_picture_of_the_readme(photograph: Path) -> None:
    many_prompts.main("drawn.png")
    drawn, shown = (
        np.array(Image.open(path), np.int16) for path in ("drawn.png", Path(many_prompts.__file__).parent / "coins.png")
    )
    assert (np.abs(drawn - shown).max(axis=2) > 8).mean() < 0.005  # pixels at the edges of masks round either way


def test_automatic_to_coco(photograph: Path) -> None:
    automatic_to_coco.main("masks.json", str(photograph))
    document = json.loads(Path("masks.json").read_text())
    assert [image["id"] for image in document["images"]] == [1]
    annotations = document["annotations"]
    assert any(covers_the_coin(rle.decode(annotation["segmentation"])) for annotation in annotations)
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))
    assert all(rle.decode(annotation["segmentation"]).sum() == annotation["area"] for annotation in annotations)


def test_batch_engine(photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch_engine.main(str(photograph), str(photograph))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert re.fullmatch(r"coins.png: click 0\.\d\d, box 0\.\d\d", lines[0])


def test_video_frames(photograph: Path) -> None:
    """A camera that moves six pixels a frame."""
    image = np.array(Image.open(photograph))
    frames = []
    for index in range(3):
        frames.append(f"{index}.png")
        Image.fromarray(np.roll(image, 6 * index, axis=1)).save(frames[-1])
    masks = video_frames.main("155", "51", *frames)
    assert len(masks) == 3
    for index, mask in enumerate(masks):
        assert covers_the_coin(np.roll(mask, -6 * index, axis=1))


def test_fine_tuning(tmp_path: Path) -> None:
    """Of a ring with its hole the model finds the ring; a few steps bring it nearer to both."""
    before, after = fine_tuning.main(str(tmp_path / "tuned.pth"), "6")
    assert after > before + 0.01
    assert load_model(tmp_path / "tuned.pth").model_hash != load_model().model_hash


@pytest.mark.parametrize("name", NAMES)
def test_every_example_says_how_it_is_called_and_is_short(name: str) -> None:
    module = importlib.import_module(f"sam.examples.{name}")
    assert f"python -m sam.examples.{name}" in (module.__doc__ or "")
    assert len(Path(module.__file__ or "").read_text().splitlines()) <= 75
    assert callable(module.main)
