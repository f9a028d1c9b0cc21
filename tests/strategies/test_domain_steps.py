"""Steps that teach old structures again from another source, alone or beside new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clbench.run.plan import load_strategy
from clbench.run.teach import StepState
from clbench.strategy import UNKNOWN, Batch
from clbench.strategy.losses import targets
from clbench.testing import harness as kit
from clbench.testing.fixtures import reproducible

DOMAIN, BOTH = 2, 3
"""Steps: the liver again from another source; the liver again, and its tumors."""
Rig = Callable[[str], kit.StrategyHarness]


@pytest.fixture
def rig(cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A strategy on a tiny course with such steps."""
    course = kit.tiny_course()
    organs, tumor, _ = course.steps
    domain = replace(tumor, name="domain", learns=(), again=("liver",), shows=("liver",))
    both = replace(tumor, again=("liver",))
    taught = replace(course, steps=(organs, domain, both))
    monkeypatch.setattr(kit, "tiny_course", lambda: taught)
    return lambda name: kit.StrategyHarness(
        load_strategy(name, {}), name=name, folder=tmp_path, cache=cache_root
    )


def first_terms(rig: kit.StrategyHarness, number: int) -> tuple[StepState, Batch, dict[str, float]]:
    """The state in which a step begins, its first crops and their loss; all of it has gradients."""
    state = rig.start(number)
    rig.enter(state)
    batch = rig.crops(state)
    terms = rig.terms(state, batch)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().sum() > 0 for g in grads)
    return state, batch, {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize(
    "name", ["plop", "universal+plop", "plop_ct", "ilt_ct", "mbs", "der", "vista_finetune"]
)
def test_a_step_that_teaches_old_structures_again_is_taught(rig: Rig, name: str) -> None:
    with reproducible():
        harness = rig(name)
        for number in (DOMAIN, BOTH):
            first_terms(harness, number)
    assert harness.events[DOMAIN]


def test_vista_teaches_what_the_step_teaches_and_nothing_else(rig: Rig) -> None:
    """The gradient of the logits tells: the liver in both steps, the tumor in its own alone."""
    with reproducible():
        harness = rig("vista_finetune")
        for number, taught in ((DOMAIN, {"liver"}), (BOTH, {"liver", "liver_tumor"})):
            state = harness.start(number)
            batch = harness.crops(state)
            output = state.model(batch.image)
            output.logits.retain_grad()
            terms = state.strategy.losses(batch, output, None, state.memory)
            torch.stack(list(terms.values())).sum().backward()
            assert output.logits.grad is not None
            moved = output.logits.grad.abs().flatten(2).sum(dim=(0, 2)) > 0
            assert {n for n, m in zip(batch.structures, moved.tolist(), strict=True) if m} == taught


def test_mbs_has_no_angle_where_no_class_is_new(rig: Rig) -> None:
    with reproducible():
        harness = rig("mbs")
        assert first_terms(harness, DOMAIN)[2]["orthogonal"] == 0
        assert first_terms(harness, BOTH)[2]["orthogonal"] > 0


def test_ders_cases_are_those_of_every_step_before(rig: Rig) -> None:
    with reproducible():
        state = rig("der").start(BOTH)
    kept = state.memory["der_stored"]
    assert isinstance(kept, list)
    assert {entry[0] for entry in kept} == {1, DOMAIN}


@pytest.mark.parametrize("name", ["softmax_finetune", "universal"])
def test_pseudo_labels_do_not_take_the_place_of_what_a_step_teaches_again(name: str) -> None:
    """`annotated_old=pseudo` is for structures that the new data happens to annotate."""
    batch = Batch(
        image=torch.zeros(1, 1, 1, 1, 2),
        label=torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8).view(1, 2, 1, 1, 2),
        pseudo=torch.tensor([[254, 254], [254, 254]], dtype=torch.uint8).view(1, 2, 1, 1, 2),
        structures=("spleen", "liver"),
        new=(False, False),
        again=("liver",),
        cases=("2/a",),
    )
    if name == "universal":
        target, _ = targets(batch, annotated_old="pseudo")
        assert target.flatten().tolist() == [1, 1, 0, 1]
    else:
        method = load_strategy(name, {"annotated_old": "pseudo"})
        assert method.seen(batch).label.flatten().tolist() == [UNKNOWN, UNKNOWN, 0, 1]
