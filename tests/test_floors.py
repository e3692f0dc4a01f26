"""Imports go one way: a module imports from its own room or from a lower floor, never up and never sideways."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# (floor, room) of each module, by the longest prefix of its name that stands here.
FLOORS = {
    "fastsam_kernels": (0, "kernels"),
    "sam.assets": (0, "assets"),
    "sam.checks": (0, "checks"),
    "sam.system": (1, "system"),
    "sam.config": (1, "config"),
    "sam.images": (2, "images"),
    "sam.prompts": (3, "prompts"),
    "sam.masks": (4, "masks"),
    "sam.embedding": (4, "embedding"),
    "sam.modeling.common": (5, "parts"),
    "sam.modeling.image_encoder": (5, "parts"),
    "sam.modeling.mask_decoder": (5, "parts"),
    "sam.modeling.prompt_encoder": (5, "parts"),
    "sam.modeling.transformer": (5, "parts"),
    "sam.modeling.weight_cache": (5, "parts"),
    "sam.utils": (5, "utils"),
    "sam.inference": (6, "inference"),
    "sam.modeling": (7, "model"),
    "sam.amg": (8, "amg"),
    "sam.checkpoint": (8, "checkpoint"),
    "sam.predictor": (8, "predictor"),
    "sam.sessions": (8, "sessions"),
    "sam.utils.onnx": (8, "onnx"),
    "sam.verify": (8, "verify"),
    "sam": (9, "front"),
    "sam.automatic_mask_generator": (9, "front"),
    "sam.build_sam": (9, "front"),
    "sam.drop_in": (9, "front"),
    "sam.engine": (10, "engine"),
    "sam.training": (10, "training"),
    "sam.client": (11, "client"),
    "sam.server": (11, "server"),
    "sam.__main__": (12, "cli"),
    "sam.cli": (12, "cli"),
    "sam.examples": (12, "examples"),
    "benchmarks": (12, "benchmarks"),
}
# What still goes the wrong way. Entries leave this list and none join it.
VIOLATIONS: set[tuple[str, str]] = set()


def modules() -> dict[str, Path]:
    result = {}
    for package in ("fastsam_kernels", "sam", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            result[name.removesuffix(".__init__")] = path
    return result


def place(name: str) -> tuple[int, str]:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        result = FLOORS.get(".".join(parts[:length]))
        if result is not None and (length > 1 or len(parts) == 1 or parts[0] != "sam"):
            return result
    raise AssertionError(f"{name} stands on no floor: give it one in tests/test_floors.py")


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that a module imports, inside functions and for type checking too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in known or base in known:
                    yield whole if whole in known else base


def wrong_ways(known: dict[str, Path]) -> set[tuple[str, str]]:
    result = set()
    for name, path in known.items():
        floor, room = place(name)
        for other in imports(name, path, known):
            other_floor, other_room = place(other)
            if other_floor > floor or (other_floor == floor and other_room != room):
                result.add((name, other))
    return result


def test_imports_go_down() -> None:
    result = wrong_ways(modules())
    assert result - VIOLATIONS == set(), "these imports go up or sideways"
    assert VIOLATIONS - result == set(), "these are gone: take them off the list"


def test_the_fence_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rle.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..engine import Engine\n"
        "def late():\n    import sam.server\n    from .. import predictor\n    from ..modeling import common\n"
        "from .upscale import upscale_masks\nimport numpy\n"
    )
    known = {**modules(), "sam.masks.rle": path}
    assert {other for name, other in wrong_ways(known) if name == "sam.masks.rle"} == {
        "sam.engine",
        "sam.server",
        "sam.predictor",
        "sam.modeling.common",
    }


def test_a_new_module_must_be_given_a_floor() -> None:
    with pytest.raises(AssertionError, match=r"sam\.surprise stands on no floor"):
        place("sam.surprise")
