"""Rules about losses and gradients: penalties, the teacher, unknown voxels, what may be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from clbench.data.labels import PSEUDO_SCALE
from clbench.nets.output import Output
from clbench.run.teach import StepState
from clbench.strategy.contract import UNKNOWN, Batch
from clbench.testing.fixtures import (
    confident_output,
    first_difference,
    made_batch,
    padded,
    perturb,
    relabel,
    same,
)
from clbench.testing.harness import StrategyHarness, describe
from clbench.testing.report import Broken, Exempt

# ------------------------------------------------------------------------------------- step 1


def step_1_equals_its_first_step(harness: StrategyHarness) -> None:
    """Step 1 is taught once, by first_step(), and shared: a method must start as it says."""
    first, own = harness.first, harness.strategy
    lesson = harness.lesson(1)
    where = f"first_step() = {describe(first)}"
    if not same_method(first.first_step(), first):
        raise Broken(
            "first_step() has another first_step()", where=where, got=describe(first.first_step())
        )
    one, two = (s.build(harness.plan.kit, lesson) for s in (first, own))
    if not same(dict(one.state_dict()), dict(two.state_dict())):
        raise Broken(
            "build makes another model than that of first_step()",
            where=f"{where}; differs in {first_difference(one.state_dict(), two.state_dict())}",
            expected="the same names and the same initial weights",
        )
    if same_method(first, own):
        return
    ends = []
    for strategy in (first, own):
        state = harness.start(1)
        state.strategy = strategy
        for batch in (harness.crops(state), *_partial(made_batch(lesson))):
            state.model.train()
            new, _ = harness.answers(state, batch)
            leaf = replace(new, logits=new.logits.detach().requires_grad_(True))
            total = _total(strategy.losses(batch, leaf, None, copy.deepcopy(state.memory)))
            ends.append((total.detach(), torch.autograd.grad(total, leaf.logits)[0]))
    half = len(ends) // 2
    for (loss, grad), (own_loss, own_grad) in zip(ends[:half], ends[half:], strict=True):
        if not (torch.allclose(loss, own_loss, 1e-6, 1e-7) and torch.allclose(grad, own_grad)):
            raise Broken(
                "the loss of step 1 is not that of first_step()",
                where=where,
                expected=f"{float(loss):.7g}, and its gradient",
                got=f"{float(own_loss):.7g}",
                next_step="name the strategy whose step 1 this one equals, or return self",
            )
    states = []
    for strategy in (first, own):
        state = harness.start(1)
        state.strategy = strategy
        harness.teach(state)
        states.append(state)
    if not same(states[0].memory, states[1].memory):
        raise Broken(
            "step 1 leaves another memory than first_step() does",
            where=f"{where}; differs in {first_difference(states[0].memory, states[1].memory)}",
            expected="what first_step() leaves: it is all that step 2 will find",
            got=f"{', '.join(states[1].memory) or 'nothing'}",
            next_step="return self from first_step(), or a strategy that remembers the same",
        )
    if not same(dict(states[0].model.state_dict()), dict(states[1].model.state_dict())):
        raise Broken(
            "step 1 trains other weights than first_step() does",
            where=where,
            next_step="the two differ in groups, phases, after_backward or after_update",
        )


def same_method(a: object, b: object) -> bool:
    """Same class, same hyperparameters."""
    return type(a) is type(b) and a == b


def _total(terms: dict[str, Tensor]) -> Tensor:
    if not terms:
        raise Broken("losses returned no term", where="losses")
    return torch.stack([v.float() for v in terms.values()]).sum()


def _partial(batch: Batch) -> Iterator[Batch]:
    """The batch; one with a structure less in its second case; one with padding."""
    yield batch
    label = batch.label.clone()
    label[1, 0] = UNKNOWN
    yield relabel(batch, label)
    yield padded(relabel(batch, label))


# ------------------------------------------------------------------------------------ penalties


def declared_penalties_have_gradients(harness: StrategyHarness) -> None:
    """A penalty that is zero, or has no gradient, looks like a method and is fine-tuning."""
    if not harness.strategy.declaration.penalties:
        raise Exempt("no penalty is declared")
    for number in (2, 3):
        state = harness.start(number)
        harness.enter(state)
        perturb(state.model)
        terms = harness.terms(state, harness.crops(state))
        weights = [p for p in state.model.parameters() if p.requires_grad]
        for name in state.strategy.declaration.penalties:
            where = f"losses, step {number}, weights moved by a fixed perturbation"
            if name not in terms:
                raise Broken(
                    f"the declared penalty {name!r} is not among the loss terms",
                    where=where,
                    expected=", ".join(state.strategy.declaration.penalties),
                    got=", ".join(terms),
                    next_step="return it by this name, or do not declare it",
                )
            value = terms[name]
            if not float(value.detach()) > 0:
                raise Broken(
                    f"the penalty {name!r} is not above zero",
                    where=where,
                    expected="above zero: the new model differs from the old one",
                    got=float(value.detach()),
                    next_step="is the teacher's answer used, and its order of channels?",
                )
            grads: tuple[Tensor | None, ...] = (None,)
            if value.requires_grad:
                grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            if not any(g is not None and bool(g.any()) for g in grads):
                raise Broken(
                    f"the penalty {name!r} has no gradient",
                    where=where,
                    expected="a gradient in the trained parameters",
                    next_step="something on its way is detached",
                )


# -------------------------------------------------------------------------------------- teacher


def _with_teacher(harness: StrategyHarness) -> tuple[StepState, Batch, Output, Output]:
    """Step 2 with a batch, and what model and teacher answer to it."""
    state = harness.start(2)
    harness.enter(state)
    perturb(state.model)
    batch = harness.crops(state)
    new, old = harness.answers(state, batch)
    if old is None:
        raise Exempt("no teacher is taken (takes_teacher)")
    return state, batch, new, old


def the_teacher_stays_without_gradient(harness: StrategyHarness) -> None:
    """A teacher that moves with its student teaches nothing."""
    state, batch, new, old = _with_teacher(harness)
    teacher = cast(nn.Module, state.teacher)  # it answered
    answers = {"logits": old.logits, **old.features}
    before = copy.deepcopy(answers)
    weights = copy.deepcopy(dict(teacher.state_dict()))
    total = _total(state.strategy.losses(batch, new, old, state.memory))
    moved = [name for name, a in answers.items() if a.requires_grad or a.grad_fn is not None]
    if moved:
        raise Broken(
            "losses makes the teacher's answer take a gradient",
            where=f"old.{moved[0]}, step 2",
            expected="used as it comes: a constant",
        )
    if not same(before, answers):
        raise Broken(
            "losses changes the teacher's answer",
            where=f"old.{first_difference(before, answers)}, step 2",
            expected="an operation that is not in place",
        )
    total.backward()  # type: ignore[no-untyped-call]  # torch
    with_grad = [n for n, p in teacher.named_parameters() if p.grad is not None]
    if with_grad or not same(weights, dict(teacher.state_dict())):
        raise Broken("the teacher's weights took a gradient", where=", ".join(with_grad[:3]))


def the_teacher_is_used(harness: StrategyHarness) -> None:
    """A forward pass of the old model on every batch for nothing, or a penalty that forgot it."""
    state, batch, new, old = _with_teacher(harness)
    values = []
    for seed in (1, 2):
        other, memory = confident_output(old, seed, constant=True), copy.deepcopy(state.memory)
        values.append(float(_total(state.strategy.losses(batch, new, other, memory)).detach()))
    if values[0] == values[1]:
        raise Broken(
            "another answer of the teacher gives the same loss",
            where="losses, step 2",
            expected="a loss that depends on the old model, or takes_teacher = False",
            got=f"{values[0]:.7g} twice",
        )


# -------------------------------------------------------------------------------- finite, groups


def losses_are_finite_on_empty_and_full_masks(harness: StrategyHarness) -> None:
    """Most crops lack most organs: 0/0 would come up in the first minute of a long run."""
    _finite(harness.start(1), harness)


def losses_of_later_steps_are_finite_too(harness: StrategyHarness) -> None:
    """The same with a teacher, pseudo labels and penalties."""
    _finite(harness.start(2), harness)


def _finite(state: StepState, harness: StrategyHarness) -> None:
    harness.enter(state)
    batch = made_batch(state.lesson, pseudo=bool(state.pseudo))
    label, pseudo = batch.label, batch.pseudo
    cases = {"full": torch.ones_like(label), "empty": torch.zeros_like(label),
             "unknown": torch.full_like(label, UNKNOWN), "mixed": label}  # fmt: skip
    new, old = harness.answers(state, batch)
    for name, masks in cases.items():
        for p in (None,) if pseudo is None else (pseudo, pseudo * 0, pseudo * 0 + PSEUDO_SCALE):
            for scale in (1.0, 100.0):
                logits = (scale * new.logits.detach()).requires_grad_(True)
                terms = state.strategy.losses(
                    replace(batch, label=masks, pseudo=p), replace(new, logits=logits), old,
                    copy.deepcopy(state.memory),
                )  # fmt: skip
                where = f"losses, step {state.lesson.number}, masks {name}, logits times {scale:g}"
                for term, value in terms.items():
                    if not bool(torch.isfinite(value).all()):
                        raise Broken(
                            f"the loss term {term!r} is not finite",
                            where=where,
                            got=float(value.detach()),
                            next_step="a 1 in the denominator, or a clamp, where sums may be 0",
                        )
                total = _total(terms)
                grad = None
                if total.requires_grad:
                    (grad,) = torch.autograd.grad(
                        total, logits, allow_unused=True, retain_graph=True
                    )
                if grad is not None and not bool(torch.isfinite(grad).all()):
                    raise Broken("the gradient of the loss is not finite", where=where)


def gradient_stays_in_the_declared_groups(harness: StrategyHarness) -> None:
    """What is frozen on paper must not move, and what moves must be in the checkpoint."""
    for number in (1, 2):
        state = harness.start(number)
        groups = harness.enter(state)
        named = {id(p): n for n, p in state.model.named_parameters()}
        inside = [id(p) for g in groups for p in g.parameters]
        where = f"groups, step {number}"
        if not inside:
            raise Broken("no parameter is trained", where=where)
        if foreign := [i for i in inside if i not in named]:
            raise Broken(
                f"{len(foreign)} parameters of the groups do not belong to the model",
                where=where,
                expected="parameters of the model: only those are saved",
            )
        fixed = {n for n, p in harness.blank(number).named_parameters() if not p.requires_grad}
        if marked := [named[i] for i in inside if named[i] in fixed]:
            raise Broken(
                "a parameter that build or grow marks as fixed is trained",
                where=f"{where}: {', '.join(marked[:3])}",
                expected="requires_grad = False to stay out of the groups",
                next_step="register it as a buffer, or leave it out of groups",
            )
        if len(set(inside)) < len(inside):
            raise Broken("a parameter stands in two groups", where=where)
        outside = {n: p for n, p in state.model.named_parameters() if id(p) not in set(inside)}
        frozen = {n: p.detach().clone() for n, p in outside.items()}
        optimizer = torch.optim.AdamW([{"params": g.parameters, "lr": 1e-3} for g in groups])
        for index in (0, 1):
            batch = harness.crops(state, index)
            new, old = harness.answers(state, batch)
            optimizer.zero_grad(set_to_none=True)
            _total(state.strategy.losses(batch, new, old, state.memory)).backward()  # type: ignore[no-untyped-call]  # torch
            state.strategy.after_backward(state.model, state.memory)
            reached = [n for n, p in outside.items() if p.grad is not None and bool(p.grad.any())]
            if reached:
                raise Broken(
                    "gradient reaches parameters outside the groups",
                    where=f"{where}, update {index + 1}: {', '.join(reached[:3])}",
                    expected=f"gradient in {len(inside)} declared parameters only",
                    next_step="put them in a group, or do not switch requires_grad on",
                )
            optimizer.step()
            state.strategy.after_update(state.model, state.memory)
            moved = [n for n, p in outside.items() if not same(p.detach(), frozen[n])]
            if moved:
                raise Broken(
                    "parameters outside the groups were changed",
                    where=f"after_update, step {number}: {', '.join(moved[:3])}",
                    expected="frozen parameters to stay as they are",
                    next_step="put them in a group, or leave them alone",
                )
