"""``import sam``: of little beyond torch, on any machine, and without touching what is not needed."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys
import numpy, torch

def probe():
    before = set(sys.modules)
    import sam
    imported = set(sys.modules) - before
    model = sam.load_model(device="cpu")
    result = model.predict(model.encode(numpy.zeros((20, 30, 3), numpy.uint8)), [sam.Prompt([(3, 3)], [1])])
    return {
        "imported": sorted(imported),
        "used": sorted(set(sys.modules) - before),
        "cuda": torch.cuda.is_initialized(),
        "masks": list(result.masks.shape),
    }

facts = [probe()]
for name in [name for name in sys.modules if name.partition(".")[0] in ("sam", "fastsam_kernels", "triton")]:
    del sys.modules[name]
sys.modules["triton"] = None
facts.append(probe())
print(json.dumps(facts))
"""
# Beside torch and the standard library; PIL takes the last one where it is installed.
LIGHT = {"sam", "fastsam_kernels", "torch", "PIL", "safetensors", "defusedxml"}
# Each takes most of a second to import or more.
HEAVY = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.testing", "sympy", "triton"}


def test_import_adds_little_and_works_without_triton() -> None:
    """How long an import takes is decided by what it imports. One process: each starts with seconds of torch."""
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=300)
    usual, without_triton = json.loads(done.stdout)
    assert {name.partition(".")[0] for name in usual["imported"]} - set(sys.stdlib_module_names) <= LIGHT
    for facts in (usual, without_triton):
        assert not HEAVY & set(facts["used"])
        assert not facts["cuda"]
        assert facts["masks"] == [1, 3, 20, 30]
