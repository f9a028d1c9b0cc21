"""Serialization of a plugin's state: tensors and primitives for a checkpoint, and back.

A plugin is any Python object; pickling it would let a checkpoint run code. So
its attributes are written down one by one, by name: numbers, text, containers, tensors, Avalanche
data sets of our cases (as case ids), and objects of Avalanche, torch.nn, MONAI, clbench and the
plugin's own package, which are made again without calling anything of theirs.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench.errors import AvalancheError
from clbench.strategy.contract import Memory
from clbench.training.batches import CaseKey

KEY = "plugin"
"""Memory entry with the structure; tensors lie beside it as `plugin.0`, `plugin.1`, …"""
FACTORIES: dict[str, Any] = {"dict": dict, "list": list, "int": int, "float": float, "set": set}
MAKERS = ("empty", "ones", "zeros")
"""Functions of torch that are written down by name; Avalanche's parameter data holds one each."""
ROOTS = ("avalanche", "monai", "clbench")
"""Packages whose objects are written down, besides torch.nn and the plugin's own."""


RENAMED = {
    "clbench.avalanche.streams": "clbench.avalanche.scenario_streams",
    "clbench.avalanche.session": "clbench.avalanche.plugin_session",
    "clbench.avalanche.keeping": "clbench.avalanche.plugin_state",
    "clbench.avalanche.importing": "clbench.avalanche.lazy_import",
    "clbench.avalanche.plugins": "clbench.avalanche.supported",
}
"""Modules of clbench whose classes stand in checkpoints of version 0.1.0 → where they are now."""


def known(module: str, home: str) -> bool:
    """Whether objects of a module are written down; `home` is the plugin's module."""
    root = module.partition(".")[0]
    return root in (*ROOTS, home.partition(".")[0]) or module.startswith("torch.nn.")


def dir_of(value: object) -> set[str]:
    """Names that the classes of an object define, those of `object` aside."""
    return {name for kind in type(value).__mro__[:-1] for name in vars(kind)}


