"""``sam.as_segment_anything``: the official import paths, as modules of this package."""

from __future__ import annotations

import copyreg
import importlib
import importlib.util
import io
import json
import pickle
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_image

import sam
from sam import Sam, SamPredictor, drop_in

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "programs" / "official_names.json").read_text())


def official_modules() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "segment_anything"}


@pytest.fixture(autouse=True)
def nothing_is_left() -> object:
    finders = list(sys.meta_path)
    assert not official_modules()
    yield
    assert sys.meta_path == finders
    assert not official_modules()


def package(folder: Path, name: str, code: str = "") -> Path:
    """A package of that name in ``folder``."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder / name


def test_every_official_path_is_our_module() -> None:
    specs = {name: module.__spec__ for name, module in sys.modules.items() if name.partition(".")[0] == "sam"}
    loaders = {name: sys.modules[name].__loader__ for name in specs}
    with sam.as_segment_anything():
        for path, names in NAMES.items():
            module, ours = importlib.import_module(path), "sam" + path.removeprefix("segment_anything")
            assert module is importlib.import_module(ours)
            assert module.__name__ == ours
            assert [name for name in names if not hasattr(module, name)] == []
        assert set(official_modules()) == set(NAMES)
    assert {name: sys.modules[name].__spec__ for name in specs} == specs
    assert {name: sys.modules[name].__loader__ for name in specs} == loaders


def test_ways_to_import() -> None:
    scope: dict[str, object] = {}
    with sam.as_segment_anything():
        exec("import segment_anything.modeling.image_encoder as x; from segment_anything.utils.amg import *", scope)
        exec("from segment_anything import build_sam, utils; import segment_anything.build_sam", scope)
        reloaded = importlib.reload(sys.modules["segment_anything.utils"])
    assert scope["x"] is sam.modeling.image_encoder
    assert scope["MaskData"] is sam.utils.amg.MaskData
    assert scope["utils"] is reloaded is sam.utils
    assert scope["build_sam"] is sam.build_sam  # the function, which an import of the module leaves in place
    assert callable(sam.build_sam)


def test_found_without_an_import() -> None:
    with sam.as_segment_anything():
        spec = importlib.util.find_spec("segment_anything")
        assert spec is not None
        assert spec.origin == sam.__file__
        assert spec.submodule_search_locations == list(sam.__path__)
        assert not official_modules()
        for _ in range(2):  # the first imports its package
            inner = importlib.util.find_spec("segment_anything.modeling.sam")
            assert inner is not None
            assert inner.origin == sam.modeling.sam.__file__


def test_pickles_of_official_paths() -> None:
    pickled = b"csegment_anything.modeling.sam\nSam\n."
    with sam.as_segment_anything():
        assert pickle.loads(pickled) is sam.Sam
        assert b"sam.modeling.sam" in pickle.dumps(sam.Sam)


class OfficialPickler(pickle._Pickler):
    """Pickles modules as the official package does: by its paths, with nothing that only ours have."""

    ours = ("_packed", "_snapshot", "generation", "config", "runtime", "_kernels")

    def reducer_override(self, module: object) -> object:
        if not isinstance(module, torch.nn.Module):
            return NotImplemented
        state = {name: value for name, value in module.__dict__.items() if name not in self.ours}
        return copyreg.__newobj__, (type(module),), state  # type: ignore[attr-defined]


def test_a_whole_model_that_the_official_package_pickled(tiny: Sam) -> None:
    file, image = io.BytesIO(), random_image(70, 111)
    OfficialPickler(file, protocol=2).dump(tiny)
    pickled = file.getvalue().replace(b"csam.modeling.", b"csegment_anything.modeling.")
    assert pickled.count(b"csegment_anything.modeling.") > 5
    assert b"csam." not in pickled
    assert b"_snapshot" not in pickled
    with sam.as_segment_anything():
        model = pickle.loads(pickled)
    answers = []
    for each in (model, tiny, pickle.loads(pickle.dumps(model))):
        predictor = SamPredictor(each)
        predictor.set_image(image)
        answers.append(predictor.predict(np.array([[40, 30]]), np.array([1]), return_logits=True)[0])
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[2], answers[1])
    assert (model.kernels, model.config, model.runtime) == ("auto", None, None)


def test_a_call_serves_from_then_on_and_nests() -> None:
    served = sam.as_segment_anything()
    outer = importlib.import_module("segment_anything.predictor")
    with sam.as_segment_anything():
        assert importlib.import_module("segment_anything.predictor") is outer
    assert sys.modules["segment_anything.predictor"] is outer is sam.predictor
    served.__exit__()
    assert not official_modules()


@pytest.mark.parametrize("path", ["segment_anything.engine", "segment_anything.build_sam3D"])
def test_paths_that_are_not_official(path: str) -> None:
    """Neither what only we have nor what a fork has."""
    with (
        sam.as_segment_anything(),
        pytest.raises(ModuleNotFoundError, match=f"no module {path}: segment_anything is served by") as raised,
    ):
        importlib.import_module(path)
    assert raised.value.name == path


def test_refused_where_another_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "site-packages", "segment_anything")
    monkeypatch.syspath_prepend(folder.parent)
    module = importlib.import_module("segment_anything")
    with pytest.raises(ImportError, match=f"segment_anything is imported already, from {folder}: serve it before"):
        sam.as_segment_anything()
    assert sys.modules.pop("segment_anything") is module


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("replace_local", [False, True])
def test_a_copy_of_the_programs_own_stays_unless_told(
    installed: bool, replace_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is installed is what we are there to replace."""
    folder = package(tmp_path / ("site-packages" if installed else "program"), "segment_anything", "MODIFIED = True")
    package(folder, "utils")
    monkeypatch.syspath_prepend(folder.parent)
    with warnings.catch_warnings(record=True) as said, sam.as_segment_anything(replace_local=replace_local):
        warnings.simplefilter("always")
        result = importlib.import_module("segment_anything")
        assert importlib.import_module("segment_anything.utils").__name__.endswith("utils")
    if installed or replace_local:
        assert result is sam
        assert not said
    else:
        assert result.MODIFIED
        (warning,) = said
        assert f"segment_anything in {folder} is a copy of the program's own and stays in use" in str(warning.message)
        assert warning.category is RuntimeWarning


