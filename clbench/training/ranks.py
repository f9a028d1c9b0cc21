"""The processes that work on one run together, and what they tell one another.

One process is rank 0 of 1, and asks nobody. Of several, rank 0 writes what the run leaves; every
rank reads it, on a file system that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from clbench import signals
from clbench.errors import ClbenchError, TrainingError
from clbench.training.launch import Place

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for another one, which may wait for a lock or examine a large case; one
that has ended is noticed at once."""


class Ranks:
    """A process that works alone."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Processes."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def asked(self) -> str | None:
        """The signal on which to stop, or None; the same in all processes after each `gather`."""
        return signals.asked()

    def check(self, where: object = None) -> None:
        """Stop here, all processes alike, if one of them was asked to before the last `gather`.

        Raises:
            Stopped: it was.
        """
        if self.asked() is not None:
            signals.check(where)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place; it has one shape in all of them."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def each(self, do: Callable[[], T]) -> list[T]:
        """What all processes return from their part of a task, by rank; each waits for all.

        Raises:
            ClbenchError: raised in this process, or else the first that was raised in another.
        """
        return [do()]

    def by_first(self, do: Callable[[], T]) -> T:
        """What rank 0 returns or raises; the others wait for it, and do nothing.

        Raises:
            ClbenchError: rank 0 raised it.
        """
        return do()


class ProcessGroup(Ranks):
    """One of several processes, connected by `torch.distributed`.

    Args:
        device: where its tensors lie; on a GPU they are added up by NCCL, else by gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        # words go by the CPU's network, whatever tensors go by
        self._words = (
            None
            if device.type == "cpu"
            else distributed.new_group(backend="gloo", timeout=PATIENCE)
        )
        self._asked: str | None = None

    def asked(self) -> str | None:
        """As of the last `gather`."""
        return self._asked

    def add(self, tensor: Tensor) -> Tensor:
        """See `Ranks.add`.

        Raises:
            TrainingError: another process has ended.
        """
        with self._connected():
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """See `Ranks.gather`.

        Raises:
            TrainingError: another process has ended.
        """
        told: list[Any] = [None] * self.size
        with self._connected():
            distributed.all_gather_object(told, (value, signals.asked()), group=self._words)
        self._asked = next((asked for _, asked in told if asked is not None), None)
        if self._asked is not None and signals.asked() is None:
            signals.ask(self._asked)
        return [value for value, _ in told]

    def each(self, do: Callable[[], T]) -> list[T]:
        """See `Ranks.each`."""
        mine: T | None = None
        error: ClbenchError | None = None
        try:
            mine = do()
        except ClbenchError as err:
            error = err
        told = self.gather((mine, error))
        for _, other in [(mine, error), *told]:
            if other is not None:
                raise other
        return [value for value, _ in told]  # type: ignore[misc]  # nobody failed

    def by_first(self, do: Callable[[], T]) -> T:
        """See `Ranks.by_first`."""
        return self.each(do if self.first else lambda: None)[0]  # type: ignore[return-value]

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as err:  # what torch raises where a connection is cut
            signals.check("another process of the run stopped before this one")
            raise TrainingError(
                "another process of this run has ended",
                where=f"rank {self.rank} of {self.size}",
                got=str(err).partition("\n")[0],
                next_step="look for its error above; run the same command again, with as many "
                "processes: it goes on at the last saved place",
            ) from err


def join(here: Place | None, device: torch.device) -> Ranks:
    """Meet the other processes; returns once all are there.

    Args:
        here: which process this is; None or the only one: it works alone.
        device: where its tensors lie.
    """
    if here is None or here.size == 1:
        return Ranks()
    if not distributed.is_initialized():
        distributed.init_process_group(
            backend="gloo" if device.type == "cpu" else "nccl",
            init_method=here.url,
            rank=here.rank,
            world_size=here.size,
            timeout=PATIENCE,
            device_id=None if device.type == "cpu" else device,
        )
    return ProcessGroup(device)


def own_device(name: str, here: Place | None) -> str:
    """The device of this process: of several on one machine each has a GPU of its own.

    Args:
        name: as `--device` names it.
        here: which process this is.
    """
    if not torch.cuda.is_available():
        return name
    if name.startswith("cuda:") and name[5:].isdigit():
        if int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_device(name)  # streams and pinned memory belong to the current one
        return name
    if here is None or name not in ("auto", "cuda"):
        return name
    if here.local < torch.cuda.device_count():  # else `pick_device` refuses it by name
        torch.cuda.set_device(here.local)
    return f"cuda:{here.local}"
