"""``import sam``: of little beyond torch, on any machine, and without touching what is not needed."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sam

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


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "fastsam_kernels", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoTorch())
import sam
print(sorted(name for name in sys.modules if name.startswith("sam.")))
import numpy
from PIL import Image
from sam.client import Client
from sam.images import read_image
from sam.masks import formats, overlay, polygons, rle
from sam.prompts import wire

Image.new("RGB", (4, 3), (1, 2, 3)).save("image.png")
image = read_image("image.png")
assert image.shape == (3, 4, 3)
mask = rle.decode({"size": [3, 4], "counts": [3, 3, 6]})
assert rle.bounding_box({"size": [3, 4], "counts": "333"}) == [1, 0, 1, 3]
assert polygons.multipolygon(mask)["coordinates"]
prompt = sam.Prompt([(1, 1)], [1], box=(0, 0, 3, 2))
overlay.draw_overlay(image, mask[None], [prompt])
assert wire.to_dict(wire.from_dict({"box": [0, 0, 3, 2]}))["box"] == [0, 0, 3, 2]
masks = formats.MaskSet([{"size": [3, 4], "counts": [3, 3, 6]}], (3, 4))
assert all(form.encode(masks) for form in formats.FORMATS.values())
assert sam.VARIANTS["nano"] and isinstance(sam.VARIANTS["nano"], sam.SamConfig)
assert not Client("http://127.0.0.1:1").ready()
with sam.as_segment_anything():
    import importlib.util
    assert importlib.util.find_spec("segment_anything").origin == sam.__file__
try:
    sam.Sam
except ImportError as error:
    print(error)
"""


def test_parts_that_need_no_torch_import_where_there_is_none(tmp_path: Path) -> None:
    """Clients, images, run lengths, prompts, configs, and serving the official paths until something imports them."""
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "torch is blocked"]


def test_names_come_from_the_modules_that_type_checkers_are_told() -> None:
    (block,) = (
        node
        for node in ast.parse(Path(sam.__file__).read_text()).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    homes = {
        name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }  # of ``from . import predictor`` the module is None
    assert {name: module for name, module in homes.items() if module} == sam._HOMES
    assert {name for name, module in homes.items() if not module} <= sam._SUBMODULES
    assert sorted(homes) == sorted(sam.__all__)


def test_every_name_is_there_by_every_way_to_import() -> None:
    scope: dict[str, object] = {}
    exec("from sam import *", scope)
    for name in sam.__all__:
        assert scope[name] is getattr(sam, name)
        if name in sam._HOMES:
            assert scope[name] is getattr(importlib.import_module(f"sam.{sam._HOMES[name]}"), name)
    assert {*sam.__all__, *sam._SUBMODULES, "__version__"} <= set(dir(sam))
    for name in sam._SUBMODULES:
        assert getattr(sam, name) is sys.modules[f"sam.{name}"]
    with pytest.raises(AttributeError, match="module 'sam' has no attribute 'sam_model_registri'"):
        sam.sam_model_registri  # type: ignore[attr-defined]  # noqa: B018


ORDERS = """
import sys, torch

for first in ("import sam.build_sam", "from sam.build_sam import load_model", "import sam.predictor", "import sam"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam"]:
        del sys.modules[name]
    exec(first, {})
    import sam
    assert sam.utils.amg.MaskData and sam.modeling.image_encoder.Block and sam.predictor.SamPredictor
    from sam import build_sam
    assert build_sam is sam.build_sam is sys.modules["sam.build_sam"].build_sam, first
"""


def test_build_sam_is_the_function_whatever_is_imported_first() -> None:
    """As officially, where the package imports the function over the module of that name."""
    subprocess.run([sys.executable, "-c", ORDERS], check=True, timeout=300)
