"""Rules about hooks: a step can be taught, and no hook leaves traces or depends on chance."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from clbench.reproducibility import seeded
from clbench.run.teach import StepState
from clbench.testing.fixtures import first_difference, perturb, same
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Broken


def a_step_can_be_taught(harness: StrategyHarness) -> None:
    """Three steps through the real loop: every hook is called as a run would call it."""
    for number in (1, 2, 3):
        harness.memory_after(number)
        phases: list[list[dict[str, Any]]] = []
        for event in harness.events[number]:
            if event["event"] == "update":
                if (event["epoch"], event["iteration"]) == (0, 0) or not phases:
                    phases.append([])
                phases[-1].append(event)
        taught = harness.teaches(number).next_phase(
            harness.lesson(number), harness.memory_before(number), ()
        )
        if taught is not None and not phases:
            raise Broken("a step was taught without an update", where=f"step {number}")
        for updates in phases:
            if len(updates) != updates[0]["of"]:
                raise Broken(
                    "updates of a phase are missing",
                    where=f"step {number}, phase {updates[0]['phase']}",
                    expected=f"{updates[0]['of']} updates",
                    got=len(updates),
                    next_step="yield every batch of the phase in the session's batches",
                )


def hooks_leave_the_strategy_as_it_was(harness: StrategyHarness) -> None:
    """What is written on the strategy is in no checkpoint: a resumed run would go on without it."""
    for number in (1, 2, 3):
        state = harness.end(number)
        state.strategy.serve(state.model, state.memory)
    now = harness.traits()
    if not same(now, harness.before):
        raise _changed(harness.before, now)
    if (changed := harness.modules_before.changed()) is not None:
        name, value = changed
        raise Broken(
            "a run changed what a module of the strategy holds",
            where=name,
            expected="as it was before: a run that is resumed in a new process goes on without it",
            got=_briefly(value),
            next_step="keep what changes in memory, which every hook is given; compute a table "
            "that never changes when the module is loaded",
        )


def _briefly(value: Any) -> str:
    """A value that may be images, in a few words."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} of shape {tuple(value.shape)}"
    return f"{kind} of {len(value)}" if isinstance(value, Sized) else reprlib.repr(value)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Broken:
    """Says which attribute was added, taken away or set anew."""
    what = first_difference(now, before)
    expected, got = f"as it was built: {before.get(what)!r}", f"{now.get(what)!r}"
    if set(now) != set(before):
        what = ", ".join(sorted(set(now) ^ set(before)))
        expected = "the attributes it was built with, and no other"
        parts = [f"{name} = {now[name]!r} was added" for name in sorted(set(now) - set(before))]
        parts += [f"{name} was taken away" for name in sorted(set(before) - set(now))]
        got = ", ".join(parts)
    return Broken(
        "a hook changed the strategy",
        where=what,
        expected=expected,
        got=got,
        next_step="keep what changes in memory; every hook is given it",
    )


def hooks_repeat_to_the_bit(harness: StrategyHarness) -> None:
    """A run must repeat and resume exactly; a hook may draw from kit.generator alone."""
    for number in (1, 2):
        for name, hook in _hooks(harness, number):
            results = []
            for seed in (1, 2):
                with seeded(seed):
                    results.append(hook())
            if not same(*results):
                raise Broken(
                    f"{name}, called twice from one checkpoint, gives two results",
                    where=f"step {number}; differs in {first_difference(*results)}",
                    expected="equal bits, whatever the global random state is",
                    next_step="draw from kit.generator or kit.fresh, and iterate over no set",
                )


Hook = Callable[[], dict[str, Any]]


