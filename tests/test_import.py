"""``import sam``: quick, on any machine, and without touching what is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PROBE = """
import json, sys, time
start = time.perf_counter(); import torch; torch_seconds = time.perf_counter() - start
if {block_triton}:
    sys.modules["triton"] = None
start = time.perf_counter(); import sam; sam_seconds = time.perf_counter() - start
model = sam.load_model(device="cpu")
import numpy as np
result = model.predict(model.encode(np.zeros((20, 30, 3), np.uint8)), [sam.Prompt([(3, 3)], [1])])
print(json.dumps({{
    "sam_seconds": sam_seconds,
    "cuda": torch.cuda.is_initialized(),
    "triton": sys.modules.get("triton") is not None,
    "masks": list(result.masks.shape),
    "transformers": "transformers" in sys.modules or "skimage" in sys.modules or "scipy" in sys.modules,
}}))
"""


def probe(block_triton: bool) -> dict[str, Any]:
    code = PROBE.format(block_triton=block_triton)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


def test_import_adds_less_than_a_second_and_touches_nothing() -> None:
    facts = min((probe(block_triton=False) for _ in range(2)), key=lambda facts: facts["sam_seconds"])
    assert facts["sam_seconds"] < 1
    assert not facts["cuda"]
    assert not facts["triton"]
    assert not facts["transformers"]


def test_works_without_triton() -> None:
    assert probe(block_triton=True)["masks"] == [1, 3, 20, 30]
