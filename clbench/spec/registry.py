"""Find a benchmark, strategy, backbone or text encoding by name, through entry points.

Names and one-line summaries are read without importing the plugin: the
summary is the first line of the module's docstring, taken from its source text.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from clbench.errors import ClbenchError, SpecError, UnknownName, unknown_name
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import ordered_name, split_order
from clbench.spec.toml import load_benchmark, read_toml

GROUPS = {
    "benchmark": "clbench.benchmarks",
    "strategy": "clbench.strategies",
    "backbone": "clbench.backbones",
    "encoding": "clbench.encodings",
    "tracker": "clbench.trackers",
    "resolver": "clbench.resolvers",  # of strategies named as `module:Class` or `head+part`
}


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> metadata.EntryPoints:
    """A group's entry points of all packages on `path` (`sys.path`), read once: it takes 30 ms."""
    return metadata.entry_points(group=group)


def entries(kind: str) -> dict[str, metadata.EntryPoint]:
    """Name → entry point, sorted by name.

    Raises:
        ClbenchError: when two distributions claim one name for different objects.
    """
    registered: dict[str, metadata.EntryPoint] = {}
    for entry in _installed(GROUPS[kind], tuple(sys.path)):
        other = registered.get(entry.name)
        if other is not None and other.value != entry.value:
            raise ClbenchError(
                f"two packages register a {kind} called {entry.name!r}",
                where=f"entry points {GROUPS[kind]}",
                got=f"{_owner(other)}: {other.value}; {_owner(entry)}: {entry.value}",
                next_step="uninstall one of them",
            )
        registered[entry.name] = entry
    return dict(sorted(registered.items()))


def _owner(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def load(kind: str, name: str) -> Any:
    """Import the object registered as `name`.

    Raises:
        UnknownName: when nobody registered it.
        ClbenchError: when its package fails to import; names the distribution.
    """
    known = entries(kind)
    if name not in known:
        raise unknown_name(kind, name, known)
    try:
        return known[name].load()
    except ClbenchError:
        raise
    except Exception as err:
        raise ClbenchError(
            f"the {kind} {name!r} cannot be loaded: {err}",
            where=f"{known[name].value} of {_owner(known[name])}",
            next_step="repair or uninstall that package",
        ) from err


def benchmark_path(name: str) -> Path:
    """The file of a registered benchmark; a path that ends in `.toml` is taken as it is.

    An order of the steps behind either (`body_ext.order3-1-2`) is passed over.
    """
    name, _ = split_order(name)
    if is_path(name):
        return Path(name).expanduser()
    known = entries("benchmark")
    if name not in known:
        raise unknown_name("benchmark", name, known)
    return Path(str(resources.files(known[name].value) / f"{name}.toml"))


def benchmark(name: str) -> Benchmark:
    """The benchmark registered as `name`, or read from a path that ends in `.toml`.

    Behind either may stand an order of its steps: `body_ext.order3-1-2`.

    Raises:
        SpecError: the file contradicts itself, or takes the name of a registered benchmark for
            another course: their results would lie in one folder; or an order that is no
            permutation of the steps.
    """
    name, order = split_order(name)
    course = load_benchmark(benchmark_path(name))
    if is_path(name) and course.name in entries("benchmark"):
        own = load_benchmark(benchmark_path(course.name))
        if (course.digest(), course.version) != (own.digest(), own.version):
            raise SpecError(
                f"the benchmark name {course.name!r} is taken",
                where=name,
                expected="a name of its own for a course of your own",
                next_step="change `name` in the file",
            )
    return course.in_order(order) if order else course


def in_order(bench: str, order: Sequence[int]) -> str:
    """The name under which a course with its steps in another order is asked for.

    Args:
        bench: name, or path of a course file.
        order: 1-based numbers of its steps.

    Raises:
        SpecError: no permutation of the steps.
    """
    base, named = split_order(bench)
    if named and list(named) != list(order):
        raise SpecError(
            "two orders of the steps are given",
            where=f"{bench}, --order {','.join(map(str, order))}",
            expected="one of them",
            got=f"{'-'.join(map(str, named))} in the name of the course",
            next_step=f"name the course {base}, or leave --order out",
        )
    benchmark(base).in_order(order)
    return ordered_name(base, order)


_FILES: dict[str, str] = {}


def name_of(bench: str) -> str:
    """The name under which results of a benchmark lie: its own, also where a file is named.

    Raises:
        SpecError: the file is not there, or no benchmark.
    """
    if not is_path(bench):
        return bench
    if not benchmark_path(bench).exists():
        raise SpecError(
            "there is no such course file",
            where=bench,
            next_step="if it was moved, give the course's name instead: its runs keep a copy",
        )
    name = benchmark(bench).name
    _FILES[name] = bench
    return name


def as_typed(name: str) -> str:
    """How the command line named a benchmark: by its file where it was given one."""
    return _FILES.get(name, name)


def is_path(name: str) -> bool:
    """Whether a benchmark is named by its file."""
    return split_order(name)[0].endswith(".toml") or "/" in name


def summary(kind: str, name: str) -> str:
    """One line about a registered name, without importing its package."""
    if kind == "benchmark":
        return str(read_toml(benchmark_path(name)).get("title", ""))
    entry = entries(kind)[name]
    module, _, attribute = entry.value.partition(":")
    try:
        # find_spec imports the parent package only; built-in parents are empty.
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise UnknownName(f"module {module} not found")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, UnknownName, OSError, SyntaxError, ValueError) as err:
        return f"broken ({_owner(entry)}): {err}"
    for node in tree.body:
        named = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute
        if named and (text := ast.get_docstring(node)):  # type: ignore[arg-type]  # narrowed by `named`
            return text.splitlines()[0]
    text = ast.get_docstring(tree)
    return text.splitlines()[0] if text else ""
