"""``python -m sam auto``: what it writes, what it skips, what it reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import coins
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import sam
from sam import SamAutomaticMaskGenerator
from sam.amg.defaults import NANO_THRESHOLDS
from sam.cli import auto, main
from sam.system.atomic_write import partial_folder

QUICK = ("--image-size", "256", "--points-per-side", "5", "--pred-iou-thresh", "0.3", "--stability-score-thresh", "0.6")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs of one stem, a text and a damaged image."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(coins.photograph()[:120, :150]).save(images / "a.png")
    Image.fromarray(coins.photograph()[100:200, :140]).save(images / "a.jpg", quality=95)
    (images / "notes.txt").write_text("not an image")
    return images


def run(*arguments: object) -> int:
    return main(["auto", *map(str, arguments), *QUICK])


def test_png(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(folder, "--out", out, "--overlay") == 0
    results = {"a.png", "a.jpg", "a.png_overlay.png", "a.jpg_overlay.png"}
    assert {path.name for path in out.iterdir()} == {*results, "results.jsonl"}
    assert "2 images, " in capsys.readouterr().out
    with open(out / "a.png" / "metadata.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == [
        "id", "area", "bbox_x0", "bbox_y0", "bbox_w", "bbox_h", "point_input_x", "point_input_y", "predicted_iou",
        "stability_score", "crop_box_x0", "crop_box_y0", "crop_box_w", "crop_box_h",
    ]  # fmt: skip
    model = sam.load_model(device="cpu", image_size=256)
    records = SamAutomaticMaskGenerator(model, 5, pred_iou_thresh=0.3, stability_score_thresh=0.6).generate(
        np.array(Image.open(folder / "a.png"))
    )
    assert len(rows) == len(records) > 3
    for row, record in zip(rows, records, strict=True):
        mask = np.array(Image.open(out / "a.png" / f"{row[0]}.png"))
        np.testing.assert_array_equal(mask, record["segmentation"] * np.uint8(255))
        assert int(row[1]) == record["area"]
        x, y, width, height = record["bbox"]  # the official one leaves out the last column and row
        numbers = [
            x,
            y,
            width + 1,
            height + 1,
            *record["point_coords"][0],
            record["predicted_iou"],
            record["stability_score"],
        ]
        assert [float(cell) for cell in row[2:10]] == pytest.approx(numbers)
        assert row[10:] == ["0", "0", "150", "120"]
    with Image.open(out / "a.png_overlay.png") as overlay:
        assert overlay.size == (150, 120)


def test_coco(folder: Path, tmp_path: Path) -> None:
    """``--convert-to-rle`` and ``--output`` are the official script's names."""
    for options in (("--format", "coco", "--out"), ("--convert-to-rle", "--output")):
        out = tmp_path / options[0]
        assert run(folder / "a.png", *options, out) == 0
        assert {path.name for path in out.iterdir()} == {"a.json", "results.jsonl"}
        records = json.loads((out / "a.json").read_text())
        assert records
        for record in records:
            mask = coco.decode(record["segmentation"])
            assert mask.shape == (120, 150)
            assert mask.sum() == record["area"]
            assert record["bbox"] == coco.toBbox(record["segmentation"]).tolist()


def test_what_is_finished_is_skipped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(folder, "--out", out) == 0
    finished = out / "a.png" / "metadata.csv"
    before = finished.stat().st_mtime_ns
    # What a run that was killed leaves: a folder under a name of its own. A folder without its table is not whole.
    partial_folder(out / "a.jpg").mkdir()
    (out / "a.jpg" / "metadata.csv").unlink()
    capsys.readouterr()
    assert run(folder, "--out", out) == 0
    said = capsys.readouterr().out
    assert "skipped 1" in said
    assert "1 images, " in said
    assert finished.stat().st_mtime_ns == before
    assert (out / "a.jpg" / "metadata.csv").is_file()
    assert not partial_folder(out / "a.jpg").exists()
    assert run(folder, "--out", out) == 0
    assert "skipped 2" in capsys.readouterr().out
    assert run(folder, "--out", out, "--force") == 0
    assert finished.stat().st_mtime_ns > before


