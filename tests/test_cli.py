"""The command line, in this process and, once, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

import sam
from sam.cli import main


@pytest.fixture
def image_file(tmp_path: Path, photo: np.ndarray) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(photo).save(path)
    return path


def run_bad(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run, expect exit status 2 and one line on stderr, and return it."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "error: " in lines[0]
    return lines[0]


def test_segment(tmp_path: Path, image_file: Path, capsys: pytest.CaptureFixture[str], nano: sam.Sam) -> None:
    out = tmp_path / "results" / "deep"
    assert main(["segment", str(image_file), "--point", "170,115", "--point", "30,280,0", "--out", str(out)]) == 0
    assert "mask 2: predicted IoU" in capsys.readouterr().out
    document = json.loads((out / "cat.json").read_text())
    assert document["prompt"] == {"points": [[170.0, 115.0], [30.0, 280.0]], "labels": [1, 0], "box": None}
    assert document["model"]["variant"] == "nano"
    assert document["model"]["model_hash"] == nano.model_hash
    prompt = sam.Prompt([(170, 115), (30, 280)], [1, 0])
    expected = nano.predict(nano.encode(np.array(Image.open(image_file))), [prompt])
    assert len(document["masks"]) == 3
    for index, record in enumerate(document["masks"]):
        mask = expected.masks[0, index].numpy()
        np.testing.assert_array_equal(np.array(Image.open(out / record["file"])) > 0, mask)
        np.testing.assert_array_equal(coco.decode(record["segmentation"]).astype(bool), mask)
        assert record["area"] == mask.sum()
        assert record["predicted_iou"] == pytest.approx(float(expected.iou_predictions[0, index]), abs=1e-6)
        assert record["bbox"] == coco.toBbox(record["segmentation"]).tolist()
    overlay = Image.open(out / "cat_overlay.png")
    assert overlay.size == (451, 300)
    assert sorted(path.name for path in out.iterdir()) == [
        "cat.json", "cat_mask_0.png", "cat_mask_1.png", "cat_mask_2.png", "cat_overlay.png",
        "results.jsonl",
    ]  # fmt: skip


def test_segment_replaces_only_results_of_the_image(
    tmp_path: Path, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its prompt was; what others made, or nobody knows who, is refused, and stays but for --force."""
    out = tmp_path / "out"

    def segment(*arguments: object, click: str = "170,115") -> int:
        return main(["segment", "--point", click, "--image-size", "64", "--out", str(out), *map(str, arguments)])

    def results() -> list[str]:
        return sorted(path.name for path in out.iterdir())

    twin = tmp_path / "elsewhere.png"  # of the same bytes, but with results of its own
    twin.write_bytes(image_file.read_bytes())
    assert segment(image_file) == segment(twin, "--single") == 0
    (out / "cat_mask_3.png").write_text("somebody's")
    capsys.readouterr()
    assert segment(image_file, "--single", click="30,280") == 0
    assert "wrote to " + str(out) + ": cat_overlay.png, cat_mask_0.png, cat.json" in capsys.readouterr().out
    others = ["elsewhere.json", "elsewhere_mask_0.png", "elsewhere_overlay.png", "results.jsonl"]
    assert results() == ["cat.json", "cat_mask_0.png", "cat_mask_3.png", "cat_overlay.png", *others]
    assert json.loads((out / "cat.json").read_text())["prompt"]["points"] == [[30, 280]]

    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "cat.png"
    Image.new("RGB", (40, 30)).save(other)
    before = (out / "cat.json").read_text()
    same_options = ("segment", other, "--point", "1,2", "--image-size", "64", "--out", out)
    message = f"{out / 'cat_overlay.png'} was made from another file, cat.png; --force replaces it, another --out keeps"
    assert message in run_bad(capsys, *same_options)
    (out / "cat_overlay.png").unlink()
    (out / "cat_mask_1.png").write_text("somebody's")
    assert "cat_mask_0.png was made from another file" in run_bad(capsys, *same_options)
    (out / "results.jsonl").unlink()
    assert "cat_mask_0.png is not in results.jsonl" in run_bad(capsys, *same_options)
    assert (out / "cat.json").read_text() == before
    assert segment(other, "--single", "--force", click="1,2") == 0
    assert json.loads((out / "cat.json").read_text())["image"]["height"] == 30
    assert (out / "cat_mask_1.png").read_text() == (out / "cat_mask_3.png").read_text() == "somebody's"