def _hooks(harness: StrategyHarness, number: int) -> Iterator[tuple[str, Hook]]:
    """Name → the hook called, on a state of its own; what it returns and what it leaves behind."""
    kit = harness.plan.kit

    def at_start(hook: Callable[[StepState], dict[str, Any]]) -> Hook:
        return lambda: hook(harness.start(number))

    def traces(state: StepState, **result: Any) -> dict[str, Any]:
        return {**result, "model": dict(state.model.state_dict()), "memory": state.memory}

    def build() -> dict[str, Any]:
        return dict(harness.teaches(number).build(kit, harness.lesson(1)).state_dict())

    def grow() -> dict[str, Any]:
        before = harness.end(number - 1)
        harness.teaches(number).grow(before.model, kit, harness.lesson(number))
        return dict(before.model.state_dict())

    def prepare_case(state: StepState) -> dict[str, Any]:
        return traces(state, **harness.prepared(state, state.lesson.cases[0]))

    def prepare(state: StepState) -> dict[str, Any]:
        prepared = {case: harness.prepared(state, case) for case in state.lesson.cases}
        rest = {
            case: {k: v for k, v in of_case.items() if k != "pseudo"}
            for case, of_case in prepared.items()
        }
        state.strategy.prepare(state.lesson, rest, state.memory)
        return traces(state)

    def plans(state: StepState) -> dict[str, Any]:
        groups = harness.enter(state)
        place = {id(p): name for name, p in state.model.named_parameters()}
        return traces(
            state,
            extra_cases=dict(state.strategy.extra_cases(state.lesson, state.memory)),
            groups=[([place.get(id(p), "?") for p in g.parameters], g.lr) for g in groups],
        )

    def answers(state: StepState) -> dict[str, Any]:
        strategy, lesson = state.strategy, state.lesson
        logits = harness.answers(state, harness.crops(state))[0].logits.detach()
        return traces(
            state,
            decode=strategy.decode(logits, lesson.structures),
            takes_teacher=strategy.takes_teacher(lesson),
            prepares=strategy.prepares(lesson),
            prunes=strategy.prunes(state.model),
            first_step=repr(strategy.first_step()),
        )

    def losses(state: StepState) -> dict[str, Any]:
        state.model.train()
        perturb(state.model)  # a penalty must have something to say
        batch = harness.crops(state)
        new, old = harness.answers(state, batch)
        before = copy.deepcopy((batch.image, batch.label, batch.pseudo))
        terms = state.strategy.losses(batch, new, old, state.memory)
        if not same(before, (batch.image, batch.label, batch.pseudo)):
            raise Broken("losses changes the batch it is given", where=f"step {number}")
        return {**{f"term {k}": v.detach() for k, v in terms.items()}, "memory": state.memory}

    def updates(state: StepState) -> dict[str, Any]:
        harness.enter(state)
        rng = torch.Generator().manual_seed(0)
        for p in state.model.parameters():
            p.grad = torch.randn(p.shape, generator=rng) if p.requires_grad else None
        state.strategy.after_backward(state.model, state.memory)
        grads = {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}
        state.strategy.after_update(state.model, state.memory)
        return traces(state, **grads)

    def finish(state: StepState) -> dict[str, Any]:
        harness.enter(state)
        state.strategy.finish(
            state.lesson,
            state.model,
            lambda count: (harness.crops(state, i) for i in range(count)),
            state.memory,
        )
        return traces(state)

    def axial_ranges(state: StepState) -> dict[str, Any]:
        volume = harness.plan.catalog.open(number, state.lesson.cases[0], "train")
        server = harness.predictor(state, state.model, state.lesson.structures)
        return traces(state, ranges=dict(server.ranges(volume)))

    def serve() -> dict[str, Any]:
        state = harness.end(number)
        return dict(state.strategy.serve(state.model, state.memory).state_dict())

    yield "build", build
    if number > 1:
        yield "grow", grow
    if harness.teaches(number).prepares(harness.lesson(number)):
        yield "prepare_case", at_start(prepare_case)
        yield "prepare", at_start(prepare)
    yield "extra_cases, next_phase, enter_phase or groups", at_start(plans)
    yield "decode, takes_teacher, prepares, prunes or first_step", at_start(answers)
    yield "losses", at_start(losses)
    yield "after_backward or after_update", at_start(updates)
    yield "finish", at_start(finish)
    yield "axial_ranges", at_start(axial_ranges)
    yield "serve", serve


def serving_leaves_the_model_as_it_was(harness: StrategyHarness) -> None:
    """A run goes on with the model it trained; a resumed one loads it before it was served."""
    for number in (1, 2):
        state = harness.end(number)
        before = copy.deepcopy(dict(state.model.state_dict()))
        memory = copy.deepcopy(state.memory)
        served = state.strategy.serve(state.model, state.memory)
        if not isinstance(served, nn.Module):
            raise Broken("serve returns no torch module", got=type(served).__name__)
        now = dict(state.model.state_dict())
        if not (same(before, now) and same(memory, state.memory)):
            raise Broken(
                "serve changed the model or the memory",
                where=f"after step {number}: {first_difference(before, now)}",
                expected="the trained model and the memory as they were",
                next_step="change a copy: copy.deepcopy(model)",
            )
