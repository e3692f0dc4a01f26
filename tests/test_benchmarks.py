"""The benchmark runner, tuning and tables: what they refuse, and that they measure what they say."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import peers, plot, tables, tune, tuning_plan
from benchmarks.__main__ import main
from benchmarks.case import Case, Problem, TuneProblem, candidates
from benchmarks.cases import GROUPS, jobs, select
from benchmarks.measure import Timing, Work, peak_memory, time_forms
from benchmarks.model import decoder_work
from benchmarks.operations import OPERATIONS, rel_pos_attention
from benchmarks.provenance import ROOT, form_name, provenance, read_rows
from benchmarks.runner import Row, run_case, to_table
from benchmarks.tuning_plan import Planned, Verdict, planned
from fastsam_kernels.cross_attention.shapes import TokenShape
from fastsam_kernels.triton.launch import Launch, Launches
from fastsam_kernels.triton.tiles import TILE_FOLDER, AnyShape, TileConfig

CPU = torch.device("cpu")


def doubling(wrong: float) -> Case:
    """Three forms of 2 x: one right, one with a relative error, one that returns NaN."""

    def make(device: torch.device, dtype: torch.dtype) -> Problem:
        x = torch.linspace(1, 2, 1000, dtype=dtype)
        forms = {
            "reference": lambda: x + x,
            "torch": lambda: 2 * x * (1 + wrong),
            "triton": lambda: torch.full_like(x, torch.nan),
        }
        rows = [0, 999]
        return Problem(forms, lambda: 2 * x[rows].double(), rows, Work(bytes=8e3, flops=0), compile=False)

    return Case("doubling", make)


def rows_of(case: Case) -> dict[str, Row]:
    return {row.form: row for row in run_case(case, CPU, torch.float32, 0.01, compiled=False)}


def test_no_speedup_on_red_numerics() -> None:
    rows = rows_of(doubling(wrong=0.01))
    assert rows["reference"].speedup == 1.0
    assert rows["torch"].speedup is None
    assert rows["torch"].error == pytest.approx(0.01, rel=1e-3)
    assert rows["triton"].speedup is None
    assert rows["triton"].error == float("inf")
    table = to_table(list(rows.values()))
    assert table.count("red numerics") == 2
    assert "OVER" in table


def test_a_right_form_has_one() -> None:
    row = rows_of(doubling(wrong=0.0))["torch"]
    assert row.speedup is not None
    assert row.speedup > 0
    assert 0 < row.timing.p20 <= row.timing.p50 <= row.timing.p80


def test_the_command_fails_on_red_numerics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import runner

    monkeypatch.setitem(GROUPS, "kernels", [doubling(wrong=0.01)])
    file = tmp_path / "rows" / "rows.json"
    assert runner.run("kernels", "", CPU, [torch.float32], 0.01, False, file) == 1
    rows = json.loads(file.read_text())
    assert [row["speedup"] is None for row in rows] == [False, True, True]
    for row in rows:
        facts = row["provenance"]
        assert facts["torch"] == torch.__version__
        assert facts["revision"]
        assert facts["cores"] >= 1
        assert facts["tf32"] is False
    assert runner.run("kernels", "no such case", CPU, [torch.float32], 0.01, False, None) == 2


def test_a_case_that_raises_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import runner

    file = tmp_path / "rows.json"
    right = Case("trebling", doubling(wrong=0.0).make)
    found: list[int] = []

    def fail(device: torch.device, dtype: torch.dtype) -> Problem:
        found.append(len(json.loads(file.read_text())))
        raise RuntimeError("out of memory")

    monkeypatch.setitem(GROUPS, "kernels", [doubling(wrong=0.0), Case("failing", fail), right])
    assert runner.run("kernels", "", CPU, [torch.float32], 0.01, False, file) == 1
    assert found == [3]  # rows of the case before were there already
    document = json.loads(file.read_text())
    assert [row["failure"] for row in document if row["case"] == "failing"] == ["RuntimeError: out of memory"]
    assert [row["case"] for row in read_rows(file)] == 3 * ["doubling"] + 3 * ["trebling"]
    assert "failing, float32: RuntimeError: out of memory" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_what_matters_most_is_measured_first() -> None:
    cuda = torch.device("cuda")
    order = [(case.name, dtype) for case, dtype in jobs(None, "", cuda, [torch.float32, torch.float16, torch.bfloat16])]
    assert len(order) == len(set(order))
    of_late = [case.late for case, _ in jobs(None, "", cuda, [torch.bfloat16])]
    assert of_late == sorted(of_late)
    names = [name for name, dtype in order if dtype == torch.bfloat16]
    named = ("mask head", "decoder, 64", "click", "64 points", "encoder, vit_b, 1", "encoder, vit_h", "start of")
    places = [next(place for place, name in enumerate(names) if name.startswith(text)) for text in named]
    assert places == sorted(places)
    last_bf16 = order.index(("encoder, vit_b, 8 images", torch.bfloat16))
    assert last_bf16 < order.index(("hypernetwork_masks, 1 prompts x 3 masks", torch.float32))
    assert order.index(("automatic masks, tail of 3072 masks, 1024x1024", torch.float32)) < order.index(
        ("hypernetwork_masks, 1 prompts x 3 masks", torch.float16)
    )


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``python -m benchmarks`` in this process, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return main()


def test_a_real_case_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = ("kernels", "--case", "hypernetwork_masks, 1 prompts", "--no-compile", "--device", "cpu")
    assert command(monkeypatch, *case, "--seconds", "0.1") == 0
    said = capsys.readouterr().out
    assert "hypernetwork_masks, 1 prompts x 3 masks" in said
    assert "red numerics" not in said


def test_nothing_is_compiled_that_is_not_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--no-compile`` goes by the names of forms."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *a, **b: compiled.append(function) or a[0])
    inputs = rel_pos_attention._inputs(rel_pos_attention.Size(1, 64, 4), 1, 0, CPU, torch.float32)
    forms = rel_pos_attention.baselines(inputs)
    assert set(forms) == {"SDPA, bias in memory", "FlexAttention, compiled"}
    for name, form in forms.items():
        form()
        assert bool(compiled) == ("compiled" in name), name


def test_a_peer_that_compiles_is_refused_without_compiling() -> None:
    with pytest.raises(ValueError, match="segment-anything-fast compiles its encoder: not with --no-compile"):
        peers.choose_peers("transformers,segment-anything-fast", compiled=False)


def test_unknown_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "model", "--peers", "fastsam") == 2
    known = "known: segment-anything, segment-anything-fast, transformers"
    assert f"unknown peer 'fastsam'; {known}" in capsys.readouterr().err
    assert command(monkeypatch, "model", "--peers", "segment-anything=/none") == 2
    assert "the peer segment-anything is to come from /none, which is no folder" in capsys.readouterr().err


def test_every_case_is_reachable_once() -> None:
    names = [case.name for cases in GROUPS.values() for case in cases]
    assert len(names) == len(set(names))
    for case in GROUPS["kernels"]:
        assert any(case.name.startswith(operation) for operation in OPERATIONS), case.name
    assert select("kernels", "1024 prompts x 3", CPU, torch.float32) == []  # for a GPU
    several = select("model", "mask head|click, 1 point", CPU, torch.float32)
    assert {case.name for case in several} == {"mask head, 64 prompts", "click, 1 point to 1024 x 1024 masks"}


def test_forms_take_turns() -> None:
    order: list[str] = []
    timings = time_forms({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 0.0)  # type: ignore[misc]
    assert order == ["a", "b"] * 5
    assert all(isinstance(timing, Timing) and timing.runs == 5 for timing in timings.values())


def test_peak_memory_sees_what_is_touched() -> None:
    megabytes = 200

    def allocate() -> None:
        torch.ones(megabytes * 2**18).sum()

    peak = peak_memory(allocate, CPU)
    assert 0.8 * megabytes * 2**20 < peak < 1.5 * megabytes * 2**20


def test_peak_memory_is_the_same_again() -> None:
    """What an earlier run left with the allocator hides nothing."""

    def allocate() -> None:
        sum(torch.ones(2**18).sum() for _ in range(8))

    allocate()
    first, second = (peak_memory(allocate, CPU) for _ in range(2))
    assert first > 2**19
    assert second > 2**19


def test_the_decoder_s_work_is_within_its_limits() -> None:
    """Of 1024 prompts: what fusing the passes is for."""
    moved, flops = decoder_work.totals(decoder_work.passes(1024))
    assert moved <= 12e9
    assert flops <= 2.1e12


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
    monkeypatch.setattr(tuning_plan, "lookup", lambda *wanted: committed)
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
    asked = [about.operation for about in planned(["preprocess_image", "two_way_attention"])]
    assert list(dict.fromkeys(asked)) == ["preprocess_image", "two_way_attention"]
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
    monkeypatch.setattr(tuning_plan, "lookup", lambda *wanted: TileConfig({"FACTOR": 3}, 4, 1))
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


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_show_what_the_results_say(name: str) -> None:
    """``python -m benchmarks tables --write`` puts it right."""
    path, make = tables.TABLES[name]
    page = (ROOT / path).read_text()
    assert tables.fill(page, name, make()) == page


def test_no_time_stands_without_a_right_result(tmp_path: Path) -> None:
    row = {"case": "a case", "dtype": "float32", "provenance": {**provenance(), "gpu": None, "cores": 2}}
    rows = [
        {**row, "form": "segment-anything", "timing": {"p50": 40.2}, "speedup": 0.9, "peak_bytes": 2_000_000},
        {**row, "form": "torch", "timing": {"p50": 3.4}, "speedup": None, "peak_bytes": None},
        {**row, "form": "torch, compiled", "timing": {"p50": 12.3}, "speedup": 2.94, "peak_bytes": 5},
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(rows))
    table = tables.speed_table(str(results))
    assert "| a case, float32, 2 cores | 40 |  |  | over budget | 12 (2.9x) | 2 / - |" in table


def test_a_picture_of_results(tmp_path: Path) -> None:
    row = {"case": "a case", "dtype": "float32", "percent_of_limit": 50.0, "provenance": provenance()}
    rows = [
        {**row, "form": form, "timing": {"p50": time}, "speedup": speedup}
        for form, time, speedup in (("reference", 3000.0, 1.0), ("torch", 2.5, 1200.0), ("a peer", 40.0, None))
    ]
    plot.draw(rows, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000
    with pytest.raises(ValueError, match="no case was measured beside a peer; measure with --peers"):
        plot.draw(rows[:2], tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot"], "pip install 'fastsam-kernels[bench]'"),
        (["service", "--attacks"], "there is no fastapi: pip install 'fastsam-kernels[serve]'"),
        (["kernels", "--device", "cuda:99"], "torch cannot use device 'cuda:99' here: "),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A part of the machine or an extra; the service says it from its own process."""
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    (tmp_path / "fastapi.py").write_text("raise ImportError('there is no fastapi')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert main() == 2
    assert message in capsys.readouterr().err


def test_forms_have_names_that_say_whose_they_are() -> None:
    assert form_name("reference") == "official modules in this package"
    assert form_name("triton") == "ours, Triton forms"
    assert form_name("triton, CUDA graphs") == "ours, Triton forms, CUDA graphs"
    assert form_name("torch, compiled") == "ours, PyTorch forms, compiled"
    assert form_name("transformers") == "transformers"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has no marks <!-- status --> and <!-- /status -->"):
        tables.fill("# A page\n", "status", "")
