"""Equal to the bit, and the conditions under which two results ought to be.

Room: row 5 (torch).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def dice_thrown(seed: int) -> Iterator[None]:
    """Global random states that depend on `seed` inside, and are as before afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a plugin may use it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors as small as these are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def calm() -> Iterator[None]:
    """Both: what is checked here neither sees nor leaves any of it."""
    with one_thread(), dice_thrown(0):
        yield


def same(a: Any, b: Any) -> bool:
    """Equal to the bit: tensors, arrays, numbers, and lists, tuples, sets and dicts of them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a.dtype == b.dtype and a.shape == b.shape and _bits_equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return type(a) is type(b) and bool(a == b)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    equal = (a == b) | ((a != a) & (b != b))
    return bool(equal.all())


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In words: the first entry in which two mappings differ."""
    if set(a) != set(b):
        return f"entries {', '.join(sorted(set(a) ^ set(b)))} in one only"
    return next((f"{name}" for name in a if not same(a[name], b[name])), "their order")
