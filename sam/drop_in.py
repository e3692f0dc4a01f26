"""Serves the import paths of official packages from this one: ``sam.as_segment_anything``, ``as_sam2``, ``sam run``.

Nothing of this package is imported here and little else: every process of a program that ``sam run`` started reads this
file as it starts, whatever it goes on to do.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_ROOT = os.path.dirname(os.path.realpath(__file__))
_NAME = os.path.basename(_ROOT)  # sam
_BESIDE = "_fastsam"  # what this package is called in a process where the name ``sam`` is the program's own

# Of each official package what of ours serves it, below our own name, and every import path that it has below its own.
_SERVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "segment_anything": (
        "",  # the whole of it
        (
            "automatic_mask_generator",
            "build_sam",
            "modeling",
            "modeling.common",
            "modeling.image_encoder",
            "modeling.mask_decoder",
            "modeling.prompt_encoder",
            "modeling.sam",
            "modeling.transformer",
            "predictor",
            "utils",
            "utils.amg",
            "utils.onnx",
            "utils.transforms",
        ),
    ),
    "sam2": (
        ".sam2",
        (
            "_C",
            "automatic_mask_generator",
            "build_sam",
            "configs",
            "modeling",
            "modeling.backbones",
            "modeling.backbones.hieradet",
            "modeling.backbones.image_encoder",
            "modeling.backbones.utils",
            "modeling.memory_attention",
            "modeling.memory_encoder",
            "modeling.position_encoding",
            "modeling.sam",
            "modeling.sam.mask_decoder",
            "modeling.sam.prompt_encoder",
            "modeling.sam.transformer",
            "modeling.sam2_base",
            "modeling.sam2_utils",
            "sam2_image_predictor",
            "sam2_video_predictor",
            "sam2_video_predictor_legacy",
            "utils",
            "utils.amg",
            "utils.misc",
            "utils.transforms",
        ),
    ),
}


def as_segment_anything(*, replace_local: bool = False) -> Served:
    """Serve ``segment_anything`` and its modules from this package, from now on or for a ``with`` block.

    ``segment_anything.x.y`` is then the module ``sam.x.y`` itself, so classes are the same by either name and pickles
    of official paths load. The end of a ``with`` block leaves ``sys.modules`` as it was before. Processes that are
    spawned know nothing of it; ``python -m sam run`` does the same for a program and all of its processes.

    Args:
        replace_local: also in place of a ``segment_anything`` outside ``site-packages``, which may well be modified: a
            folder of the program's. By default that is left alone, with a ``RuntimeWarning`` that names it.

    Raises:
        ImportError: another ``segment_anything`` is imported already.
        ModuleNotFoundError: at an import of a path below ``segment_anything`` that the official package has not.
    """
    return _served("segment_anything", replace_local)


def as_sam2(*, replace_local: bool = False) -> Served:
    """Serve ``sam2`` and its modules from this package: :func:`as_segment_anything` for the official SAM 2.

    ``sam2.x.y`` is then the module ``sam.sam2.x.y`` itself. The files of configs stand in the package's folder, as
    officially.

    Args:
        replace_local: also in place of a ``sam2`` outside ``site-packages``, as a fork of it or a clone is.

    Raises:
        ImportError: another ``sam2`` is imported already.
        ModuleNotFoundError: at an import of a path below ``sam2`` that this package has not.
    """
    return _served("sam2", replace_local)


def _served(official: str, replace_local: bool) -> Served:
    package = __name__.rpartition(".")[0]
    return Served(official, lambda: package, replace_local)


class Served:
    """Finds an official package: its first import puts our modules at all of its paths."""

    def __init__(self, official: str, ours: Callable[[], str], replace_local: bool) -> None:
        """Begin to serve ``official``, until ``__exit__``; ``ours`` says what our package is called when asked for."""
        self._below, self._paths = _SERVED[official]
        self._folder = _ROOT + self._below.replace(".", os.sep)
        present = sys.modules.get(official)
        if present is not None and _folder_of(present) != self._folder:
            raise ImportError(
                f"{official} is imported already, from {_folder_of(present)}: serve it before anything imports it",
                name=official,
            )
        self._official = official
        self._ours = ours
        self._replace_local = replace_local
        self._before = self._modules()
        sys.meta_path.insert(0, self)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for name in self._modules():
            del sys.modules[name]
        sys.modules.update(self._before)

    def _modules(self) -> dict[str, ModuleType]:
        within = self._official + "."
        return {name: module for name, module in sys.modules.items() if (name + ".").startswith(within)}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the official package; of its modules, which are all there once it is, only what is missing is asked."""
        if name == self._official:
            if not self._replace_local and self._is_left_alone():
                return None
            file = os.path.join(self._folder, "__init__.py")
            spec = ModuleSpec(name, self, origin=file, is_package=True)  # type: ignore[arg-type]
            spec.submodule_search_locations = [self._folder]
            return spec
        package = sys.modules.get(self._official)
        if not name.startswith(self._official + ".") or package is None or _folder_of(package) != self._folder:
            return None
        if name in sys.modules:
            return sys.modules[name].__spec__
        raise ModuleNotFoundError(
            f"no module {name}: {self._official} is served by fastsam-kernels here, which has the official paths only",
            name=name,
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put ours into ``sys.modules``, from where importlib takes it; ``module`` itself is dropped.

        All official paths at once, so that a later import of one of them finds it there.
        """
        ours = self._ours() + self._below
        served = {self._official: importlib.import_module(ours)}
        for path in self._paths:
            served[f"{self._official}.{path}"] = importlib.import_module(f"{ours}.{path}")
        sys.modules.update(served)

    def _is_left_alone(self) -> bool:
        """Return whether sys.path has a package of the official name that nobody installed."""
        spec = PathFinder.find_spec(self._official)
        if spec is None or spec.origin is None:
            return False
        folder = os.path.dirname(spec.origin)
        if folder == self._folder or {"site-packages", "dist-packages"} & set(folder.split(os.sep)):
            return False
        warnings.warn(
            f"{self._official} in {folder} is a copy of the program's own and stays in use; "
            "replace_local=True, or sam run --replace-local, serves fastsam-kernels in its place",
            RuntimeWarning,
            stacklevel=3,
        )
        return True


def serve_program(replace_local: bool) -> None:
    """Serve all official packages in this process, which may have a ``sam`` of its own."""
    sys.meta_path.insert(0, _Beside())
    for official in _SERVED:
        Served(official, _our_name, replace_local)


class _Beside:
    """Finds ``sam``: the program's own where sys.path has one, else ours, which has another name then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _NAME:
            return _sam_of_the_program() or PathFinder.find_spec(name, [os.path.dirname(_ROOT)])
        if name == "fastsam_kernels":
            return PathFinder.find_spec(name, [os.path.dirname(_ROOT)])
        if name == _BESIDE:
            file = os.path.join(_ROOT, "__init__.py")
            spec = ModuleSpec(name, SourceFileLoader(name, file), origin=file, is_package=True)
            spec.has_location = True
            spec.submodule_search_locations = [_ROOT]
            return spec
        if name.startswith(_NAME + ".") and _is_this_package(sys.modules.get(_NAME)):
            self._explain(name, path)
        return None

    def _explain(self, name: str, path: Sequence[str] | None) -> None:
        """Raise where a module is missing in ours because the program means its own."""
        theirs = None if PathFinder.find_spec(name, path) else _sam_of_the_program()
        if theirs is not None:
            paths = [theirs.origin] if theirs.origin else list(theirs.submodule_search_locations or ())
            raise ModuleNotFoundError(
                f"no module {name}: {_NAME} is fastsam-kernels' here, as {paths[0]} came onto sys.path only after it "
                "was imported; put the folder that holds it on PYTHONPATH",
                name=name,
            )


def _sam_of_the_program() -> ModuleSpec | None:
    """Find the module or package ``sam`` that sys.path has beside ours; a folder without Python code is none."""
    entries = [entry for entry in sys.path if os.path.realpath(os.path.join(entry, _NAME)) != _ROOT]
    spec = PathFinder.find_spec(_NAME, entries)
    if spec is None or spec.origin is not None:
        return spec
    for folder in spec.submodule_search_locations or ():
        for entry in os.listdir(folder):
            if entry.endswith(".py") or os.path.isfile(os.path.join(folder, entry, "__init__.py")):
                return spec
    return None


def _our_name() -> str:
    """Return the name by which this package is imported in a program."""
    if _NAME in sys.modules:
        return _NAME if _is_this_package(sys.modules[_NAME]) else _BESIDE
    return _NAME if _sam_of_the_program() is None else _BESIDE


def _is_this_package(module: ModuleType | None) -> bool:
    return module is not None and _folder_of(module) == _ROOT


def _folder_of(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return os.path.dirname(os.path.realpath(file)) if file else "an unknown place"
