"""A whole process, from start to end: one image embedded and one click answered by the embedded model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sam
from sam import Prompt

from .. import first_mask
from ..case import Case, Problem
from ..measure import DTYPES, Form, Work
from ..provenance import ROOT

_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def _first_mask(device: torch.device, dtype: torch.dtype) -> Problem:
    """Measure with nothing compiled, in empty folders, and with what an earlier process left there."""
    folder = tempfile.TemporaryDirectory(prefix="first-mask-")
    name = next(name for name, known in DTYPES.items() if known is dtype)

    def process(kernels: str, compiled: bool, cached: bool) -> Form:
        def form() -> Tensor:
            place = Path(folder.name) / f"{kernels}-{compiled}-{cached}"  # which lives as long as the forms
            if not cached:
                shutil.rmtree(place, ignore_errors=True)
            place.mkdir(exist_ok=True)
            caches = {variable: str(place / variable) for variable in _CACHES}
            out = place / "logits.npy"
            command = [sys.executable, "-m", "benchmarks.first_mask", str(out), "--device", str(device)]
            command += ["--dtype", name, "--kernels", kernels, *(["--compile"] if compiled else [])]
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **caches}, capture_output=True)
            return torch.from_numpy(np.load(out))[None]

        return form

    def truth() -> Tensor:
        model = sam.load_model(device="cpu", dtype=torch.float64, kernels="torch")
        prompt = Prompt([first_mask.CLICK], [1])
        return model.predict(model.encode(first_mask.image()), [prompt]).low_res_logits

    fastest = "triton" if device.type == "cuda" else "torch"
    forms = {"reference": process("reference", False, True), "torch": process("torch", False, True)}
    if device.type == "cuda":
        forms["triton, nothing cached"] = process("triton", False, False)
        forms["triton"] = process("triton", False, True)
    forms[f"{fastest}, compiled, nothing cached"] = process(fastest, True, False)
    forms[f"{fastest}, compiled"] = process(fastest, True, True)
    return Problem(forms, truth, [0], Work(0, 0), compile=False, here=False)


CASES = [Case("start of a process to its first mask, nano", _first_mask, runs=3, late=True)]