def photograph(path: Path, side: int = 40, grey: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), grey, np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def small() -> sam.Sam:
    return sam.load_model(image_size=64)


@pytest.fixture
def loaded_once(small: sam.Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "model_from", lambda args: small)


def run_one_click(*arguments: object) -> int:
    return main(["auto", "--format", "coco", "--image-size", "64", "--points-per-side", "1", *map(str, arguments)])


@pytest.mark.usefixtures("loaded_once")
def test_results_of_another_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another folder, or the same name with other pixels; not of a copy of the same file."""
    out = tmp_path / "out"
    first, second = photograph(tmp_path / "A" / "img.png"), photograph(tmp_path / "B" / "img.png", side=50)
    assert run_one_click(first.parent, "--out", out) == 0
    made = (out / "img.json").read_text()
    capsys.readouterr()
    for source in (second, second.parent, photograph(tmp_path / "C" / "img.jpg"), photograph(first, grey=91)):
        assert run_one_click(source, "--out", out) == 1
        captured = capsys.readouterr()
        message = f"{out / 'img.json'} was made from another file, img.png; --force replaces it, another --out keeps it"
        assert message in captured.err
        assert "1 failed" in captured.out
        assert (out / "img.json").read_text() == made
    photograph(tmp_path / "A" / "img.png").rename(tmp_path / "img.png")
    assert run_one_click(tmp_path / "img.png", "--out", out) == 0
    assert "skipped 1" in capsys.readouterr().out
    assert run_one_click(second, "--out", out, "--force") == 0
    assert run_one_click(second, "--out", out) == 0
    assert "skipped 1" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nano: sam.Sam
) -> None:
    """Other thresholds, another size of input, another dtype, other weights."""
    out, image = tmp_path / "out", photograph(tmp_path / "img.png")
    weights = tmp_path / "other.safetensors"
    changed = sam.load_model()
    with torch.no_grad():
        changed.mask_decoder.iou_token.weight += 1
    sam.save_checkpoint(changed, weights)
    assert run_one_click(image, "--out", out) == 0
    capsys.readouterr()
    for options, message in (
        (["--pred-iou-thresh", "-1e-1"], "other settings: pred_iou_thresh 0.5, now pred_iou_thresh -0.1; --force"),
        (["--image-size", "128"], "other settings: model_hash "),
        (["--dtype", "bf16"], "other settings: model_hash "),
        (["--checkpoint", weights], "made with other settings: "),
    ):
        assert run_one_click(image, "--out", out, *options) == 1
        assert message in capsys.readouterr().err
    assert run_one_click(image, "--out", out, "--max-memory", "1GB", "--kernels", "torch") == 0
    assert "skipped 1" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded_once")
def test_results_that_nobody_knows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, image = tmp_path / "out", photograph(tmp_path / "img.png")
    out.mkdir()
    (out / "img.json").write_text("[]")
    (out / "results.jsonl").write_text('{"result": "img.json", "file": "im\n[]\n')
    assert run_one_click(image, "--out", out) == 1
    assert (
        "img.json is not in results.jsonl, which says what results were made from; --force" in capsys.readouterr().err
    )
    assert run_one_click(image, "--out", out, "--force") == 0
    (out / "img.json").unlink()
    (out / "img.json").mkdir()
    (out / "results.jsonl").unlink()
    assert run_one_click(image, "--out", out, "--force") == 1
    assert "img.json is a folder of something else" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded_once")
def test_an_overlay_is_never_of_other_masks(tmp_path: Path) -> None:
    out, image = tmp_path / "out", photograph(tmp_path / "img.png")
    assert run_one_click(image, "--out", out, "--overlay") == 0
    assert (out / "img_overlay.png").is_file()
    assert run_one_click(image, "--out", out, "--force", "--pred-iou-thresh", "0.1") == 0
    assert not (out / "img_overlay.png").exists()


@pytest.mark.usefixtures("loaded_once")
def test_somebody_elses_overlay_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of that name, one in the place of an overlay that was removed, and a folder of another image's."""
    out, image = tmp_path / "out", photograph(tmp_path / "img.png")
    overlay = photograph(out / "img_overlay.png", grey=7)
    theirs = overlay.read_bytes()
    for options in ([], ["--pred-iou-thresh", "0.1", "--force"], ["--force"]):
        assert run_one_click(image, "--out", out, *options) == 0
        assert overlay.read_bytes() == theirs
    assert run_one_click(image, "--out", out, "--overlay") == 1
    assert "img_overlay.png is not in results.jsonl" in capsys.readouterr().err
    assert overlay.read_bytes() == theirs
    assert run_one_click(image, "--out", out, "--overlay", "--force") == 0
    assert overlay.read_bytes() != theirs
    assert run_one_click(image, "--out", out, "--force") == 0
    assert not overlay.exists()
    overlay.write_bytes(theirs)
    assert run_one_click(image, "--out", out, "--force") == 0
    assert overlay.read_bytes() == theirs
    overlay.unlink()
    other = photograph(tmp_path / "img_overlay.png.jpg")
    assert run_one_click(other, "--out", out, "--format", "png") == 0
    assert run_one_click(image, "--out", out, "--force") == 0
    assert (overlay / "metadata.csv").is_file()
    assert run_one_click(image, "--out", out, "--force", "--overlay") == 1
    assert "img_overlay.png is a folder of something else" in capsys.readouterr().err
    assert (overlay / "metadata.csv").is_file()
    assert (out / "img.json").is_file()  # nothing is removed where not all may be


