"""What the modules of a strategy hold beside code: no checkpoint has it, and no new process."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NOT_ITS_OWN = {"clbench", "torch", "avalanche", *sys.stdlib_module_names}
"""Top-level packages whose modules are not the strategy's."""
SKIPPED = object()
"""Stands for what is not compared: modules, classes, objects of other packages."""


def own_modules(strategy: object) -> tuple[ModuleType, ...]:
    """The loaded modules in which the strategy's classes stand, with those of the same packages."""
    names = [k.__module__ for k in type(strategy).__mro__]
    own = {n for n in names if n.partition(".")[0] not in NOT_ITS_OWN}
    packages = tuple(f"{n.rpartition('.')[0]}." for n in own if "." in n)
    found = {n for n in list(sys.modules) if n in own or (packages and n.startswith(packages))}
    return tuple(m for n in sorted(found) if isinstance(m := sys.modules.get(n), ModuleType))


class ModuleState:
    """What globals, and attributes of classes and functions, of some modules hold at one moment.

    Compared are numbers, text, tensors, arrays, random generators, networks, lists, dicts and sets,
    and objects of classes of these modules that hold them.

    Args:
        modules: see `own_modules`.
    """

    def __init__(self, modules: tuple[ModuleType, ...]) -> None:
        self.modules = modules
        self._own = {module.__name__ for module in modules}
        self.values: dict[str, Any] = {}
        """module.name → the value itself."""
        self.contents: dict[str, Any] = {}
        """module.name → what it holds, in a form that compares with ==."""
        for name, value in self._globals():
            content = self._content(value, {})
            if content is not SKIPPED:
                self.values[name], self.contents[name] = value, content

    def changed(self) -> tuple[str, Any] | None:
        """(module.name, value) of the first that now holds something else; None: there is none."""
        now = ModuleState(self.modules)
        for name in [*now.contents, *self.contents]:
            if self.contents.get(name, SKIPPED) != now.contents.get(name, SKIPPED):
                return name, now.values.get(name)
        return None

    def _globals(self) -> Iterator[tuple[str, Any]]:
        for module in self.modules:
            for name, value in list(vars(module).items()):
                if name.startswith("__"):  # __warningregistry__ and the like
                    continue
                place = f"{module.__name__}.{name}"
                yield place, value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    for key, held in list(vars(value).items()):
                        if not key.startswith("__"):
                            yield f"{place}.{key}", held

    def _content(self, value: Any, seen: dict[int, Any]) -> Any:
        """What a value holds; `seen` keeps what was looked at, so that no id is used twice."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return type(value).__name__, repr(value)  # NaN equals itself as text
        if isinstance(value, Tensor | np.ndarray | np.generic | bytearray):
            return _digest(value)
        if (state := _generator_state(value)) is not None:
            return self._content(state, seen)
        if id(value) in seen:
            return "seen"
        seen[id(value)] = value
        if isinstance(value, list | tuple | deque):
            return type(value).__name__, [self._content(v, seen) for v in value]
        if isinstance(value, set | frozenset):
            return "set", sorted(repr(self._content(v, dict(seen))) for v in value)
        if isinstance(value, dict):
            pairs = value.items()
            return "dict", [(self._content(k, seen), self._content(v, seen)) for k, v in pairs]
        if isinstance(value, FunctionType):
            return "function", self._content([value.__defaults__, _attributes(value)], seen)
        if isinstance(value, nn.Module) or type(value).__module__ in self._own:
            return type(value).__name__, self._content(_attributes(value), seen)
        return SKIPPED


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object, in its dict or in slots."""
    slots = [
        name
        for kind in type(value).__mro__
        for name in getattr(kind, "__slots__", ())
        if not name.startswith("__") and hasattr(value, name)
    ]
    held = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}
    return {name: part for name, part in held.items() if not name.startswith("__")}


def _digest(value: Tensor | np.ndarray[Any, Any] | np.generic | bytearray) -> Any:
    """Type, shape and a checksum of the values: a module may hold much."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            return SKIPPED
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, bytearray):
        return "bytearray", hashlib.sha256(value).hexdigest()
    array = np.asarray(value)
    raw = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return str(array.dtype), array.shape, hashlib.sha256(raw).hexdigest()


def _generator_state(value: Any) -> Any:
    """Where a random generator stands; None: it is none."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return None
