"""One update: its crops in shards, the loss and gradient of each, and their sum.

A shard is what one forward and backward pass computes. One update has several where batches are
accumulated or several processes share it; then a shard's gradient is divided by their number, and
all are added up. What a loss divides by counts of its crops, it divides by those of the whole
update (`clbench.strategy.sharding.denominator`): the processes add up each count as it is asked
for. Shards that one process computes one after the other need them before the first backward pass,
so the losses are computed once ahead with a model that answers zeros, for their counts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.errors import SettingError, TrainingError
from clbench.nets.output import Output
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import Batch, Session
from clbench.strategy.sharding import Shard, computing, own_share
from clbench.training.monitors import count_positives
from clbench.training.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the crops of an update are divided."""

    crops: int
    """Of one update, on all processes together."""
    passes: int
    """Shards that each process computes, one after the other."""
    ranks: Ranks
    """The processes."""

    @property
    def shards(self) -> int:
        """Of one update, on all processes together."""
        return self.passes * self.ranks.size

    def own(self, update: int) -> range:
        """The numbers of the crops of an update that this process computes."""
        share = self.crops // self.ranks.size
        start = update * self.crops + self.ranks.rank * share
        return range(start, start + share)


def divide(train: TrainSettings, ranks: Ranks) -> Division:
    """Divide an update's crops among processes, and each share into passes of `train.batch`.

    Args:
        train: crops at once, and batches per update.
        ranks: the processes.

    Raises:
        SettingError: the processes cannot have equally many, or a compiled network would have
            several passes.
    """
    share, rest = divmod(train.crops, ranks.size)
    if rest:
        raise SettingError(
            "the crops of an update cannot be divided among so many processes",
            where=f"{ranks.size} processes",
            expected=f"a divisor of train.batch x train.accumulate = {train.crops}",
            got=ranks.size,
            next_step="take fewer processes, or more crops per update (--set train.accumulate="
            f"{ranks.size}: another run, with an id of its own)",
        )
    passes = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= train.batch)
    if train.compile and passes > 1:  # counts of all passes come ahead, from a model of zeros
        raise SettingError(
            "a compiled network cannot be taught by accumulated batches",
            where="train.compile, train.accumulate",
            got=f"{passes} passes per update",
            next_step="--set train.compile=false, or --set train.accumulate=1 with a larger batch",
        )
    return Division(crops=train.crops, passes=passes, ranks=ranks)