@pytest.mark.usefixtures("loaded_once")
def test_an_overlay_of_another_image_is_not_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a run that asks for no overlay, where the masks it belongs to are gone."""
    out, image = tmp_path / "out", photograph(tmp_path / "A" / "img.png")
    assert run_one_click(image, "--out", out, "--overlay") == 0
    (out / "img.json").unlink()
    other = photograph(tmp_path / "B" / "img.png", grey=3)
    assert run_one_click(other, "--out", out) == 1
    assert "img_overlay.png was made from another file, img.png; --force replaces it" in capsys.readouterr().err
    assert (out / "img_overlay.png").is_file()


@pytest.mark.usefixtures("loaded_once")
def test_no_result_is_called_as_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for name in ("results.jsonl.png", "Results.JSONL.jpg"):
        image = photograph(tmp_path / name)
        assert run_one_click(image, "--out", out, "--format", "png", "--force") == 2
        assert f"the results of {image} would be called {image.stem}, as the record" in capsys.readouterr().err
        assert run_one_click(image, "--out", out) == 0  # results.jsonl.json is no such name


@pytest.mark.usefixtures("loaded_once")
def test_a_damaged_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can be read of it counts, how much cannot is said, and a line that was cut off spoils no other."""
    out, image = tmp_path / "out", photograph(tmp_path / "img.png")
    assert run_one_click(image, "--out", out) == 0
    record = out / "results.jsonl"
    whole = record.read_bytes()
    damaged = [
        b"\xff\xfe{",
        b"5",
        b"[]",
        b"[" * 100_000,
        b'{"result": "img.json", "sha256": "", "file": "", "settings": 1}',
    ]
    record.write_bytes(b"\n".join([*damaged, b"", whole, b'{"result": "im']))
    capsys.readouterr()
    assert run_one_click(image, "--out", out) == 0
    captured = capsys.readouterr()
    assert "skipped 1" in captured.out
    assert f"{record}: skipped 6 damaged lines" in captured.err
    other = photograph(tmp_path / "other.png")
    for _ in range(2):
        assert run_one_click(other, "--out", out) == 0
    assert "skipped 1" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded_once")
