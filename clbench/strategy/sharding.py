"""A batch computed in shards of one size: on several devices, one after the other, or both.

The gradient of an update is the mean over its shards. So a loss that is a mean over crops, voxels
or channels is that of the whole batch as it stands, and so is one that looks at weights alone. A
loss that is divided by what its crops hold, such as the number of known voxels, is divided by
`denominator` of it: the number of the whole batch, per shard. What draws crops of its own for
every batch takes `own_share` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The crops that are computed at the moment, of those of an update."""

    number: int = 0
    """Which shard, from 0."""
    of: int = 1
    """Shards of the update, on all devices together."""
    total: Callable[[Tensor], Tensor] = lambda count: count
    """A count of this shard → its sum over all shards, float64; each shard calls it as often and
    in the same order."""


_current = ContextVar("shard", default=Shard())  # noqa: B039  # frozen


def current() -> Shard:
    """The shard that is computed; where a batch is computed whole, its only one."""
    return _current.get()


@contextmanager
def computing(shard: Shard) -> Iterator[None]:
    """In this block `shard` is the one that is computed."""
    token = _current.set(shard)
    try:
        yield
    finally:
        _current.reset(token)


def denominator(count: Tensor) -> Tensor:
    """What a sum over a batch is divided by: its count, at least 1, so that nothing is no error.

    Of a batch in shards it is the count of the whole batch, per shard: then the mean of the
    shards' losses is the loss of the whole batch, however the counted is spread over them.

    Args:
        count: of one element, without gradient, such as the number of known voxels of a batch.

    Example:
        >>> import torch
        >>> from clbench.strategy.sharding import Shard, computing, denominator
        >>> int(denominator(torch.tensor(0)))
        1
        >>> with computing(Shard(number=0, of=2, total=lambda count: count.double() + 9)):
        ...     float(denominator(torch.tensor(1)))  # 1 here and 9 in the other shard
        5.0
    """
    shard = current()
    if shard.of == 1:
        return count.clamp(min=1)
    return (shard.total(count.detach()).double().clamp(min=1) / shard.of).float()


def own_share(count: int) -> slice:
    """The items of this shard, of `count` items that the whole batch would have.

    Fewer items than shards are everybody's: the mean of equal losses is that loss.

    Example:
        >>> from clbench.strategy.sharding import Shard, computing, own_share
        >>> with computing(Shard(number=1, of=2)):
        ...     [list(range(n))[own_share(n)] for n in (4, 3, 1)]
        [[2, 3], [1, 2], [0]]
    """
    shard = current()
    if count < shard.of:
        return slice(0, count)
    return slice(shard.number * count // shard.of, (shard.number + 1) * count // shard.of)
