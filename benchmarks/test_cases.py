"""The cases through pytest-benchmark: ``pytest benchmarks/``, with its options for saving and comparing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .case import Case
from .cases import GROUPS
from .runner import budget_of, form_errors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for cases in GROUPS.values() for case in cases], ids=lambda case: case.name)
@pytest.mark.parametrize("form", ["reference", "torch", "triton"])
def test_case(benchmark: Any, case: Case, form: str, dtype: torch.dtype) -> None:
    if not case.fits(DEVICE, dtype):
        pytest.skip(f"not for {DEVICE} in {dtype}")
    with torch.no_grad():
        problem = case.make(DEVICE, dtype)
        if form not in problem.forms:
            pytest.skip(f"no {form} form on {DEVICE}")
        errors = form_errors(problem, {name: problem.forms[name] for name in (problem.baseline, form)})
        assert errors[form] <= budget_of(problem, errors, dtype)

        def run() -> None:
            problem.forms[form]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{case.name}, {dtype}"
        benchmark(run)