def refuse_batch_statistics(model: nn.Module, division: Division) -> None:
    """Refuse layers that would see shards where they should see the batch.

    Raises:
        TrainingError: a batch normalization is trained; names it.
    """
    for name, module in model.named_modules():
        if division.shards > 1 and isinstance(module, _BatchNorm) and module.training:
            raise TrainingError(
                "the network normalizes over the batch, of which each pass sees a part",
                where=name,
                expected="normalization of each crop by itself, such as InstanceNorm3d",
                got=type(module).__name__,
                next_step="--set train.accumulate=1 and one process, or another backbone",
            )


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What the backward passes of an update left beside the gradients themselves."""

    terms: dict[str, Tensor]
    """Loss terms of the whole update; one element each."""
    loss: Tensor
    """Their sum."""
    voxels: Tensor
    """(K,) annotated positive voxels."""
    cases: tuple[str, ...]
    """What its crops were cut from, in order."""
    misses: Tensor | None = None
    """Counts that were another number ahead, with a model that answers zeros; None: there were
    none ahead."""


@dataclass(kw_only=True)
class UpdateWork:
    """Computes the gradient of one update after another."""

    session: Session
    """Gives the loss terms."""
    division: Division
    """Of an update's crops."""
    whole: bool
    """Batches hold the crops of all processes, not those of this one."""
    trained: Sequence[nn.Parameter]
    """Their gradients are added up over the processes."""
    autocast: Callable[[], AbstractContextManager[object]]
    """Mixed precision of a forward pass."""
    scaled: Callable[[Tensor], Tensor]
    """A loss → what is differentiated."""
    _shapes: dict[tuple[int, ...], Output] = field(default_factory=dict)

    def gradients(
        self,
        batch: Batch,
        add_up: Callable[[dict[str, Tensor]], Tensor],
        reseed: Callable[[str, int], None],
    ) -> Gradients:
        """Forward and backward passes of an update; its gradient is left in what is trained.

        Args:
            batch: its crops, all or those of this process.
            add_up: loss terms → their sum.
            reseed: sets the random state to that of a place in the update.
        """
        if self.division.shards > 1:
            return self._in_shards(batch, add_up, reseed)
        with self.autocast():
            terms = self.session.terms(batch)
        loss = add_up(terms)
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]  # torch
        voxels = count_positives(batch.label)
        return Gradients(terms=terms, loss=loss, voxels=voxels, cases=batch.cases)

    def _in_shards(
        self,
        batch: Batch,
        add_up: Callable[[dict[str, Tensor]], Tensor],
        reseed: Callable[[str, int], None],
    ) -> Gradients:
        ranks, shards = self.division.ranks, self._shards(batch)

        alike = shards[0][0].of == 1  # every process computes all crops
        of = ranks.size if alike else self.division.shards
        counts = _Counts(ranks, device=batch.label.device)
        if len(shards) > 1:
            counts = self._counted_ahead(shards, reseed)
        added: dict[str, Tensor] = {}
        for shard, crops in shards:
            reseed("shard", shard.number)
            total = partial(counts.total, shard.number - shards[0][0].number)
            with computing(replace(shard, total=total)), self.autocast():
                terms = self.session.terms(crops)
            self.scaled(add_up(terms) / of).backward()  # type: ignore[no-untyped-call]  # torch
            for name, term in terms.items():
                share = term.detach().double().reshape(()) / of
                added[name] = added[name] + share if name in added else share
        reseed("hooks", 0)  # the same in all processes
        counts.end()
        add_gradients(self.trained, ranks)

        mine = [crops for _, crops in shards] if ranks.first or not alike else []
        told = ranks.gather((tuple(added), [crops.cases for crops in mine]))
        names = _same_names([names for names, _ in told])
        voxels = torch.zeros(len(batch.structures), dtype=torch.float64, device=batch.label.device)
        for crops in mine:
            voxels += count_positives(crops.label)
        numbers = ranks.add(torch.cat([*(v[None] for v in added.values()), voxels, counts.misses]))
        return Gradients(
            terms={name: numbers[i] for i, name in enumerate(names)},
            loss=numbers[: len(names)].sum(),
            voxels=numbers[len(names) : -1],
            cases=tuple(case for _, parts in told for cases in parts for case in cases),
            misses=numbers[-1],
        )

    def _shards(self, batch: Batch) -> list[tuple[Shard, Batch]]:
        """This process's shards of an update: all crops where they are fewer than shards."""
        passes, of, first = self.division.passes, self.division.shards, self.division.ranks.rank
        count = len(batch.cases)
        if self.whole and count < of:
            return [(Shard(), batch)]
        cut = []
        for number in range(first * passes, (first + 1) * passes):
            shard = Shard(number=number, of=of)
            if self.whole:
                with computing(shard):
                    own = own_share(count)
            else:
                size = count // passes
                start = (number - first * passes) * size
                own = slice(start, start + size)
            cut.append((shard, crops_of(batch, own)))
        return cut

    def _counted_ahead(
        self, shards: Sequence[tuple[Shard, Batch]], reseed: Callable[[str, int], None]
    ) -> _Counts:
        """All counts of the update, asked for by losses of a model that answers zeros.

        Each shard is counted in the random state in which it is computed afterwards: a loss may
        draw what it counts, as long as the forward pass before it draws nothing.
        """
        context = self.session.context
        memory, ahead = dict(context.memory), list[list[Tensor]]()

        def note(count: Tensor) -> Tensor:
            ahead[-1].append(count.double().reshape(()))
            return count

        with torch.no_grad(), answering_zeros(context.model, self._shapes), self.autocast():
            for shard, crops in shards:
                ahead.append([])
                reseed("shard", shard.number)
                with computing(replace(shard, total=note)):
                    self.session.count(crops)
        context.memory.clear()
        context.memory.update(memory)
        if len({len(counts) for counts in ahead}) > 1:
            raise _other_counts([len(counts) for counts in ahead])
        none = torch.zeros(0, dtype=torch.float64, device=shards[0][1].label.device)
        table = torch.stack([torch.stack(counts) if counts else none for counts in ahead])
        return _Counts(self.division.ranks, device=none.device, ahead=table)


