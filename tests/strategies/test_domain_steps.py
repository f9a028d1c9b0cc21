"""Steps that teach old structures again from another source, alone or beside new ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clbench.nets.output import Output
from clbench.run.plan import load_strategy
from clbench.run.teach import StepState
from clbench.strategy import UNKNOWN, Batch
from clbench.strategy.losses import dice, targets
from clbench.testing import harness as kit
from clbench.testing.fixtures import reproducible
from clbench.testing.rules import unknown_labels

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


@pytest.mark.parametrize("name", ["finetune", "universal", "softmax_finetune"])
def test_the_kits_rule_of_unknown_labels_holds_where_structures_are_taught_again(
    rig: Rig, name: str
) -> None:
    with reproducible():
        unknown_labels.unknown_voxels_are_treated_as_declared(rig(name))


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


def only_again(label: list[list[int]], pseudo: list[list[int]] | None) -> Batch:
    """Voxels of one case of a step that only teaches the liver again; each list is a structure."""

    def shaped(rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.uint8)[None, :, None, None]

    return Batch(
        image=torch.zeros(1, 1, 1, 1, len(label[0])),
        label=shaped(label),
        pseudo=None if pseudo is None else shaped(pseudo),
        structures=("spleen", "liver"),
        new=(False, False),
        again=("liver",),
        cases=("2/a",),
    )


@pytest.mark.parametrize(("head", "channels"), [("softmax", 3), ("sigmoid", 2)])
def test_the_authors_lwf_obeys_its_options_where_nothing_is_new(head: str, channels: int) -> None:
    """A step without new structures is no first step: what options say of old ones holds."""
    pseudo = [[254, 0, 0], [0, 0, 254]]
    shown, hidden = (
        only_again([spleen, [0, 1, 0]], pseudo) for spleen in ([0, 0, 1], [255, 255, 255])
    )
    new = Output(logits=torch.linspace(-1, 2, 3 * channels).view(1, channels, 1, 1, 3))

    def losses(word: str, batch: Batch) -> dict[str, float]:
        made = load_strategy("lwf_ct", {"head": head, "annotated_old": word})
        return {n: v.item() for n, v in made.losses(batch, new, None, {}).items()}

    assert losses("pseudo", shown) == losses("annotation", hidden) != losses("annotation", shown)
    assert all("new" not in name for name in losses("pseudo", shown))


def test_the_shifted_dice_is_of_every_structure_that_is_taught() -> None:
    """The pancreas (id 11) is taught again beside the stomach (7); aorta (8) and adrenal (12)."""
    names = ("aorta", "right_adrenal_gland", "pancreas", "stomach")
    label = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=torch.uint8)
    batch = Batch(
        image=torch.zeros(1, 1, 1, 1, 2),
        label=label[None, :, None, None],
        pseudo=None,
        structures=names,
        new=(False, False, False, True),
        again=("pancreas",),
        cases=("2/a",),
    )
    logits = torch.linspace(-1, 2, 10).view(1, 5, 1, 1, 2)
    out = Output(logits=logits, features={"bottleneck": torch.zeros(1, 1, 1, 1, 1)})
    made = load_strategy("ilt_ct", {"legacy_shifted_dice": "true"})
    found = made.losses(batch, out, out, {})["dice_new"]
    following = batch.label[:, [names.index("right_adrenal_gland"), names.index("aorta")]]
    assert found.item() == pytest.approx(dice(logits[:, 3:], following.float()).item())


@pytest.mark.parametrize("name", ["finetune", "softmax_finetune", "lwf", "ilt"])
def test_what_is_taught_again_is_no_background_where_a_case_does_not_annotate_it(name: str) -> None:
    made = load_strategy(name, {})
    assert made.unlabelled == "background"
    old = Output(logits=torch.zeros(1, 3, 1, 1, 2), features={})

    def pushed_down(batch: Batch) -> list[bool]:
        """Spleen and liver."""
        first = 0 if name == "finetune" else 1
        logits = torch.zeros(1, first + 2, 1, 1, 2).requires_grad_()
        features = {"bottleneck": torch.zeros(1, 1, 1, 1, 1)}
        terms = made.losses(batch, Output(logits=logits, features=features),
                            replace(old, features=features), {})  # fmt: skip
        own = [v for n, v in terms.items() if n not in made.declaration.penalties]
        (grad,) = torch.autograd.grad(torch.stack(own).sum(), logits)
        return [bool((grad[0, first + k] > 0).any()) for k in range(2)]

    assert pushed_down(only_again([[255, 255], [0, 0]], None)) == [True, True]
    neither = only_again([[0, 0], [255, 255]], None)
    assert pushed_down(neither) == [True, False]
    assert pushed_down(replace(neither, again=())) == [True, True]