def test_segment_and_auto_keep_each_others_results(
    tmp_path: Path, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, second in (("segment", "auto"), ("auto", "segment")):
        out = ("--image-size", "64", "--out", str(tmp_path / first))
        commands = {
            "segment": ["segment", str(image_file), "--point", "1,2", *out],
            "auto": ["auto", str(image_file), "--points-per-side", "1", "--overlay", *out],
        }
        assert main(commands[first]) == 0
        assert main(commands[second]) != 0
        if second == "auto":  # without an overlay it writes nothing of segment's names
            assert main([argument for argument in commands[second] if argument != "--overlay"]) == 0
        message = f"{tmp_path / first / 'cat_overlay.png'} was made by {first}; --force replaces it"
        assert message in capsys.readouterr().err
        assert main([*commands[second], "--force"]) == 0


def test_segment_by_box_with_one_mask(tmp_path: Path, image_file: Path) -> None:
    arguments = ["--box", "135,85,208,148", "--single", "--out", str(tmp_path), "--dtype", "bf16", "--device", "cpu"]
    assert main(["segment", str(image_file), *arguments]) == 0
    document = json.loads((tmp_path / "cat.json").read_text())
    assert len(document["masks"]) == 1
    assert document["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("form", [["--box", "-5,-.5,208,148"], ["--box=-5,-.5,208,148"]])
def test_values_may_begin_with_a_minus(tmp_path: Path, image_file: Path, form: list[str]) -> None:
    arguments = [*form, "--point", "-1e-1,10", "--image-size", "64", "--out", str(tmp_path)]
    assert main(["segment", str(image_file), *arguments]) == 0
    prompt = json.loads((tmp_path / "cat.json").read_text())["prompt"]
    assert prompt == {"points": [[-0.1, 10]], "labels": [1], "box": [-5, -0.5, 208, 148]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "x.png", "--point", "-inf,1"], "points must be finite, got -inf"),
        (["segment", "x.png", "--point", "-NaN,1"], "points must be finite, got nan"),
        (["segment", "x.png", "--point", "-1"], "'-1' is not X,Y or X,Y,LABEL"),
        (["segment", "x.png", "--point", "1,1", "--max-megapixels", "-1e-3"], "no such image: x.png"),
        (["auto", "x.png", "--crop-overlap-ratio", "-1e-3"], "no such image or folder: x.png"),
        (["segment", "-1,2.png", "--point", "1,1"], "no such image: -1,2.png"),
        (["serve", "--port", "-5"], "the port must be 0 to 65535, got -5"),
        (["serve", "--max-sessions", "-1"], "max_sessions must not be negative, got -1"),
        (["serve", "--cache-mb", "-3"], "embedding_cache_bytes must not be negative, got -3000000"),
        (["segment", "x.png", "--points", "-1,1"], "unrecognized arguments: --points"),
        (["segment", "x.png", "-p", "1"], "unrecognized arguments: -p"),
    ],
)
def test_a_minus_where_a_value_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in run_bad(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to segment: give --point X,Y or --box X0,Y0,X1,Y1"),
        (["--point", "1"], "'1' is not X,Y or X,Y,LABEL"),
        (["--point", "a,b"], "'a,b' is not X,Y or X,Y,LABEL"),
        (["--point", "1,2,3"], "the label in '1,2,3' must be 1 (object) or 0 (background)"),
        (["--point", "1,nan"], "points must be finite, got nan"),
        (["--box", "1,2,3"], "'1,2,3' is not X0,Y0,X1,Y1"),
        (["--box", "9,2,3,4"], "box must be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, got [9.0, 2.0, 3.0, 4.0]"),
        (["--point", "1,2", "--device", "cuda:99"], "torch cannot use device 'cuda:99' here: "),
        (["--point", "1,2", "--device", "abacus"], "torch cannot use device 'abacus' here: "),
        (["--point", "1,2", "--device", "meta"], "device 'meta' asked for, whose tensors have no values"),
        (["--point", "1,2", "--device", "mps"], "torch cannot use device 'mps' here: "),
        (["--point", "1,2", "--device", "hpu"], "torch cannot use device 'hpu' here: "),
        (["--point", "1,2", "--max-megapixels", "-1"], "max_megapixels must not be negative, got -1"),
        (["--point", "1,2", "--checkpoint", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--point", "1,2", "--variant", "vit_h"], "only nano is embedded; vit_h needs checkpoint="),
        (["--point", "1,2", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--point", "1,2", "--image-size", "100"], "image_size must be a positive multiple of patch_size=16, got 100"),
    ],
)
def test_segment_errors(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert message in run_bad(capsys, "segment", image_file, "--out", out, *arguments)
    assert not list(out.glob("*"))  # nothing half done


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["segment", "", "--point", "1,1"], "image file"),
        (["segment", "x.png", "--point", "1,1", "--checkpoint", ""], "it"),
        *(([command, ""], "it") for command in ("auto", "info", "verify")),
        *((["convert", *names], "it") for names in (("", "a.pth"), ("a.pth", ""))),
        *(
            ([*command, "--out", ""], "it")
            for command in (["auto", "x.png"], ["segment", "x.png", "--point", "1,1"], ["demo"])
        ),
        *((["verify", option, ""], "it") for option in ("--image", "--json")),
    ],
)
def test_an_empty_name_is_not_the_working_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{name} must name a file or folder, got an empty name" in run_bad(capsys, *arguments)
    assert not any(tmp_path.iterdir())


def test_names_with_a_minus(
    tmp_path: Path, image_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to give one is told where there is such a file."""
    monkeypatch.chdir(tmp_path)
    hint = "; a name that begins with a minus comes last, behind --: -- -a.png"
    click = ["--point", "1,1", "--image-size", "64"]
    assert hint not in run_bad(capsys, "segment", "-a.png", *click)
    (tmp_path / "-a.png").write_bytes(image_file.read_bytes())
    for command in (["segment", "-a.png", *click], ["auto", "-a.png"]):
        assert hint in run_bad(capsys, *command)
    assert main(["segment", *click, "--", "-a.png"]) == 0


def test_unreadable_images(tmp_path: Path, image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    click = ("--point", "1,2", "--out", tmp_path / "out")
    assert "no such image: " in run_bad(capsys, "segment", tmp_path / "none.png", *click)
    assert f"error: {tmp_path} is a folder, not an image" in run_bad(capsys, "segment", tmp_path, *click)
    (tmp_path / "text.png").write_text("not a picture")
    assert "text.png is not an image in a known format" in run_bad(capsys, "segment", tmp_path / "text.png", *click)
    (tmp_path / "cut.png").write_bytes(image_file.read_bytes()[:20000])
    assert "cut.png is a damaged image: " in run_bad(capsys, "segment", tmp_path / "cut.png", *click)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    assert "deep.png has 16 bits per channel; 8 are needed" in run_bad(capsys, "segment", tmp_path / "deep.png", *click)


def test_too_many_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over 50 MP is refused from the header, far over too; a flag lifts it."""
    click = ("--point", "1,2", "--out", tmp_path / "out")
    path = tmp_path / "large.png"
    Image.new("1", (9000, 6000)).save(path)
    message = run_bad(capsys, "segment", path, *click)
    assert "large.png has 54.0 megapixels (9000x6000), more than the limit of 50; raise max_megapixels" in message
    Image.new("1", (20000, 10000)).save(path)  # beyond PIL's own limit
    message = run_bad(capsys, "segment", path, *click)
    assert "large.png has 200.0 megapixels (20000x10000), more than the limit of 50; raise max_megapixels" in message
    Image.new("1", (1500, 1000)).save(path)
    message = run_bad(capsys, "segment", path, *click, "--max-megapixels", "1")
    assert "large.png has 1.5 megapixels (1500x1000), more than the limit of 1; raise max_megapixels" in message
    assert main(["segment", str(path), *map(str, click), "--max-megapixels", "0"]) == 0


def test_info(capsys: pytest.CaptureFixture[str], nano: sam.Sam, tmp_path: Path) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "nano" in text
    assert nano.model_hash in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 7_747_952
    assert facts["layout"] == "official"
    assert facts["dtype in file"] == "float16"
    assert "drawn scenes" in facts["trained_on"]
    sam.save_checkpoint(nano, tmp_path / "theirs", "transformers")
    assert main(["info", str(tmp_path / "theirs"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "transformers"
    assert facts["model hash (fp32)"] == nano.model_hash


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sam.build_sam import NANO_CHECKPOINT
    from sam.checkpoint import read_checkpoint

    theirs, back = tmp_path / "theirs", tmp_path / "back.safetensors"
    assert main(["convert", str(NANO_CHECKPOINT), str(theirs), "--layout", "transformers"]) == 0
    assert main(["convert", str(theirs), str(back)]) == 0
    original, returned = read_checkpoint(NANO_CHECKPOINT), read_checkpoint(back)
    assert original.config == returned.config
    assert original.state_dict.keys() == returned.state_dict.keys()
    for name, tensor in original.state_dict.items():
        assert tensor.dtype == returned.state_dict[name].dtype
        assert tensor.equal(returned.state_dict[name])
    capsys.readouterr()
    assert "back.safetensors exists; --force replaces it" in run_bad(capsys, "convert", theirs, back)
    assert main(["convert", str(theirs), str(back), "--force", "--dtype", "fp32"]) == 0
    assert str(next(iter(read_checkpoint(back).state_dict.values())).dtype) == "torch.float32"
    capsys.readouterr()
    assert "suffix must be" in run_bad(capsys, "convert", theirs, tmp_path / "a.onnx")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"fastsam {sam.__version__}\n")


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'paint'" in run_bad(capsys, "paint")
    assert "the following arguments are required: COMMAND" in run_bad(capsys)


def test_as_a_user_starts_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sam", "demo", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "six clicks in one call" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"coins.png", "coffee_click.png", "coffee_correction.png", "chelsea.png"}
