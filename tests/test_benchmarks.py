"""The benchmark runner and its tables: what they refuse, and that they measure what they say."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY_2, random_model
from PIL import Image

import benchmarks
from benchmarks import peers, plot, tables
from benchmarks.__main__ import main
from benchmarks.case import Case, Problem
from benchmarks.cases import GROUPS, jobs, select
from benchmarks.measure import Timing, Work, peak_memory, time_forms
from benchmarks.model import decoder_work, sam2_masks
from benchmarks.operations import OPERATIONS, rel_pos_attention
from benchmarks.provenance import ROOT, form_name, provenance, read_rows
from benchmarks.runner import Row, budget_of, form_errors, run_case, to_table
from sam.inference import low_rank_tokens

CPU = torch.device("cpu")


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


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
    result: list[int] = []

    def fail(device: torch.device, dtype: torch.dtype) -> Problem:
        result.append(len(json.loads(file.read_text())))
        raise RuntimeError("out of memory")

    monkeypatch.setitem(GROUPS, "kernels", [doubling(wrong=0.0), Case("failing", fail), right])
    assert runner.run("kernels", "", CPU, [torch.float32], 0.01, False, file) == 1
    assert result == [3]  # rows of the case before were there already
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
    positions = [next(place for place, name in enumerate(names) if name.startswith(text)) for text in named]
    assert positions == sorted(positions)
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
        {**row, "form": "reference", "timing": {"p50": 36.2}, "speedup": 1.0, "peak_bytes": 7},
        {**row, "form": "torch", "timing": {"p50": 3.4}, "speedup": None, "peak_bytes": None},
        {**row, "form": "torch, compiled", "timing": {"p50": 12.3}, "speedup": 2.94, "peak_bytes": 5},
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(rows))
    table = tables.speed_table(str(results))
    assert "| a case, float32, 2 cores | 40 |  | 36 | over budget | 12 (2.9x) | 2 / - |" in table


def test_sam2_stands_beside_meta_s_package(tmp_path: Path) -> None:
    """Speed-ups and memory are beside Meta's, whatever the baseline of the case, and fp32 comes first."""
    facts = {**provenance(), "gpu": None, "cores": 2}
    rows = [
        {"case": "a case", "dtype": dtype, "provenance": facts, "form": form, **rest}
        for dtype in ("bfloat16", "float32")
        for form, rest in {
            "sam2": {"timing": {"p50": 40.2}, "speedup": 2.2, "peak_bytes": 9_000_000},
            "reference": {"timing": {"p50": 90.0}, "speedup": 1.0, "peak_bytes": 7},
            "torch": {"timing": {"p50": 32.0}, "speedup": 2.8, "peak_bytes": 4_000_000},
        }.items()
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(rows))
    table = tables.speed_table(str(results), columns=tables.SAM2).splitlines()
    assert table[2:4] == [
        f"| a case, {dtype}, 2 cores | 40 |  | 90 | 32 (1.26x) | 9 / 4 |" for dtype in ("float32", "bfloat16")
    ]


@torch.no_grad()
def test_automatic_masks_are_held_by_what_the_decoder_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks are discs; what it would have said counts too."""
    problem = sam2_masks.automatic(random_model(TINY_2), 8, torch.float32, None)
    errors = form_errors(problem, problem.forms)
    assert errors["torch"] <= budget_of(problem, errors, torch.float32)
    make = low_rank_tokens._update
    monkeypatch.setattr(
        low_rank_tokens, "_update", lambda *parts: (made := make(*parts))._replace(squares=2 * made.squares)
    )
    assert form_errors(problem, {"torch": problem.forms["torch"]})["torch"] > 0.01


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
