"""A pytest plugin: tests run as on a GPU, on tensors without memory, and launches are only compiled.

    PYTHONPATH=tests python -m pytest -p kernels.compile_launches --arch 90 tests/kernels tests/test_gpu.py

Tests are collected as with a GPU of that architecture and go through their bodies on the meta device, whose tensors
have shapes, strides and dtypes. What is asserted of values is not looked at; each launch is compiled for the
architecture and held against its limits. A launch that would fail fails its test; a test that cannot go on without
values is skipped, and the last lines say after how many launches.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

TESTS = Path(__file__).parents[1]
_MAX_GRID = (2**31 - 1, 65535, 65535)


class LaunchError(Exception):
    """A launch that a GPU would refuse."""


# Values -------------------------------------------------------------------------------------------------------


class AnyValue(TorchDispatchMode):
    """Tensors on the meta device whose values may be asked for: they are true, equal, and zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            if kwargs.get("generator") is not None and kwargs.get("device") == torch.device("meta"):
                kwargs["generator"] = None  # of the CPU: nothing is drawn
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.int64, device="meta")
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        if func is torch.ops.aten._to_copy.default:
            kwargs["device"] = torch.device("meta")  # values never come back
        if func is not torch.ops.aten.copy_.default or args[0].is_meta:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta") if x.ndim else x, (tuple(args), kwargs))
        return func(*args, **kwargs)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places where it is true: all."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.int64, device="meta") for _ in range(index.ndim)]


