"""What a plugin holds comes back as it was, or is refused by name; old states are read."""

from __future__ import annotations

import enum
import json
from collections import Counter, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from clbench.avalanche.plugin_state import KEY, pack, unpack
from clbench.errors import AvalancheError

Pair = namedtuple("Pair", "a b")  # as plugins have them


class Table(dict[str, int]):
    """A mapping that is also an object."""


class Rows(list[int]):
    """A list that is also an object."""


class Mode(enum.Enum):
    """An enumeration."""

    A = 1


class Level(enum.IntEnum):
    """One that is a number."""

    LOW = 1


class Slotted:
    """Part of it is in no `__dict__`."""

    __slots__ = ("__dict__", "kept")

    def __init__(self) -> None:
        self.kept = 1


class Holder:
    """An object with attributes, as plugins are."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


def again(value: object) -> Any:
    home = Holder.__module__
    packed = pack(value, home=home)
    return unpack(packed, home=home, device=torch.device("cpu"), dataset=list)


@pytest.mark.parametrize(
    "value",
    [
        Table(a=1), Rows([1, 2]), Counter("aab"), Pair(1, 2), Mode.A, Level.LOW, Slotted(),
        np.ma.masked_array([1, 2], [True, False]), type("Name", (str,), {})("x"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_would_lose_a_part_is_refused_by_name(value: object) -> None:
    with pytest.raises(AvalancheError, match="no checkpoint can hold") as refused:
        pack(Holder(notes=[value]), home=Holder.__module__)
    assert "plugin.notes[0]" in str(refused.value)
    assert type(value).__name__ in str(refused.value)


def test_sets_of_sets_and_what_is_shared_come_back() -> None:
    array, marks, frozen = np.arange(3), {1, 2}, frozenset({1})
    held = Holder(
        array=array, same=array, marks=marks, also=marks, table={frozen: {frozen, frozenset()}}
    )
    back = again(held)
    assert back.table == held.table
    assert back.same is back.array
    assert back.also is back.marks
    assert np.array_equal(back.array, array)
    assert again((torch.Size([2, 3]), (1,))) == ((2, 3), (1,))


def test_leaves_of_a_graph_ask_for_gradients_as_before() -> None:
    leaf = torch.ones(2, requires_grad=True)
    back = again(Holder(leaf=leaf, plain=torch.ones(2), drawn=leaf * 2))
    assert (back.leaf.requires_grad, back.plain.requires_grad) == (True, False)
    assert not back.drawn.requires_grad  # the graph is gone
    assert not isinstance(back.leaf, torch.nn.Parameter)


def test_views_are_refused_and_neighbors_are_not() -> None:
    whole, numbers = torch.arange(6.0), np.arange(6)
    views: tuple[Any, ...] = (
        [whole, whole[:2]], [whole[:4], whole[3:]], [whole.detach(), whole],
        [numbers, numbers[::2]], [torch.from_numpy(numbers), numbers],
    )  # fmt: skip
    for view in views:
        with pytest.raises(AvalancheError, match="a view of another"):
            pack(view, home=Holder.__module__)
    first, second = again([*whole.split(3)])
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [3, 4, 5])
    assert len(again([torch.empty(0), torch.empty(0), whole.expand(2, 6)])) == 3


def test_states_of_earlier_versions_are_read() -> None:
    tree = {
        "as": 0,
        "dict": [
            ["set", {"set": [1, 2]}], ["tuple", {"tuple": [1, {"set": []}]}],
            ["array", {"array": 0}], ["tensor", {"as": 1, "tensor": 1}], ["same", {"again": 1}],
        ],
    }  # fmt: skip
    memory: Any = {KEY: json.dumps(tree), f"{KEY}.0": torch.arange(2), f"{KEY}.1": torch.ones(1)}
    back = unpack(memory, home="tests", device=torch.device("cpu"), dataset=list)
    assert (back["set"], back["tuple"]) == ({1, 2}, (1, set()))
    assert back["array"].tolist() == [0, 1]
    assert back["same"] is back["tensor"]
