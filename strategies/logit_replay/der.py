"""DER: a few old cases are stored with the old model's logits, which the new model must keep.

After a step its training cases are offered to a reservoir of `mem_size` cases; each one that is
taken is predicted once, as a whole, by the model served then, and its logits are stored as float16,
never to change. Every update cuts crops of stored cases, the logits with them, and adds the mean
squared difference to what the model says now. Structures learned after a case was stored are free
in it. A step that teaches old structures again is one more step: its cases are offered after it,
and stored ones hold all logits meanwhile.

Source: Buzzega et al., NeurIPS 2020, and the authors' code (mammoth). Differs: an example is a
case, offered once, and its logits are those of the end of its step, not from along the way, when it
was met in training; of a crop the logits turn with it, where theirs are compared across
augmentations.
`alpha` is the smallest buffer's of their CIFAR-10 runs; not tuned here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from clbench.errors import SettingError
from clbench.spec.settings import NotNegative
from clbench.strategies.finetune import Finetune
from clbench.strategy import (
    UNKNOWN,
    Batch,
    Declaration,
    Kit,
    Lesson,
    Memory,
    Output,
    PhaseContext,
    Predictor,
    Range,
    SearchSpace,
    Session,
    Strategy,
    derive_seed,
    sharding,
)
from clbench.strategy.distillation import stored_logits_mse

if TYPE_CHECKING:
    from clbench.data.volume import Volume

STORED = "der_stored"
"""Memory entry: [step, case id] of every stored case, by its place in the reservoir."""
OFFERED = "der_offered"
"""Memory entry: how many cases have been offered so far."""
LOGITS = "der_logits/"
"""Memory entries "der_logits/step/case id": (C, D, H, W) float16 logits of the whole case."""


def reservoir_place(number: int, size: int, draw: int) -> int | None:
    """Where the item of a number goes in a reservoir, so that each is as likely to be there.

    Args:
        number: of the item, from 0.
        size: places of the reservoir.
        draw: uniform in 0 to `number`; looked at once every place is taken.

    Returns:
        Its place, whose item it replaces; None: it is dropped.

    Source: Vitter, 1985, algorithm R, as in the code of Buzzega et al.
    """
    place = number if number < size else draw
    return place if place < size else None


class StoredLogitsSession(Session):
    """Terms on crops of stored cases, beside those of the session it stands before."""

    def __init__(self, context: PhaseContext, plain: Session) -> None:
        super().__init__(context)
        self.plain, self.update = plain, context.done

    def after_update(self) -> None:
        """Count the update: its number seeds the crops."""
        super().after_update()
        self.update += 1

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward passes on new and on stored crops, and all terms."""
        method: Any = self.context.strategy
        terms = self.plain.terms(batch)
        for name, of in method.replayed().items():
            drawn, logits = self.drawn(name, batch)
            terms[name] = of(drawn, self.context.model(drawn.image), logits)
        return terms

    def drawn(self, name: str, batch: Batch) -> tuple[Batch, list[Tensor]]:
        """Crops of stored cases, drawn without replacement, and the logits stored with each.

        Args:
            name: of the term they are for; terms draw independently.
            batch: of new crops; as many, where the strategy sets no number. Of a batch in
                shards this is one, and gets its share of what the whole batch draws.
        """
        context, method = self.context, self.context.strategy
        assert isinstance(method, StoredLogits)  # noqa: S101  # tells the type checker
        kept = stored(context.memory)
        new = len(batch.cases) * sharding.current().of
        count = min(method.batch_size_mem or new, len(kept))
        place = (name, self.update)
        seed = derive_seed(context.seed, context.lesson.number, *place)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        chosen = [kept[i] for i in order[:count].tolist()][sharding.own_share(count)]
        images, labels, logits = [], [], []
        for key in chosen:
            whole = context.memory[LOGITS + named(key)]
            assert isinstance(whole, Tensor)  # noqa: S101  # set in `prepare`
            image, label, of_crop = context.draw(key, (*place, named(key)), whole)
            images.append(image)
            labels.append(label)
            logits.append(of_crop.to(context.device))
        drawn = Batch(
            image=torch.stack(images).to(context.device),
            label=torch.stack(labels).to(context.device),
            pseudo=None,
            structures=batch.structures,
            new=batch.new,
            again=batch.again,
            cases=tuple(named(key) for key in chosen),
        )
        return drawn, logits


def named(key: tuple[int, str]) -> str:
    """A case as batches name it: "step/case id"."""
    return f"{key[0]}/{key[1]}"


def stored(memory: Memory) -> list[tuple[int, str]]:
    """(step, case id) of the stored cases, by place."""
    content: Any = memory.get(STORED, [])
    return [(int(step), str(case)) for step, case in content]


