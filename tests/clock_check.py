"""Finds tests that the speed of the machine decides: comparisons of what a clock, or a count of cores, was read as."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# By the last part of their names: what they return depends on when and where a test runs.
READINGS = {
    "time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime", "times",
    "time_ns", "monotonic_ns", "perf_counter_ns", "process_time_ns", "thread_time_ns",
    "default_timer", "timeit", "now", "utcnow", "today",
    "cpu_count", "process_cpu_count", "sched_getaffinity", "getloadavg", "get_capabilities", "get_cpu_capability",
}  # fmt: skip
MODULES = {
    "time", "timeit", "os", "datetime", "datetime.datetime", "date", "multiprocessing", "torch.cpu",
    "torch.backends.cpu", "loop",
}  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_ADD = ("append", "appendleft", "extend", "add", "update", "insert", "put")


def decided_by_a_clock(source: str) -> list[int]:
    """Return the lines of ``source`` that compare a reading, or assert on one, and those of scripts that take one."""
    tree = ast.parse(source)
    names = _names_of_readings(tree)
    scripts = set(_scripts_with_readings(tree))
    if not _reads(tree, names, set()):
        return sorted(scripts)
    returning: set[str] = set()
    inner: list[ast.AST] = [node for node in tree.body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))]
    outer = ast.Module([node for node in tree.body if node not in inner], [])
    scopes = [outer, *inner]
    while True:  # what a function returns may taint one before it
        everywhere = _tainted(outer, names | returning)
        tainted = {scope: everywhere | _tainted(scope, names | returning) for scope in scopes}
        result = {
            function.name
            for scope in scopes
            for function in ast.walk(scope)
            if isinstance(function, _FUNCTIONS)
            for node in ast.walk(function)
            if isinstance(node, ast.Return) and node.value and _reads(node.value, names | returning, tainted[scope])
        }
        if result <= returning:
            break
        returning |= result
    lines = {
        node.lineno
        for scope in scopes
        for node in ast.walk(scope)
        if _decides(node) and _reads(node, names | returning, tainted[scope])
    }
    return sorted(lines | scripts)


def _names_of_readings(tree: ast.AST) -> set[str]:
    """The calls, as they are written, that are readings in a module with these imports."""
    names = {f"{module}.{reading}" for module in MODULES for reading in READINGS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases = {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in MODULES}
            names |= {f"{alias}.{reading}" for alias in aliases for reading in READINGS}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names |= {alias.asname or alias.name for alias in node.names if alias.name in READINGS}
    return names


def _tainted(scope: ast.AST, calls: set[str]) -> set[str]:
    """Variables of a scope, with the functions inside it, that hold a reading or what was computed from one."""
    tainted: set[str] = set()
    while True:
        before = len(tainted)
        for node in ast.walk(scope):
            value, targets = _flow(node)
            if value is not None and _reads(value, calls, tainted):
                tainted |= {name for target in targets if (name := _base(target))}
        if len(tainted) == before:
            return tainted


def _flow(node: ast.AST) -> tuple[ast.AST | None, list[ast.AST]]:
    """What goes where: the value of an assignment, a loop or a call that adds to a container, and its targets."""
    if isinstance(node, ast.Assign):
        return node.value, [part for target in node.targets for part in getattr(target, "elts", [target])]
    if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
        return node.value, [node.target]
    if isinstance(node, ast.For | ast.comprehension):
        return node.iter, list(getattr(node.target, "elts", [node.target]))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ADD:
        return ast.Tuple(node.args, ast.Load()), [node.func.value]
    return None, []


def _base(target: ast.AST) -> str | None:
    """The variable at the root of ``a.b[c].d(...)``."""
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Call | ast.Starred):
        target = target.func if isinstance(target, ast.Call) else target.value
    return target.id if isinstance(target, ast.Name) and target.id != "self" else None


def _reads(node: ast.AST, calls: set[str], tainted: set[str]) -> bool:
    return any(
        (isinstance(part, ast.Call) and ast.unparse(part.func) in calls)
        or (isinstance(part, ast.Name) and part.id in tainted)
        for part in ast.walk(node)
    )


def _decides(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).rpartition(".")[2].startswith("assert")
    return isinstance(node, ast.Compare | ast.Assert)


def _scripts_with_readings(tree: ast.AST) -> Iterator[int]:
    """Programs in strings, for other processes, say nothing of what becomes of a reading."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            try:
                script = ast.parse(node.value)
            except SyntaxError:
                continue
            if _reads(script, _names_of_readings(script), set()):
                yield node.lineno
