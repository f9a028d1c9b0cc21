"""The rule about unlabelled voxels (255): they are treated as the strategy declares."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from clbench.nets.output import Output
from clbench.run.teach import StepState
from clbench.strategy.contract import UNKNOWN, Batch
from clbench.strategy.selective_distillation import excluded_by
from clbench.testing.fixtures import confident_output, made_batch, padded, relabel
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Broken


def unknown_voxels_are_treated_as_declared(harness: StrategyHarness) -> None:
    """255 is neither background nor organ: the whole difficulty of partly labelled data."""
    for number in (1, 2):
        state = harness.start(number)
        harness.enter(state)
        full = made_batch(state.lesson, pseudo=bool(state.pseudo))
        new, old = harness.answers(state, full)
        probe = _Probe(
            state,
            full,
            confident_output(new, 1),
            None if old is None else confident_output(old, 2, constant=True),
        )
        where = f"losses without penalties, step {number}"

        _, grad = probe.at(padded(full).label)
        if bool(grad[:, :, -4:].any()):
            raise Broken(
                "there is supervised gradient where nothing is known",
                where=f"{where}; voxels with 255 in every structure, such as padding",
                expected="exactly 0",
                got=f"up to {float(grad[:, :, -4:].abs().max()):.3g}",
                next_step="leave voxels with 255 out of the loss (clbench.strategy.losses.targets)",
            )
        _new_ones_stay_unknown(probe, where)
        if number > 1:
            _old_ones_as_declared(probe, where)


class _Probe:
    """Supervised loss and its gradient in the logits, for one label after another."""

    def __init__(self, state: StepState, batch: Batch, new: Output, old: Output | None) -> None:
        self.state, self.batch, self.new, self.old = state, batch, new, old
        self.declared = state.strategy.declaration.unlabelled

    def at(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient (B, C, D, H, W)) with this label."""
        return self._sum(self._terms(label).values())

    def _sum(self, terms: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Their sum, and its gradient in the logits."""
        loss = torch.stack([torch.zeros(()), *terms]).sum()
        if not loss.requires_grad:
            return loss, torch.zeros_like(self.new.logits)
        (grad,) = torch.autograd.grad(loss, self.new.logits, allow_unused=True)
        return loss.detach(), torch.zeros_like(self.new.logits) if grad is None else grad

    def terms(self, label: Tensor) -> dict[str, Tensor]:
        """Every term that is no penalty, with this label."""
        return {name: value.detach() for name, value in self._terms(label).items()}

    def pushed_down(self, structures: list[int], term: str | None = None) -> bool | None:
        """Whether an unannotated structure is pushed down where no other structure is.

        Args:
            structures: those with 255 in the second case.
            term: of this term; None: of the whole supervised loss.

        Returns:
            None where channels are neither one per structure nor background and those.
        """
        label = self.filled(structures, UNKNOWN)
        first = self.new.logits.shape[1] - len(self.batch.structures)
        if first not in (0, 1):
            return None
        others = [k for k in range(len(self.batch.structures)) if k not in structures]
        nowhere = (label[1, others] == 0).all(dim=0)
        _, grad = self._sum(v for k, v in self._terms(label).items() if term in (None, k))
        channels = [first + k for k in structures]
        return bool((grad[1, channels][:, nowhere] > 0).any())

    def takes_for_background(self, structures: list[int]) -> list[str]:
        """Terms to which 255 in these structures is 0, and which push them down there."""
        as_is, as_zero, as_known = (
            self.terms(label)
            for label in (
                self.filled(structures, UNKNOWN), self.filled(structures, 0), self.batch.label
            )
        )  # fmt: skip
        return [
            name
            for name in as_zero
            if torch.equal(as_is[name], as_zero[name])
            and not torch.equal(as_zero[name], as_known[name])
            and self.pushed_down(structures, name)
        ]

    def _terms(self, label: Tensor) -> dict[str, Tensor]:
        strategy, memory = self.state.strategy, copy.deepcopy(self.state.memory)
        terms = strategy.losses(relabel(self.batch, label), self.new, self.old, memory)
        return {k: v.float() for k, v in terms.items() if k not in strategy.declaration.penalties}

    def teacher_labels(self, label: Tensor, channels: list[int]) -> bool:
        """Whether all that teaches these channels of the second case is the old model's answer.

        Then another answer pulls every voxel of theirs elsewhere; what pulled all of them to
        background would go on doing so.
        """
        if self.old is None:
            return False
        spoken_for = self.excluded(label, channels)
        teacher, grads = self.old, []
        for sign in (1.0, -1.0):
            self.old = replace(teacher, logits=sign * 30.0 * torch.ones_like(teacher.logits))
            grads.append(self.at(label)[1][1, channels].masked_fill(spoken_for, 0.0))
        self.old = teacher
        return bool((grads[0] <= 0).all() and (grads[0] < 0).any() and (grads[1] >= 0).all())

    def excluded(self, label: Tensor, channels: list[int]) -> Tensor:
        """(channels, D, H, W) bool: where the second case shows a rival of theirs."""
        present = label[1] == 1
        rivals = excluded_by(self.batch.structures, self.batch.new_index)
        return torch.stack([present[rivals[k]].any(dim=0) for k in channels])

    def filled(self, channels: list[int], value: int) -> Tensor:
        """The full label with one value in these structures of the second case."""
        label = self.batch.label.clone()
        label[1, channels] = value
        return label


def _new_ones_stay_unknown(probe: _Probe, where: str) -> None:
    """A structure that this very step teaches is never background where it is not annotated."""
    new = probe.batch.taught_index[:1]
    if len(probe.batch.structures) == 1:
        return
    (as_is, grad), (as_zero, _) = (probe.at(probe.filled(new, v)) for v in (UNKNOWN, 0))
    name = probe.batch.structures[new[0]]
    if torch.equal(as_is, as_zero) or probe.takes_for_background(new):
        raise Broken(
            "a structure that the step teaches counts as background where it is not annotated",
            where=f"{where}; {name} with 255 in one case",
            expected="another loss than with 0",
            got=_which(probe, new, as_is),
            next_step="no declaration allows it: 'background' speaks of the other structures only, "
            "and an option that does it on purpose fails here on purpose",
        )
    if grad.shape[1] == len(probe.batch.structures) and bool(grad[1, new].any()):
        raise Broken(
            "there is supervised gradient where nothing is known",
            where=f"{where}; channel of {name}, with 255 in this case",
            expected="exactly 0",
            got=f"up to {float(grad[1, new].abs().max()):.3g}",
        )


def _old_ones_as_declared(probe: _Probe, where: str) -> None:
    old = probe.batch.untaught_index  # those taught again are left out, whatever is declared
    if not old:
        return
    where = f"{where}; 255 in every old structure of one case"
    if probe.declared == "background":
        _become_background(probe, old, where)
        return
    (as_is, grad), (as_zero, _) = (probe.at(probe.filled(old, v)) for v in (UNKNOWN, 0))
    as_known, _ = probe.at(probe.batch.label)  # equal to both: no old label is used at all
    whole = torch.equal(as_is, as_zero) and not torch.equal(as_zero, as_known)
    if whole or probe.takes_for_background(old):
        raise Broken(
            "old structures without annotation count as background",
            where=where,
            expected="another loss than with 0: 'ignore' is declared",
            got=_which(probe, old, as_is),
            next_step="declare unlabelled = 'background', or leave these voxels out",
        )
    if grad.shape[1] != len(probe.batch.structures) or not bool(grad[1, old].any()):
        return
    if not probe.teacher_labels(probe.filled(old, UNKNOWN), old):
        raise Broken(
            "there is supervised gradient where nothing is known",
            where=f"{where}, in their channels",
            expected="exactly 0",
            got=f"up to {float(grad[1, old].abs().max()):.3g}",
        )


def _which(probe: _Probe, structures: list[int], loss: Tensor) -> str:
    """Terms that take 255 for 0, or the loss that is the same with both."""
    named = probe.takes_for_background(structures)
    return f"the same {', '.join(named)}" if named else f"{float(loss):.7g} twice"


def _become_background(probe: _Probe, old: list[int], where: str) -> None:
    """Some term that looks at old labels takes 255 for 0; others may leave such structures out.

    And they are pushed down where nothing else is, whatever the terms are made of: a Dice whose
    target is empty has no gradient, so alone it makes nothing background.
    """
    as_is, as_zero, as_known = (
        probe.terms(label)
        for label in (probe.filled(old, UNKNOWN), probe.filled(old, 0), probe.batch.label)
    )
    looks = [name for name in as_zero if not torch.equal(as_zero[name], as_known[name])]
    pushed = probe.pushed_down(old)
    if pushed and not looks:
        return
    alike = any(torch.allclose(as_is[name], as_zero[name], 1e-5) for name in looks)
    if not alike or pushed is False:
        raise Broken(
            "old structures without annotation do not count as background",
            where=where,
            expected="a term with the value it has for 0: 'background' is declared; "
            + ", ".join(f"{name} {float(as_zero[name]):.7g}" for name in looks),
            got=", ".join(f"{name} {float(as_is[name]):.7g}" for name in looks),
            next_step="declare unlabelled = 'ignore', or treat them as declared",
        )
