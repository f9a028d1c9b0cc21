"""What a strategy's modules hold is compared before and after a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clbench.strategies.finetune import Finetune
from clbench.testing.module_state import ModuleState, own_modules

SOURCE = """
import random
from collections import deque
from types import SimpleNamespace
import numpy as np
import torch
from torch import nn

rows, table, names, queue, raw = [], {}, set(), deque(), bytearray(2)
tensor, array, number = torch.zeros(2, 2), np.zeros(3), float("nan")
half, inside = torch.zeros((), dtype=torch.bfloat16), ([{}],)
drawn, numpy_drawn, torch_drawn = random.Random(0), np.random.default_rng(0), torch.Generator()
net, namespace = nn.Linear(1, 1), SimpleNamespace(a=1)
again = [rows, rows]
again.append(again)

class Buffer:
    shared = []
    def __init__(self):
        self.rows = []

class Slotted:
    __slots__ = ("rows",)
    def __init__(self):
        self.rows = []

buffer, slotted = Buffer(), Slotted()

def keeps(image, kept=[]):
    kept.append(image)

class Method:
    pass
"""


@pytest.fixture
def module() -> Iterator[ModuleType]:
    made = ModuleType("module_of_a_method")
    sys.modules[made.__name__] = made
    exec(SOURCE, vars(made))  # noqa: S102  # a module of its own, made anew for every case
    yield made
    del sys.modules[made.__name__]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", lambda m: m.rows.append(torch.zeros(1))),
        ("table", lambda m: m.table.update(a=1)),
        ("names", lambda m: m.names.add("a")),
        ("queue", lambda m: m.queue.append(1)),
        ("raw", lambda m: m.raw.extend(b"a")),
        ("tensor", lambda m: m.tensor[0].add_(1)),
        ("half", lambda m: m.half.add_(1)),
        ("array", lambda m: np.put(m.array, 0, 1)),
        ("number", lambda m: setattr(m, "number", 2.0)),
        ("inside", lambda m: m.inside[0][0].update(a=1)),
        ("added", lambda m: setattr(m, "added", [1])),
        ("rows", lambda m: delattr(m, "rows")),
        ("drawn", lambda m: m.drawn.random()),
        ("numpy_drawn", lambda m: m.numpy_drawn.random()),
        ("torch_drawn", lambda m: torch.rand(1, generator=m.torch_drawn)),
        ("net", lambda m: nn.init.ones_(m.net.weight)),
        ("buffer", lambda m: m.buffer.rows.append(1)),
        ("slotted", lambda m: m.slotted.rows.append(1)),
        ("Buffer.shared", lambda m: m.Buffer.shared.append(1)),
        ("keeps", lambda m: m.keeps(1)),
        ("keeps", lambda m: setattr(m.keeps, "last", 1)),
    ],
)
def test_what_changed_is_named(
    name: str, change: Callable[[Any], object], module: ModuleType
) -> None:
    before = ModuleState((module,))
    assert before.changed() is None
    change(module)
    found = before.changed()
    assert found is not None
    assert found[0] == f"module_of_a_method.{name}"


def test_modules_and_objects_of_others_are_not_compared(module: Any) -> None:
    before = ModuleState((module,))
    module.namespace.a = 2  # of another package, which may count what it likes
    module.late = SimpleNamespace()
    module.json = sys  # imported by a hook
    module.__warningregistry__ = {"a": 1}
    assert before.changed() is None


def test_the_modules_of_a_method_are_those_of_its_classes_and_their_packages(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_modules(Finetune()) == ()
    assert own_modules(module.Method()) == (module,)
    inner, beside, other = (ModuleType(n) for n in ("method.inner", "method.kept", "methods"))
    for made in (inner, beside, other):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    kind = type("Mine", (Finetune,), {"__module__": "method.inner"})
    assert own_modules(kind()) == (inner, beside)
