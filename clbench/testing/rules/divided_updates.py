"""The rule about updates in parts: accumulated batches and several processes give one gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.reproducibility import reseed, seeded
from clbench.run.teach import StepState
from clbench.strategy.contract import UNKNOWN, Batch, Session
from clbench.testing.fixtures import made_batch, perturb, relabel
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Limit
from clbench.training.loop import sum_terms
from clbench.training.ranks import Ranks
from clbench.training.update import Division, UpdateWork, refuse_misses

TOLERANCE = 1e-3
"""Largest difference of two gradients, in units of the norm of one. Rounding stays below 1e-5;
a count of a part in place of that of the whole batch makes several hundredths and more."""


def gradients_of_parts_add_up(harness: StrategyHarness) -> None:
    """A loss that divides by counts of its own learns otherwise by accumulated batches."""
    where = "step 2, two crops of which one knows little: at once, and as two accumulated batches"
    state = harness.start(2)
    groups = harness.enter(state)
    perturb(state.model)
    trained = [p for group in groups for p in group.parameters]
    batch = _unevenly_known(harness.crops(state), made_batch(state.lesson).label)
    try:
        whole, parts = (_gradient(harness, state, batch, trained, passes) for passes in (1, 2))
    except TrainingError as err:
        raise Limit(
            "an update cannot be computed in parts",
            where=where,
            expected=err.expected,
            got=err.what,
            next_step=err.next_step,
        ) from err
    gap, size = float((whole - parts).norm()), float(whole.norm())
    if gap > TOLERANCE * size:
        raise Limit(
            "the gradient of an update in parts is not that of the update",
            where=where,
            expected=f"a difference of at most {TOLERANCE:g} of its norm",
            got=f"{gap / max(size, 1e-30):.3g}",
            next_step="divide what is summed over a batch by "
            "clbench.strategy.sharding.denominator(count), and take a Dice per crop; as it stands, "
            "scores depend on train.accumulate and on the number of processes",
        )


def _gradient(
    harness: StrategyHarness,
    state: StepState,
    batch: Batch,
    trained: Sequence[nn.Parameter],
    passes: int,
) -> Tensor:
    """(weights trained,) the gradient of one update.

    Args:
        harness: makes the session of a phase.
        state: of the step, before its first update; left as it was, but for gradients.
        batch: the crops of the update.
        trained: the parameters of all groups.
        passes: in which the update is computed, as `train.accumulate` asks for.

    Raises:
        TrainingError: the losses cannot be computed in parts.
    """
    memory = copy.deepcopy(state.memory)
    for p in trained:
        p.grad = None
    with seeded(0):
        session = harness.session(replace(state, memory=memory), batch)
        drawn = next(session.batches(iter([batch])))
        work = UpdateWork(
            session=session,
            division=Division(crops=len(batch.cases), passes=passes, ranks=Ranks()),
            whole=type(session).batches is not Session.batches,
            trained=trained,
            autocast=nullcontext,
            scaled=lambda loss: loss,
        )
        reseed("update")
        update = work.gradients(drawn, partial(sum_terms, where="step 2"), partial(reseed, "parts"))
    if update.misses is not None:
        refuse_misses(float(update.misses), "step 2")
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in trained)
    return torch.cat([grad.ravel() for grad in grads])


def _unevenly_known(batch: Batch, label: Tensor) -> Batch:
    """One crop as labelled; of the other two slices are known, in which there is no structure.

    Args:
        batch: images and pseudo labels of two crops.
        label: theirs, in which every structure is annotated.
    """
    label = label.clone()
    label[1] = UNKNOWN
    label[1, :, :2] = 0
    return relabel(batch, label)