class _Writer:
    def __init__(self, home: str) -> None:
        self.home, self.tensors = home, list[Tensor]()
        self.seen: dict[int, int] = {}
        self.memories: list[tuple[int, int]] = []
        self.alive: list[object] = []  # an id is an object's only while the object lives

    def __call__(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.seen:
            return {"again": self.seen[id(value)]}
        if isinstance(value, Tensor):
            return {**self._new(value), **self._tensor(value, where)}
        if isinstance(value, np.generic):
            return self._number(value, where)
        if type(value) is np.ndarray:
            return {**self._new(value), **self._array(value, where)}
        if isinstance(value, torch.device | torch.dtype):
            return {type(value).__name__: str(value)}
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        if type(value) in (set, frozenset):
            mark = self._new(value) if type(value) is set else {}
            items = sorted((self(v, where) for v in value), key=json.dumps)
            return {**mark, type(value).__name__: items}
        if type(value) is list:
            mark = self._new(value)
            return {**mark, "list": [self(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        if type(value) in (dict, OrderedDict, defaultdict):
            mark = self._new(value)
            return {**mark, **self._kind(value, where), "dict": self._items(value, where)}
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return {"name": self._name(value, where)}
        if hasattr(value, "case_keys") or type(value).__name__ == "AvalancheDataset":
            return {**self._new(value), "cases": self._cases(value, where)}
        if hasattr(value, "__dict__") and not _holds_more(value):
            mark, name = self._new(value), self._name(type(value), where)
            return {**mark, "object": name, "dict": self._items(vars(value), where)}
        raise self.refusal(where, type(value).__qualname__)

    def _new(self, value: object) -> dict[str, int]:
        self.seen[id(value)] = len(self.seen)
        self.alive.append(value)
        return {"as": self.seen[id(value)]}

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        self._refuse_overlap(_memory(value), where)
        self.tensors.append(value.detach().clone())
        entry: dict[str, Any] = {"tensor": len(self.tensors) - 1}
        if isinstance(value, nn.Parameter):
            entry["parameter"] = value.requires_grad
        elif value.requires_grad and value.is_leaf:
            entry["grad"] = True
        if value.device.type != "cpu":
            entry["moved"] = True
        return entry

    def _number(self, value: np.generic, where: str) -> Any:
        item = value.item()
        if isinstance(item, np.generic):  # of more digits than a number of Python
            raise self.refusal(where, f"numpy number of type {value.dtype}")
        return self(item, where)

    def _refuse_overlap(self, memory: tuple[int, int], where: str) -> None:
        """Refuse a part of what was written: made again, it would not follow the whole.

        Args:
            memory: first address and the one after the last.
            where: the attribute.
        """
        start, stop = memory
        if any(start < other_stop and other < stop for other, other_stop in self.memories):
            raise self.refusal(where, "a view of another tensor or array that it holds")
        if start < stop:
            self.memories.append(memory)

    def _array(self, value: np.ndarray[Any, Any], where: str) -> dict[str, int]:
        self._refuse_overlap(np.lib.array_utils.byte_bounds(value), where)
        try:
            tensor = torch.from_numpy(value.copy())
        except (TypeError, ValueError) as err:  # text, objects, a foreign order of bytes
            raise self.refusal(where, f"numpy array of type {value.dtype.str}") from err
        self.tensors.append(tensor)
        return {"array": len(self.tensors) - 1}

    def _items(self, value: Mapping[Any, Any], where: str) -> list[Any]:
        return [[self(k, where), self(v, f"{where}.{k}")] for k, v in value.items()]

    def _kind(self, value: Mapping[Any, Any], where: str) -> dict[str, str]:
        if isinstance(value, defaultdict):
            factory = value.default_factory
            names = [n for n, known in FACTORIES.items() if known is factory]
            if factory is not None and not names:
                what = getattr(factory, "__name__", type(factory).__name__)
                raise self.refusal(where, f"defaultdict of {what}")
            return {"kind": "defaultdict", "factory": names[0] if names else ""}
        return {"kind": "ordered"} if isinstance(value, OrderedDict) else {}

    def _name(self, value: Any, where: str) -> str:
        if any(value is getattr(torch, maker) for maker in MAKERS):
            return f"torch:{value.__name__}"
        module, name = str(getattr(value, "__module__", "")), str(value.__qualname__)
        if not known(module, self.home) or "<" in name:
            raise self.refusal(where, f"{module}:{name}")
        return f"{module}:{name}"

    def _cases(self, value: Any, where: str) -> list[list[Any]]:
        if len(value) == 0:
            return []
        if not hasattr(value, "case_keys"):
            raise self.refusal(where, "a data set that was not made of this course's cases")
        names: Sequence[str] = value.case_keys
        return [list(split_key(name)) for name in names]

    def refusal(self, where: str, what: str) -> AvalancheError:
        return AvalancheError(
            "the plugin holds something that no checkpoint can hold",
            where=where,
            expected="numbers, text, containers, tensors, modules, data sets of this course, and "
            f"objects of {', '.join((*ROOTS, 'torch.nn'))} and of the plugin's own package",
            got=what,
            next_step="make it anew in before_training_exp, and delete it in after_training_exp",
        )


def _holds_more(value: object) -> bool:
    """Whether an object is more than its attributes.

    So are iterators, whoever says how to be pickled (numbers, text, sets, enumerations and their
    subclasses among them), lists and mappings of other classes, and objects with slots.
    """
    said = {"__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"}
    special = bool(said & dir_of(value)) and not isinstance(value, nn.Module)
    slots = any(
        isinstance(entry, MemberDescriptorType)
        for kind in type(value).__mro__
        for entry in vars(kind).values()
    )
    return special or slots or hasattr(type(value), "__next__") or isinstance(value, dict | list)


def _memory(value: Tensor) -> tuple[int, int]:
    """First address of a tensor's numbers and the one after the last; equal: it has none."""
    if value.layout is not torch.strided or value.is_meta or value.numel() == 0:
        return 0, 0
    steps = zip(value.shape, value.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def split_key(name: str) -> CaseKey:
    """`2/case` → (2, "case")."""
    step, _, case = name.partition("/")
    return int(step), case


def pack(value: Any, *, home: str) -> Memory:
    """An object as entries of a memory.

    Raises:
        AvalancheError: it holds something that cannot be written down; names the attribute.
    """
    write = _Writer(home)
    tree = write(value, KEY)
    packed: Memory = {KEY: json.dumps(tree)}
    packed.update({f"{KEY}.{i}": t for i, t in enumerate(write.tensors)})
    return packed


class _Reader:
    def __init__(
        self,
        memory: Memory,
        home: str,
        device: torch.device,
        dataset: Callable[[Sequence[CaseKey]], Any],
    ) -> None:
        self.memory, self.home, self.device, self.dataset = memory, home, device, dataset
        self.objects: dict[int, Any] = {}

    def __call__(self, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        if "again" in tree:
            return self.objects[tree["again"]]
        if "tensor" in tree:
            value = self._stored(tree["tensor"])
            value = value.to(self.device) if tree.get("moved") else value
            if "parameter" in tree:
                value = nn.Parameter(value, requires_grad=tree["parameter"])
            elif tree.get("grad"):
                value = value.clone().requires_grad_()
            return self._named(tree, value)
        if "cases" in tree:
            return self._named(tree, self.dataset([(step, case) for step, case in tree["cases"]]))
        if "array" in tree:
            return self._named(tree, self._stored(tree["array"]).numpy().copy())
        if "name" in tree:
            return _find(str(tree["name"]), self.home)
        if "device" in tree:
            return torch.device(tree["device"])
        if "dtype" in tree:
            return getattr(torch, tree["dtype"].removeprefix("torch."))
        return self._container(tree)

    def _container(self, tree: Mapping[str, Any]) -> Any:
        """Objects and containers; named before they are filled, for they may hold themselves."""
        if "object" in tree:
            kind = _find(tree["object"], self.home)
            value = self._named(tree, kind.__new__(kind))
            vars(value).update({self(k): self(v) for k, v in tree["dict"]})
            return value
        if "dict" in tree:
            target = self._named(tree, _empty(tree))
            for k, v in tree["dict"]:
                target[self(k)] = self(v)
            return target
        if "list" in tree:
            items = self._named(tree, list[Any]())
            items += [self(v) for v in tree["list"]]
            return items
        if "set" in tree:
            return self._named(tree, {self(v) for v in tree["set"]})
        if "frozenset" in tree:
            return frozenset(self(v) for v in tree["frozenset"])
        return tuple(self(v) for v in tree["tuple"])

    def _named(self, tree: Mapping[str, Any], value: Any) -> Any:
        if "as" in tree:
            self.objects[tree["as"]] = value
        return value

    def _stored(self, number: int) -> Tensor:
        tensor = self.memory[f"{KEY}.{number}"]
        assert isinstance(tensor, Tensor)  # noqa: S101  # pack wrote it
        return tensor


def unpack(
    memory: Memory,
    *,
    home: str,
    device: torch.device,
    dataset: Callable[[Sequence[CaseKey]], Any],
) -> Any:
    """The object that was packed into a memory, made again.

    Args:
        memory: with the entries that `pack` made.
        home: the plugin's module.
        device: where tensors go that did not lie on the CPU.
        dataset: makes the Avalanche data set of some cases.

    Raises:
        AvalancheError: it names a class of a package whose objects are never written down.
    """
    return _Reader(memory, home, device, dataset)(json.loads(str(memory[KEY])))


def stored(memory: Memory) -> list[CaseKey]:
    """The cases that the data sets of a packed object hold, sorted."""
    cases: set[CaseKey] = set()

    def walk(tree: Any) -> None:
        if isinstance(tree, dict):
            cases.update((step, case) for step, case in tree.get("cases", ()))
            for value in tree.values():
                walk(value)
        elif isinstance(tree, list):
            for value in tree:
                walk(value)

    walk(json.loads(str(memory.get(KEY, "null"))))
    return sorted(cases)


def _empty(tree: Mapping[str, Any]) -> Any:
    if tree.get("kind") == "ordered":
        return OrderedDict[Any, Any]()
    if tree.get("kind") == "defaultdict":
        return defaultdict(FACTORIES.get(tree["factory"]))
    return {}


def _find(name: str, home: str) -> Any:
    module, _, path = name.partition(":")
    module = RENAMED.get(module, module)
    if module == "torch" and path in MAKERS:
        return getattr(torch, path)
    value: Any = None
    if known(module, home):
        value = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    if value is None or getattr(value, "__module__", None) != module:
        raise AvalancheError(
            "a checkpoint names a class that no plugin's state may hold",
            where=f"memory entry {KEY!r}",
            got=name,
            next_step="do not use this checkpoint; run again with --fresh",
        )
    return value
