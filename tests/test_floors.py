"""Order of the code: imports go one way and in no circle, files and functions are short, ``sam/`` has a small top."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from functools import cache
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
    "sam.modeling.quantized_linear": (5, "parts"),
    "sam.modeling.sam2_mask_decoder": (5, "parts"),
    "sam.modeling.transformer": (5, "parts"),
    "sam.modeling.feature_pyramid": (5, "parts"),
    "sam.modeling.hiera": (5, "parts"),
    "sam.modeling.memory_attention": (5, "parts"),
    "sam.modeling.memory_choice": (5, "parts"),
    "sam.modeling.memory_encoder": (5, "parts"),
    "sam.modeling.position_encoding": (5, "parts"),
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
    "sam.verify_video": (9, "verify_video"),
    "sam.video": (8, "video"),
    "sam.sam2": (9, "front"),
    "sam.sam2.utils": (5, "utils"),
    "sam": (9, "front"),
    "sam.automatic_mask_generator": (9, "front"),
    "sam.build_sam": (9, "front"),
    "sam.drop_in": (9, "front"),
    "sam.text": (9, "text"),
    "sam.engine": (10, "engine"),
    "sam.fidelity": (10, "fidelity"),
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

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TOP_MODULES = 400, 66, 12
# Longer than that, and why. A name is a path, or a path and a function: "sam/cli/auto.py run".
LONG: dict[str, str] = {}


@cache
def parsed(path: Path) -> tuple[int, ast.Module]:
    """Return the number of lines of a file, and what Python reads in it."""
    text = path.read_text()
    return text.count("\n"), ast.parse(text)


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
    for node in ast.walk(parsed(path)[1]):
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


def long_code(root: Path) -> set[str]:
    """Return the files and functions that are too long; a ``kernel.py`` holds kernels, which are one function each."""
    result = set()
    for folder in ("sam", "fastsam_kernels", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            name, (lines, tree) = str(path.relative_to(root)), parsed(path)
            if lines > MAX_FILE_LINES:
                result.add(name)
            if path.name == "kernel.py":
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    assert node.end_lineno is not None
                    if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                        result.add(f"{name} {node.name}")
    return result


def circles(graph: Mapping[str, Set[str]]) -> set[str]:
    """Return the modules from which imports lead back to them."""
    result = set()
    for name in graph:
        reached, following = set(), list(graph[name])
        while following:
            if (other := following.pop()) not in reached:
                reached.add(other)
                following += graph[other]
        if name in reached:
            result.add(name)
    return result


def test_files_and_functions_are_short() -> None:
    result = long_code(ROOT)
    assert result - LONG.keys() == set(), "split these, or put them on the list with a reason"
    assert LONG.keys() - result == set(), "these are short now: take them off the list"


def test_the_measure_sees_long_files_and_functions(tmp_path: Path) -> None:
    (tmp_path / "sam").mkdir()
    body = "    pass\n"
    (tmp_path / "sam" / "short.py").write_text(f"def f():\n{body * (MAX_FUNCTION_LINES - 1)}")
    (tmp_path / "sam" / "long.py").write_text(f"class A:\n    async def f():\n{('    ' + body) * MAX_FUNCTION_LINES}")
    (tmp_path / "sam" / "kernel.py").write_text(f"def f():\n{body * MAX_FUNCTION_LINES}")
    (tmp_path / "sam" / "file.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert long_code(tmp_path) == {"sam/long.py f", "sam/file.py"}


def test_the_top_of_the_package_is_small() -> None:
    assert len(list((ROOT / "sam").glob("*.py"))) <= MAX_TOP_MODULES


# Words that no sentence about code begins with, and further ones that a sentence with its verb in front does not.
FRAGMENTS = {"What", "Whether", "Of", "Those", "How", "Who", "Whose", "That", "Where", "When", "By", "With", "Which"}
NO_VERBS = FRAGMENTS | {
    "A",
    "An",
    "The",
    "All",
    "Any",
    "Some",
    "True",
    "False",
    "None",
    "One",
    "As",
    "For",
    "From",
    "If",
}


def fragments(name: str, tree: ast.Module) -> set[str]:
    """Return the first lines of docstrings that are no sentences; those of functions begin with a verb."""
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            word = line.partition(" ")[0].rstrip(",:.")
            names_a_thing = isinstance(node, (ast.ClassDef, ast.Module))
            begins_well = word not in FRAGMENTS if names_a_thing else word.isalpha() and word not in NO_VERBS
            if line and not (begins_well and line.endswith(".")):
                result.add(f"{name}: {line}")
    return result


def test_docstrings_begin_with_sentences() -> None:
    result = set()
    for name, path in modules().items():
        if not name.startswith("benchmarks"):
            result |= fragments(name, parsed(path)[1])
    assert result == set(), "say what it does, beginning with the verb, as in 'Return ...'"


def test_fragments_are_seen() -> None:
    good = 'class A:\n    """The state of a part."""\n    def f():\n        """Return whether it is so."""\n'
    lines = {
        "Of the model.": '"""Of the model."""\n',
        "What is fused.": 'class A:\n    """What is fused."""\n',
        "[P, C] -> [C].": 'def f():\n    """[P, C] -> [C]."""\n',
        "A model of shapes.": 'async def f():\n    """A model of shapes."""\n',
        "Return the result": 'def f():\n    """Return the result"""\n',
        "``x`` as it is.": 'def f():\n    """``x`` as it is."""\n',
    }
    assert fragments("m", ast.parse(good)) == set()
    for line, text in lines.items():
        assert fragments("m", ast.parse(text)) == {f"m: {line}"}


def test_no_imports_go_in_a_circle() -> None:
    known = modules()
    graph = {name: {*imports(name, path, known)} - {name} for name, path in known.items()}
    assert circles(graph) == set(), "each of these is imported, at the end, by what it imports"


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