def test_folders_that_hold_no_package_are_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is called like its package, or weights."""
    (tmp_path / "segment_anything").mkdir()
    (tmp_path / "segment_anything" / "sam_vit_b.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(), sam.as_segment_anything():
        warnings.simplefilter("error")
        assert importlib.import_module("segment_anything") is sam


def test_another_official_package_is_an_entry_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drop_in._SERVED, "official_tools", (".utils", ("amg", "transforms")))
    with drop_in.Served("official_tools", lambda: "sam", replace_local=False):
        assert importlib.util.find_spec("official_tools").origin == sam.utils.__file__  # type: ignore[union-attr]
        assert importlib.import_module("official_tools.amg") is sam.utils.amg
        assert importlib.import_module("official_tools") is sam.utils
        with pytest.raises(ModuleNotFoundError, match=r"no module official_tools.onnx: official_tools is served by"):
            importlib.import_module("official_tools.onnx")
    assert not [name for name in sys.modules if name.startswith("official_tools")]


def test_the_programs_sam_that_came_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sam run`` serves ours under another name where a program has its own, if it is there at the first import."""
    finder = drop_in._Beside()
    assert finder.find_spec("sam.tool", sam.__path__) is None
    folder = package(tmp_path, "sam")
    package(folder, "tool")
    monkeypatch.syspath_prepend(tmp_path)
    message = f"no module sam.tool: sam is fastsam-kernels' here, as {folder}.* came onto sys.path only after"
    with pytest.raises(ModuleNotFoundError, match=message):
        finder.find_spec("sam.tool", sam.__path__)
    assert finder.find_spec("sam.engine", sam.__path__) is None  # that is there, and none of our business


@pytest.mark.parametrize(("content", "theirs"), [("__init__.py", True), ("tool.py", True), ("vit_b.pth", False)])
def test_what_counts_as_the_programs_sam(
    content: str, theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / content).touch()
    monkeypatch.syspath_prepend(tmp_path)
    spec = drop_in._Beside().find_spec("sam")
    assert spec is not None
    assert list(spec.submodule_search_locations or ()) == [str(tmp_path / "sam") if theirs else sam.__path__[0]]