def test_long_names(tmp_path: Path) -> None:
    """A name is short enough where those of the results are."""
    for name, options in (("n" * 243, ["--overlay"]), ("m" * 250, []), ("é" * 121, ["--overlay"])):
        image = photograph(tmp_path / f"{name}.png")
        for form in ("png", "coco"):
            assert run_one_click(image, "--out", tmp_path / form, "--format", form, *options) == 0
        assert (tmp_path / "png" / name / "metadata.csv").is_file()
        assert (tmp_path / "coco" / f"{name}.json").is_file()


@pytest.mark.usefixtures("loaded_once")
def test_names_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hidden files and what is no photograph are left alone; stems that differ by case only are told apart."""
    for name in ("a.png", "A.jpg", "b.png"):
        photograph(tmp_path / "images" / name)
    for name in ("._a.png", ".hidden.jpg", "notes.pdf", "labels.h5", "clip.mpg", "scene.fits", "list.txt"):
        (tmp_path / "images" / name).write_bytes(b"\0\5\x16\7")
    named = auto.find_images(tmp_path / "images")
    assert {path.name: name for path, name in named.items()} == {"a.png": "a.png", "A.jpg": "A.jpg", "b.png": "b"}
    photograph(tmp_path / "images" / "a.jpg.png")
    photograph(tmp_path / "images" / "a.jpg").unlink()
    photograph(tmp_path / "images" / "A.png")
    assert run_one_click(tmp_path / "images", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "would both be called " in error
    assert "rename one" in error


def test_nothing_half_written_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the third mask."""
    save = Image.Image.save

    def full(self: Image.Image, path: Path, *arguments: object) -> None:
        if Path(path).name == "2.png":
            raise OSError(28, "No space left on device")
        save(self, path, *arguments)

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "out"
    assert run(folder / "a.png", "--out", out) == 1
    assert [path.name for path in out.iterdir()] == ["results.jsonl"]
    assert "No space left on device" in capsys.readouterr().err


def test_a_broken_image_is_reported_and_the_rest_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    out = tmp_path / "out"
    assert run(folder, "--out", out, "--format", "coco") == 1
    captured = capsys.readouterr()
    assert "0.png" in captured.err
    assert "damaged" in captured.err
    assert "2 images, " in captured.out
    assert "1 failed" in captured.out
    assert {path.name for path in out.iterdir()} == {"a.png.json", "a.jpg.json", "results.jsonl"}


def test_bad_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, out, message in (
        (tmp_path / "none", tmp_path, "no such image or folder"),
        (empty, tmp_path, "no images in"),
        (folder, folder, "--out must be another folder"),
    ):
        assert run(source, "--out", out) == 2
        assert message in capsys.readouterr().err
    assert run(folder, "--out", tmp_path / "out", "--max-memory", "much") == 2
    assert "got 'much'" in capsys.readouterr().err


def test_the_help_tells_the_defaults_of_nano(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["auto", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in NANO_THRESHOLDS:
        assert f"--{name.replace('_', '-')}" in text
    assert f"(default: 0.88; {NANO_THRESHOLDS['pred_iou_thresh']:g} for the embedded nano, 0.8 for SAM 2)" in text
    assert f"(default: 0.95; {NANO_THRESHOLDS['stability_score_thresh']:g} for the embedded nano)" in text
    assert "SAM's thresholds" in text


def test_the_defaults_of_nano_are_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def watched(model: sam.Sam, **arguments: object) -> SamAutomaticMaskGenerator:
        seen.update(arguments)
        return SamAutomaticMaskGenerator(model, 2)

    monkeypatch.setattr(auto, "SamAutomaticMaskGenerator", watched)
    main(["auto", str(folder / "a.png"), "--out", str(tmp_path / "out"), "--format", "coco", "--box-nms-thresh", "0.5"])
    assert {name: seen[name] for name in NANO_THRESHOLDS} == NANO_THRESHOLDS
    assert seen["box_nms_thresh"] == 0.5
    assert seen["points_per_side"] == 32