def _to_numpy(tensor: Tensor, *arguments: Any, **options: Any) -> np.ndarray:
    if tensor.is_meta:
        return np.zeros(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
    return _numpy(tensor, *arguments, **options)


def _to_list(tensor: Tensor) -> Any:
    return _to_numpy(tensor).tolist() if tensor.is_meta else _tolist(tensor)


_numpy, _tolist, _real_device = Tensor.numpy, Tensor.tolist, torch.device


class OnMeta(TorchFunctionMode):
    """What is asked of a GPU by its name happens on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def known(value: Any) -> Any:
            return torch.device("cuda") if isinstance(value, str) and value == "cuda" else value

        return func(*map(known, args), **{name: known(value) for name, value in (kwargs or {}).items()})


class _Devices(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _real_device)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        device = _real_device(*arguments, **options)
        return _real_device("meta") if device.type == "cuda" else device


class _Device(metaclass=_Devices):
    """In place of ``torch.device``: that of a GPU is the meta device."""


class _Tried(ast.NodeTransformer):
    """Evaluates what is asserted, for the launches in it, and goes on whatever comes out."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        failed = ast.ExceptHandler(ast.Name("AssertionError", ast.Load()), None, [ast.Pass()])
        return ast.Try([ast.Expr(node.test)], [failed], [], [])


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _Tried().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    """Loads what stands under ``tests`` without its assertions."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None and TESTS in Path(spec.origin).parents:
            spec.loader = _Loader(name, spec.origin)
            return spec
        return None


# Launches -----------------------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """The device that is not here, and what was launched on it."""

    arch: int = 0
    launches: int = 0

    def __post_init__(self) -> None:
        self.compiled: dict[str, str] = {}
        self.cut_short: dict[str, str] = {}

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """Compile a launch for the device and hold it against its limits."""
        from fastsam_kernels.triton.tiles import architectures

        self.launches += 1
        if not all(1 <= size <= most for size, most in zip(grid, _MAX_GRID, strict=False)):
            raise LaunchError(f"grid {grid}, of which each must be from 1 to {_MAX_GRID[: len(grid)]}")
        try:
            compiled = kernel.warmup(
                *map(_Pointer.of, arguments),
                grid=grid,
                **{name: _Pointer.of(value) for name, value in options.items()},
            )
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise LaunchError(f"{kernel.__name__}: {type(error).__name__}: {reason}") from error
        shared, limit = compiled.metadata.shared, architectures()[self.arch].shared_memory
        if shared > limit:
            raise LaunchError(f"{kernel.__name__}: {shared} bytes of shared memory, over {limit}")
        self.compiled[compiled.hash] = kernel.__name__


@dataclass(frozen=True)
class _Pointer:
    """All that compiling asks of a tensor: its dtype, and whether its address is a multiple of 16."""

    dtype: torch.dtype
    address: int

    @staticmethod
    def of(value: Any) -> Any:
        """A tensor's pointer; anything else is itself."""
        if not isinstance(value, Tensor):
            return value
        return _Pointer(value.dtype, value.storage_offset() * value.element_size())

    def data_ptr(self) -> int:
        return self.address


def _run_once(operation: Any, arguments: Sequence[Any], **options: Any) -> dict[str, str]:
    """In place of ``opcheck``, whose checks are of values."""
    operation(*arguments)
    return {}


class _Generator(torch.Generator):
    """One of the CPU, whatever the device: nothing is drawn."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


SIMULATION = Simulation()


def _stand_in_for_a_gpu() -> None:
    """The functions of ``torch.cuda`` that tests and dispatch ask, answered for the device that is not here."""
    from fastsam_kernels.triton.tiles import architectures

    def properties(device: Any = None) -> SimpleNamespace:
        limit = architectures()[SIMULATION.arch].shared_memory
        return SimpleNamespace(shared_memory_per_block_optin=limit, multi_processor_count=132)

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "none",
        "get_device_capability": lambda device=None: divmod(SIMULATION.arch, 10),
        "get_device_properties": properties,
        "mem_get_info": lambda device=None: (2**40, 2**40),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "device": lambda device: nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = _Generator  # type: ignore[misc]
    Tensor.numpy, Tensor.tolist = _to_numpy, _to_list  # type: ignore[method-assign, assignment]
    torch.device = _Device  # type: ignore[misc, assignment]
    torch.is_autocast_enabled = lambda *devices: False
    torch.autocast = lambda *arguments, **options: nullcontext()  # type: ignore[misc, assignment]
    torch.library.opcheck = _run_once  # type: ignore[assignment]
    np.testing.assert_array_equal = lambda *values, **options: None  # type: ignore[assignment]
    torch.testing.assert_close = lambda *values, **options: None  # type: ignore[assignment]


sys.meta_path.insert(0, _Finder())
_stand_in_for_a_gpu()


# pytest -------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", type=int, required=True, help="compute capability that launches are compiled for: 90")


def pytest_configure(config: pytest.Config) -> None:
    from triton.runtime import JITFunction

    from benchmarks.machine_code import pretend
    from fastsam_kernels.dispatch import device as devices

    SIMULATION.arch = config.getoption("--arch")
    config.option.assertmode = "plain"
    pretend(SIMULATION.arch)
    devices.triton_limitation = lambda device: None if device.type == "meta" else "it is no GPU"
    real = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup:
            return real(kernel, *arguments, grid=grid, warmup=True, **options)
        return SIMULATION.run(kernel, grid, arguments, options)

    JITFunction.run = run


def _as_plain_functions() -> None:
    """Registered operations have a form for fake tensors, which launches nothing: take the functions themselves."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("fastsam_kernels."):
            for name, value in list(vars(module).items()):
                if isinstance(value, CustomOpDef):
                    setattr(module, name, value._init_fn)


def pytest_collection_finish(session: pytest.Session) -> None:
    import pkgutil

    import fastsam_kernels

    for result in pkgutil.walk_packages(fastsam_kernels.__path__, "fastsam_kernels."):
        importlib.import_module(result.name)
    _as_plain_functions()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with AnyValue(), OnMeta():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = SIMULATION.launches
    try:
        return (yield)
    except (LaunchError, pytest.skip.Exception):
        raise
    except (Exception, pytest.fail.Exception) as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        SIMULATION.cut_short[item.nodeid] = f"after {SIMULATION.launches - before} launches: {reason}"
        import os
        import traceback

        if os.environ.get("TB"):
            traceback.print_exc(limit=-5)
        pytest.skip("cannot go on without values")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    kernels = Counter(SIMULATION.compiled.values())
    for test, reason in SIMULATION.cut_short.items():
        terminalreporter.write_line(f"cut short {reason[:150]}  {test}")
    terminalreporter.write_line(
        f"sm_{SIMULATION.arch}: {SIMULATION.launches} launches, {len(SIMULATION.compiled)} compilations: "
        + ", ".join(f"{name} {count}" for name, count in sorted(kernels.items()))
    )
