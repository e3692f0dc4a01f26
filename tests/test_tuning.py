"""Tuning: which tiles are tried, which are refused, and what is written."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as commands
from benchmarks import tune, tuning_plan
from benchmarks.case import TuneProblem, candidates
from benchmarks.measure import Timing
from benchmarks.operations import OPERATIONS
from benchmarks.provenance import ROOT, provenance
from benchmarks.tuning_plan import Planned, Verdict, planned
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.triton.launch import Launch, Launches
from fastsam_kernels.triton.tiles import TILE_FOLDER, AnyShape, TileConfig

CPU = torch.device("cpu")


class Multiply:
    """Stands for a kernel: fills ``out`` with x times the tile's FACTOR, or fails as a compiler would."""

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def __getitem__(self, grid: tuple[int, ...]) -> Multiply:
        return self

    def __call__(self, x: Tensor, FACTOR: int, **options: Any) -> None:  # noqa: N803
        if FACTOR == 4:
            raise RuntimeError("out of resource: shared memory")
        self.out.copy_(FACTOR * x)


def multiplication() -> TuneProblem:
    x, out = torch.linspace(1, 2, 100), torch.empty(100)

    def launch(tile: TileConfig) -> Launch:
        return Launch(Multiply(out), (1,), {"x": x}, {}, tile)

    return TuneProblem(
        launch=launch,
        out=out,
        truth=lambda: 2 * x.double(),
        plain=lambda: 2 * x,
        rows=list(range(100)),
        candidates=candidates((4,), (1, 2), FACTOR=(2, 3, 4)),
    )


def test_tuning_takes_only_what_is_right() -> None:
    trials = tune.try_all(multiplication(), CPU, 0.01)
    assert len(trials) == 6
    right = [trial for trial in trials if trial.milliseconds is not None]
    assert [trial.tile.blocks["FACTOR"] for trial in right] == [2, 2]
    assert right == trials[:2]
    reasons = {trial.tile.blocks["FACTOR"]: trial.reason for trial in trials[2:]}
    assert reasons[3].startswith("error 5.0e-01 over")
    assert reasons[4] == "RuntimeError: out of resource: shared memory"


def doubling_operation(make: Callable[[torch.device, torch.dtype], TuneProblem]) -> dict[str, Any]:
    return {"doubling": SimpleNamespace(TUNING={"any": make})}


def test_what_the_compiler_complains_of_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(problem: TuneProblem, *about: Any) -> list[Verdict]:
        return [
            Verdict("8 bytes of stack" if tile.blocks["FACTOR"] == 4 else "", 1, 0.5) for tile in problem.candidates
        ]

    committed = TileConfig({"FACTOR": 5}, 4, 1, provenance="a file")
    monkeypatch.setattr(tuning_plan, "OPERATIONS", doubling_operation(lambda device, dtype: multiplication()))
    monkeypatch.setattr(tuning_plan, "lookup", lambda *key: committed)
    monkeypatch.setattr(tune, "arch_of", lambda device: 90)
    monkeypatch.setattr(tune, "compile_all", verdicts)
    monkeypatch.setattr(tune, "try_all", lambda problem, *rest: [tune.Trial(tile, 1.0) for tile in problem.candidates])
    device, about = torch.device("cuda"), Planned("doubling", "any")
    (*tried, first, second), again = tune.tune(about, device, torch.float32, 0.01, workers=1)
    assert [trial.tile.blocks["FACTOR"] for trial in tried] == [5, 2, 2, 3, 3]
    assert tried[0].tile == committed
    assert first.reason == second.reason == "8 bytes of stack"
    assert again == 0


def test_no_candidate_is_tried_twice() -> None:
    """Two tiles that a plan rounds to the same launch are one, and the committed one stands for both."""
    problem = multiplication()

    def rounded(tile: TileConfig) -> Launch:
        return Launch(Multiply(problem.out), (1,), {}, {}, replace(tile, blocks={"FACTOR": 2}))  # type: ignore[arg-type]

    tiles = candidates((4,), (1, 2), FACTOR=(2, 3))
    assert tuning_plan.distinct(replace(problem, launch=rounded), tiles) == tiles[:2]
    assert tuning_plan.distinct(problem, [*tiles, *tiles]) == tiles


def test_operations_are_tuned_in_the_order_of_their_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(None)
    assert list(dict.fromkeys(about.operation for about in plan)) == list(tuning_plan.ORDER)
    operations = [about.operation for about in planned(["preprocess_image", "two_way_attention"])]
    assert list(dict.fromkeys(operations)) == ["preprocess_image", "two_way_attention"]
    left_out = {operation for operation, module in OPERATIONS.items() if module.TUNING} - set(tuning_plan.ORDER)
    sources = "".join(path.read_text() for path in (ROOT / "sam").rglob("*.py"))
    for operation in left_out:
        assert f"    {operation}(" not in sources, f"{operation} is launched by the model and has no place in ORDER"
    with pytest.raises(ValueError, match="nothing to tune in 'nms'; known: hypernetwork_masks"):
        planned(["nms"])


def test_an_interrupted_run_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_plan, "OPERATIONS", {"doubling": SimpleNamespace(TUNING={"a": stop, "b": stop})})
    assert tune.run(["doubling"], CPU, [torch.bfloat16], 0.01, workers=1, write=True) == 1
    assert capsys.readouterr().out.endswith("interrupted; not tuned: doubling (a, bfloat16), doubling (b, bfloat16)\n")


