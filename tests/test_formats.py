"""The table of mask formats, and what it promises: a format is one entry, and every way out of the project has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY, random_image, random_model
from PIL import Image

import sam
from sam.cli import auto, main, segment
from sam.masks import formats, rle
from sam.masks.formats import FORMATS, JSON, MaskFormat, MaskSet

IMAGE = random_image(60, 90)


def sums(masks: MaskSet) -> bytes:
    return b"".join(b"%d\n" % mask.sum() for mask in masks)


def rows(masks: MaskSet) -> list[Any]:
    return [mask.any(axis=1).sum().item() for mask in masks]


@pytest.fixture
def new_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two formats more, of one entry each."""
    for form in (
        MaskFormat("sums", "areas", ".sums", "text/x-sums", sums),
        MaskFormat("rows", "rows that have pixels", ".json", JSON, rows),
    ):
        monkeypatch.setitem(FORMATS, form.name, form)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> sam.Sam:
    model = random_model(TINY)
    for command in (auto, segment):
        monkeypatch.setattr(command, "model_from", lambda args: model)
    return model


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "cat.png"
    path.parent.mkdir()
    Image.fromarray(IMAGE).save(path)
    return path


@pytest.mark.usefixtures("new_formats")
def test_a_new_format_on_the_command_line(
    tiny: sam.Sam, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, thresholds in (
        (["segment", str(photograph), "--point", "5,6"], []),
        (
            ["auto", str(photograph), "--points-per-side", "2"],
            ["--pred-iou-thresh", "0", "--stability-score-thresh", "0"],
        ),
    ):
        written = {}
        for name in ("coco", "sums", "rows", "polygons", "labels", "npz"):
            written[name] = tmp_path / command[0] / name
            assert main([*command, *thresholds, "--format", name, "--out", str(written[name])]) == 0
        stem = "cat_masks" if command[0] == "segment" else "cat"
        records = {name: json.loads((written[name] / "cat.json").read_text()) for name in ("coco", "rows")}
        if command[0] == "segment":
            records = {name: document["masks"] for name, document in records.items()}
        masks = [rle.decode(record["segmentation"]) for record in records["coco"]]
        assert masks
        assert [record["segmentation"] for record in records["rows"]] == [mask.any(axis=1).sum() for mask in masks]
        areas = [int(line) for line in (written["sums"] / f"{stem}.sums").read_text().split()]
        assert sorted(areas) == sorted(mask.sum() for mask in masks)
        with np.load(written["npz"] / f"{stem}.npz") as arrays:
            assert sorted(arrays["masks"].sum(axis=(1, 2))) == sorted(areas)
        assert np.array(Image.open(written["labels"] / f"{stem}.png")).shape == IMAGE.shape[:2]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["auto", "--help"])
    assert "sums: areas" in " ".join(capsys.readouterr().out.split())


def test_results_of_another_format_are_not_taken_for_these(
    tiny: sam.Sam, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two formats of JSON have files of one name."""
    options = ["--points-per-side", "2", "--out", str(tmp_path / "out")]
    assert main(["auto", str(photograph), "--format", "coco", *options]) == 0
    assert main(["auto", str(photograph), "--format", "polygons", *options]) == 1
    assert "cat.json was made with other settings: format png or coco, now format polygons" in capsys.readouterr().err


def test_a_new_format_of_the_service_and_its_client(new_formats: None, running: Any) -> None:
    from sam.client import Client

    with Client(f"http://127.0.0.1:{running.port}") as client:
        image = client.embed(image_bytes())
        prompts = [sam.Prompt([(5, 6)], [1])]
        (expected,) = client.segment(image, prompts)
        assert [int(line) for line in client.segment_as("sums", image, prompts).split()] == [
            mask.sum() for mask in expected.masks
        ]
        (answered,) = json.loads(client.segment_as("rows", image, prompts))["prompts"]
        assert [record["segmentation"] for record in answered["masks"]] == [
            mask.any(axis=1).sum() for mask in expected.masks
        ]
        options = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
        areas = [record["area"] for record in client.automatic(image, **options)]
        assert areas
        assert [int(line) for line in client.automatic_as("sums", image, **options).split()] == sorted(areas)[::-1]
        with pytest.raises(ValueError, match=f"the format must be one of {', '.join(FORMATS)}, got 'x'"):
            client.segment_as("x", image, prompts)
    document = json.loads(running.request("GET", "/openapi.json")[2])
    for path in ("/v1/segment", "/v1/automatic"):
        post = document["paths"][path]["post"]
        assert "text/x-sums" in post["responses"]["200"]["content"]
        fields = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
        assert {"sums", "rows"} < set(fields["output"]["enum"])


@pytest.fixture
def running(new_formats: None) -> Iterator[Any]:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    pytest.importorskip("httptools", reason="needs the extra serve")
    from local_service import Local

    from sam.engine import Engine
    from sam.server import Settings

    local = Local(Engine(random_model(TINY)), Settings(max_output_pixels=10**6))
    yield local
    local.close()


def image_bytes() -> bytes:
    from serving import file_of

    return file_of(IMAGE)


def test_formats_that_need_pixels_are_within_the_limit_of_the_service() -> None:
    outputs = pytest.importorskip("sam.server.outputs", reason="needs the extra serve")
    record = {"segmentation": {"size": [2, 3], "counts": [1, 5]}, "area": 5, "stability_score": float("nan")}
    (answered,) = outputs.automatic_masks([record], FORMATS["rle"], (2, 3), 5, lambda: None)
    assert answered == {
        **record,
        "segmentation": {"size": [2, 3], "counts": "15"},
        "bbox": [0, 0, 3, 2],
        "stability_score": None,
    }
    for name in ("png", "polygons", "npz"):
        with pytest.raises(outputs.ApiError, match="output_too_large"):
            outputs.automatic_masks([record], FORMATS[name], (2, 3), 5, lambda: None)
        outputs.automatic_masks([record], FORMATS[name], (2, 3), 6, lambda: None)


def test_run_lengths_of_either_kind_give_the_same_file() -> None:
    masks = [{"size": [2, 3], "counts": counts} for counts in ([1, 5], [0, 2, 4], [6])]
    packed = [{**mask, "counts": rle.compress(mask["counts"])} for mask in masks]
    for form in FORMATS.values():
        assert form.encode(MaskSet(masks, (2, 3))) == form.encode(MaskSet(packed, (2, 3)))
    assert formats.find_format("npz") is FORMATS["npz"]