class _Counts:
    """What losses divide by, added up over the shards of an update.

    Args:
        ranks: the processes.
        device: where the counts lie.
        ahead: (shards of this process, counts), where they were counted ahead.
    """

    def __init__(self, ranks: Ranks, *, device: torch.device, ahead: Tensor | None = None) -> None:
        self.ranks, self.ahead, self.asked = ranks, ahead, dict[int, int]()
        self.totals: Tensor | None = None
        if ahead is not None:
            n = ahead.shape[1]
            sums = ranks.add(torch.tensor([n, n * n], dtype=torch.float64, device=device)).tolist()
            if sums[0] ** 2 != ranks.size * sums[1]:  # equal only where all processes have n
                raise _other_counts([n, round(sums[0]) - n])
            self.totals = ranks.add(ahead.sum(0))
        self.misses = torch.zeros(1, dtype=torch.float64, device=device)

    def total(self, place: int, count: Tensor) -> Tensor:
        """A count of the shard at a place of this process → its sum over all shards."""
        if self.ahead is None or self.totals is None:
            # beside the count a 1, so that a process that asks for none is noticed; see `end`
            own = count.double().reshape(())
            return self.ranks.add(torch.stack([own, torch.ones_like(own)]))[0]
        number = self.asked.get(place, 0)
        self.asked[place] = number + 1
        if number >= self.ahead.shape[1]:
            raise _other_counts([self.ahead.shape[1], number + 1])
        self.misses += count.double().reshape(()) != self.ahead[place, number]
        return self.totals[number]

    def end(self) -> None:
        """Refuse, before gradients are added up, that other processes ask for further counts.

        Raises:
            TrainingError: they do: their counts, and this, are added up to more than nothing.
        """
        if self.ahead is None and self.ranks.size > 1:
            rest = torch.zeros(2, dtype=torch.float64, device=self.misses.device)
            if self.ranks.add(rest)[1] > 0:
                raise _other_counts(())


def _other_counts(numbers: Sequence[int]) -> TrainingError:
    return TrainingError(
        "the losses of an update's parts divide by counts of different number",
        expected="as many calls of `denominator`, in the same order, whatever a part shows",
        got=", ".join(map(str, numbers)) or "fewer calls in this process than in another",
        next_step="call it also where nothing is known, or take one process and "
        "--set train.accumulate=1",
    )


def _same_names(told: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The names of the loss terms, which all processes must have."""
    if len(set(told)) > 1:
        raise TrainingError(
            "the processes computed different loss terms",
            expected="the same names, in the same order, whatever a part of the batch shows",
            got=" and ".join(", ".join(names) for names in dict.fromkeys(told)),
            next_step="return 0 for a term that says nothing about a part, or use one process",
        )
    return told[0]


def refuse_misses(misses: float, where: str) -> None:
    """Refuse losses that divide by what the model answers, where they were counted ahead.

    Raises:
        TrainingError: a count was another one with the model's own answer.
    """
    if misses:
        raise TrainingError(
            "a loss divides by a number that depends on what the model answers, which is not known "
            "before the first part of an update is differentiated",
            where=where,
            next_step="--set train.accumulate=1, with a larger train.batch or more processes",
        )


def crops_of(batch: Batch, own: slice) -> Batch:
    """Some crops of a batch."""
    return replace(
        batch,
        image=batch.image[own],
        label=batch.label[own],
        pseudo=None if batch.pseudo is None else batch.pseudo[own],
        cases=batch.cases[own],
    )


@contextmanager
def answering_zeros(model: nn.Module, shapes: dict[tuple[int, ...], Output]) -> Iterator[None]:
    """In this block the model answers zeros, of the shapes that it would give.

    Args:
        model: not run, but once for images of a shape that is not known yet.
        shapes: shape of the images → what is answered; grows.
    """
    own, forward = vars(model).get("forward"), model.forward

    def zeros(image: Tensor) -> Output:
        key = tuple(image.shape)
        if key not in shapes:
            like: Output = forward(image)
            shapes[key] = Output(
                logits=like.logits.new_zeros(()).expand(like.logits.shape),
                features={
                    name: m.new_zeros(()).expand(m.shape) for name, m in like.features.items()
                },
            )
        return shapes[key]

    model.forward = zeros
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def add_gradients(trained: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Add up gradients over the processes, in one buffer per type.

    One addition after the backward pass, in place of torch's DistributedDataParallel: a network
    that grows and parameters that no loss reaches need no wrapper, hooks find gradients of the
    whole update, and a parameter without gradient in every process keeps none. What it costs is
    measured by `tests/perf/processes.py`.

    Args:
        trained: the same parameters, in the same order, in all processes.
        ranks: the processes.
    """
    if ranks.size == 1 or not trained:
        return
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in trained:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for kind, parameters in by_type.items():
        there = torch.tensor([p.grad is not None for p in parameters], dtype=kind)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        buffer = torch.cat([there.to(flat[0].device), *(g.reshape(-1) for g in flat)])
        ranks.add(buffer)
        anywhere, start = (buffer[: len(parameters)] > 0).tolist(), len(parameters)
        for parameter, have in zip(parameters, anywhere, strict=True):
            stop = start + parameter.numel()
            if have:
                parameter.grad = buffer[start:stop].view_as(parameter)
            start = stop