def test_statistics_are_tuned_from_nothing() -> None:
    """Their launches join to what is there, so that each trial must begin without a pixel."""
    problem = OPERATIONS["mask_postprocess"].TUNING[AnyShape.ANY](CPU, torch.float32)
    trials = tune.try_all(replace(problem, candidates=problem.candidates[:2]), CPU, 0.0)
    assert [trial.reason for trial in trials] == ["", ""]
    assert problem.launch(problem.candidates[0]).constants["STATISTICS"]  # type: ignore[union-attr]


def test_the_fastest_few_are_timed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def times(forms: dict[str, Any], device: torch.device, seconds: float, runs: int) -> dict[str, Timing]:
        timed.append(len(forms))
        return {name: Timing(0.0, 100.0 - int(name), 0.0, runs) for name in forms}

    monkeypatch.setattr(tune, "time_forms", times)
    problem = replace(multiplication(), candidates=candidates((4,), tuple(range(20)), FACTOR=(2,)))
    trials = tune.try_all(problem, CPU, 0.01)
    assert timed == [20, tuning_plan.FINALISTS]
    assert len(trials) == 20
    assert {trial.tile.num_stages for trial in trials[: tuning_plan.FINALISTS]} == set(range(12, 20))


def test_a_shape_without_a_right_tile_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_wrong(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        return replace(multiplication(), candidates=candidates((4,), (1,), FACTOR=(3, 4)))

    def none(device: torch.device, dtype: torch.dtype) -> TuneProblem:
        raise RuntimeError("out of memory")

    shapes = {"none": none, "wrong": all_wrong, "right": lambda device, dtype: multiplication()}
    monkeypatch.setattr(tuning_plan, "OPERATIONS", {"doubling": SimpleNamespace(TUNING=shapes)})
    monkeypatch.setattr(tuning_plan, "lookup", lambda *key: TileConfig({"FACTOR": 3}, 4, 1))
    written: list[Any] = []
    monkeypatch.setattr(tune, "write_choice", lambda *choice: written.append(choice[:2]))
    assert tune.run(["doubling"], CPU, [torch.float32], 0.01, workers=1, write=True) == 1
    assert written == [("doubling", "right")]
    assert capsys.readouterr().out.endswith(
        "no candidate is right, nothing written: doubling, none, sm_80, float32: RuntimeError: out of memory\n"
        "no candidate is right, nothing written: doubling, wrong, sm_80, float32\n"
    )


@pytest.mark.parametrize("operation", ["image_to_token_attention", "two_way_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_candidate_sums_over_fewer_than_16_products(operation: str, dtype: torch.dtype) -> None:
    """Which no matrix product compiles with; a dot over tokens has those of a group of heads."""
    for make in OPERATIONS[operation].TUNING.values():
        problem = make(CPU, dtype)
        for tile in problem.candidates:
            planned = problem.launch(tile)
            launch = planned.launches[0] if isinstance(planned, Launches) else planned
            assert min(tile.blocks["BLOCK_N"], tile.blocks.get("ASKED_N", 16)) >= 16
            assert launch.constants["T_PADDED"] * launch.tile.blocks["HEADS"] >= 16, tile


def test_the_file_of_another_architecture_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU without a file of its own takes an older one's tiles; its choices are not for the older one."""
    arguments = Namespace(operation=None, dry_run=False, write=True, seconds=0.01, workers=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    monkeypatch.setattr(tune, "arch_of", lambda device: 100)
    ran: list[bool] = []
    monkeypatch.setattr(tune, "run", lambda *options: ran.append(True) or 0)
    assert commands._tune(arguments, torch.device("cuda"), [torch.bfloat16]) == 2
    assert capsys.readouterr().err == (
        "this GPU is sm_103 and takes the tiles of sm_100, which it must not write: it needs a file of its own first, "
        "tile_configs/sm_103.json, with its limits and no tiles\n"
    )
    assert not ran
    monkeypatch.setattr(tune, "arch_of", lambda device: 103)
    assert commands._tune(arguments, torch.device("cuda"), [torch.bfloat16]) == 0
    assert ran


def test_a_choice_replaces_exactly_one_combination(tmp_path: Path) -> None:
    """And the file stays what people read: rewriting what was read changes nothing."""
    source = TILE_FOLDER / "sm_90.json"
    assert tune.to_json(json.loads(source.read_text())) == source.read_text()
    shutil.copy(source, tmp_path)

    def chosen(document: dict[str, Any]) -> dict[tuple[str, str, str], dict]:
        table: dict[tuple[str, str, str], dict] = {}
        for entry in document["tiles"]:
            for dtype in entry["dtype"]:
                for shape in entry["shape"]:
                    table.setdefault((entry["operation"], dtype, shape), entry["tile"])
        return table

    before = chosen(json.loads(source.read_text()))
    best = tune.Trial(TileConfig({"BLOCK_N": 128, "HEADS": 4}, 8, 3), milliseconds=1.25)
    facts, shape = {**provenance(), "gpu": "NVIDIA H100"}, TokenShape.UP_TO_8
    tune.write_choice("token_to_image_attention", shape, 90, torch.bfloat16, best, facts, tmp_path)
    document = json.loads((tmp_path / "sm_90.json").read_text())
    after = chosen(document)
    replaced = ("token_to_image_attention", "bfloat16", "8 tokens")
    assert after.pop(replaced) == {"BLOCK_N": 128, "HEADS": 4, "num_warps": 8, "num_stages": 3}
    del before[replaced]
    assert after == before
    assert {key: value for key, value in document.items() if key != "tiles"} == {
        key: value for key, value in json.loads(source.read_text()).items() if key != "tiles"
    }
    assert document["tiles"][0]["provisional"] is False
    assert "1.25 ms" in document["tiles"][0]["provenance"]
    assert "NVIDIA H100" in document["tiles"][0]["provenance"]