@dataclass(frozen=True, kw_only=True)
class StoredLogits:
    """What DER adds to a method, whatever its head: stands before it, as in `Der`.

    It is no strategy itself, so that it brings no defaults of its own. Of a softmax, background's
    logit is held, too.
    """

    search_space: ClassVar[SearchSpace] = {"alpha": Range(low=0.01, high=10.0, log=True)}
    alpha: NotNegative = 0.3
    """Weight of the mean squared difference to the stored logits."""
    mem_size: int = 4
    """Cases stored in all; not tuned. Each takes two bytes per channel and voxel in every
    checkpoint: 280 MB for a case of 10 million voxels with 14 channels."""
    batch_size_mem: int | None = None
    """Crops of stored cases per update and term, at the most one of each; None: as many as of new
    ones."""
    centred: bool = False
    """Compare logits less their mean over channels, which a softmax ignores; the original does
    not."""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()
        for name in ("mem_size", "batch_size_mem"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingError(
                    "a setting is out of range",
                    where=f"strategy.{name}",
                    expected="a whole number of at least 1",
                    got=value,
                )

    def declares(self) -> Declaration:
        """The cases it stores; the term `der`, where it has a weight."""
        promised = cast(Strategy, super()).declares()
        own = ("der",) if self.alpha else ()
        return replace(promised, past="cases", penalties=(*promised.penalties, *own))

    def store_cases(self, step: Lesson, kit: Kit, memory: Memory) -> Sequence[tuple[int, str]]:
        """Offer the training cases of the step before to the reservoir, once each."""
        before, cases = step.number - 1, step.past[step.number - 1]
        random, kept = kit.generator(before, "reservoir"), stored(memory)
        number = int(memory.get(OFFERED, 0))  # type: ignore[arg-type]  # set below
        for i in torch.randperm(len(cases), generator=random).tolist():
            draw = int(torch.randint(number + 1, (1,), generator=random))
            place = reservoir_place(number, self.mem_size, draw)
            if place is not None:
                kept[place : place + 1] = [(before, cases[i])]
            number += 1
        memory[OFFERED], memory[STORED] = number, [list(key) for key in kept]
        names = {LOGITS + named(key) for key in kept}
        for dropped in [k for k in memory if k.startswith(LOGITS) and k not in names]:
            del memory[dropped]
        return [key for key in kept if key[0] == before]

    def prepare_stored(self, step: Lesson, volume: Volume, old: Predictor) -> Mapping[str, Tensor]:
        """The old model's (C, D, H, W) float16 logits of a whole stored case."""
        limit = torch.finfo(torch.float16).max
        slabs = [z.clamp(-limit, limit).half() for _, _, z in old.logits(volume)]
        return {"logits": torch.cat(slabs, dim=1)}

    def prepare(
        self, step: Lesson, per_case: Mapping[str, Mapping[str, Tensor]], memory: Memory
    ) -> None:
        """Put the logits into memory, where they stay as long as their case."""
        made = [name for name in map(named, stored(memory)) if name in per_case]
        # the method this stands before knows nothing of stored cases
        own = {case: tensors for case, tensors in per_case.items() if case not in made}
        cast(Strategy, super()).prepare(step, own, memory)
        for name in made:
            memory[LOGITS + name] = per_case[name]["logits"]

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        """The stored cases: opened, and drawn by the session alone."""
        return {key: 0.0 for key in stored(memory) if key[0] != step.number}

    def published(self, memory: Memory) -> Memory:
        """Neither the stored cases' ids nor their logits: both are of single patients."""
        whole = cast(Strategy, super()).published(memory)
        own = (STORED, OFFERED)
        return {k: v for k, v in whole.items() if k not in own and not k.startswith(LOGITS)}

    def session(self, context: PhaseContext) -> Session | None:
        """Adds the terms on stored crops, where there are any."""
        plain = cast(Strategy, super()).session(context)
        if not stored(context.memory):
            return plain
        return StoredLogitsSession(context, plain or Session(context))

    def replayed(self) -> Mapping[str, Any]:
        """Terms on stored crops: name → function of crops, the model's output and stored logits."""
        return {"der": self.stored_logits_loss} if self.alpha else {}

    def stored_logits_loss(self, batch: Batch, new: Output, logits: Sequence[Tensor]) -> Tensor:
        """`alpha` times the mean squared difference to the stored logits, inside of the volume.

        Args:
            batch: crops of stored cases.
            new: what the model says to them.
            logits: those stored with each crop.

        Source: Buzzega et al., NeurIPS 2020, eq. 6; golden `der_segmentation_port`. Differs: see
        the head of this file.
        """
        inside = (batch.label != UNKNOWN).any(dim=1, keepdim=True)
        return self.alpha * stored_logits_mse(new.logits, logits, inside, centred=self.centred)


@dataclass(frozen=True, kw_only=True)
class Der(StoredLogits, Finetune):
    """Fine-tuning that keeps the stored logits of a few old cases."""
