"""Composition: what a name is made of, equal to the classes there are, refused where it cannot be."""

from __future__ import annotations

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
import torch

from clbench.errors import ClbenchError, SettingError, UnknownName
from clbench.nets.output import Output
from clbench.run.plan import RunSettings, load_strategy, resolve
from clbench.spec import registry
from clbench.strategies.composition.compose import HEADS, PARTS, composed
from clbench.strategies.composition.names import HEAD_NAMES, PART_NAMES
from clbench.strategies.logit_replay.der import Der
from clbench.strategies.plop import THRESHOLDS
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Batch, Lesson, Memory, Strategy
from clbench.strategy.distillation import pod

NAMES = ("liver", "spleen", "liver_tumor")
HAND_WRITTEN = {
    "softmax+ilt": "ilt",
    "softmax+lwf": "lwf",
    "softmax+mbs": "mbs",
    "softmax+mib": "mib",
    "softmax+plop": "plop",
    "universal+mbs": "universal_mbs",
}
SECOND = Lesson(number=2, learns=NAMES[2:], structures=NAMES, source="lits")


def crops(*, pseudo: bool) -> Batch:
    torch.manual_seed(0)
    label = torch.randint(0, 2, (2, 3, 4, 4, 4), dtype=torch.uint8)
    label[:, 1] = 255
    predicted = 254 * torch.randint(0, 2, (2, 3, 4, 4, 4), dtype=torch.uint8)
    predicted[:, 2] = 255
    return Batch(
        image=torch.zeros(2, 1, 4, 4, 4),
        label=label,
        pseudo=predicted if pseudo else None,
        structures=NAMES,
        new=(False, False, True),
        cases=("2/a", "2/b"),
    )


def answers(channels: int) -> tuple[Output, Output]:
    """What a new model says with so many channels, and the old one with one less."""
    torch.manual_seed(1)
    new, old = (
        Output(
            logits=torch.randn(2, n, 4, 4, 4),
            features={
                "bottleneck": torch.randn(2, 5, 2, 2, 2),
                "final": torch.randn(2, 8, 4, 4, 4),
            },
        )
        for n in (channels, channels - 1)
    )
    return new, old


def losses(method: Strategy, batch: Batch) -> dict[str, float]:
    softmax = any(kind.__name__ == "SoftmaxFinetune" for kind in type(method).__mro__)
    new, old = answers(4 if softmax else 3)
    memory: Memory = {THRESHOLDS: torch.full((3,), 0.5)}
    terms = method.losses(batch, new, old, memory)
    return {name: value.item() for name, value in terms.items()}


def options(method: Strategy) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method)}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_it_equals_the_class_written_by_hand(name: str) -> None:
    made, wanted = composed(name, {}), registry.load("strategy", HAND_WRITTEN[name])()
    assert options(made) == options(wanted)
    assert made.declaration == wanted.declaration
    assert (made.version, made.first_step()) == (wanted.version, wanted.first_step())
    batch = crops(pseudo=False)
    assert losses(made, batch) == losses(wanted, batch)
    for hook in ("groups", "grow", "build", "session", "decode", "takes_teacher", "prepares"):
        assert getattr(type(made), hook) is getattr(type(wanted), hook), hook


def test_universal_plop_is_universal_with_pooled_distillation() -> None:
    made, batch = composed("universal+plop", {"logit_factor": "0.002"}), crops(pseudo=True)
    new, old = answers(3)
    terms = losses(made, batch)
    plain = Universal().losses(batch, new, None, {})
    assert {n: terms[n] for n in plain} == {n: v.item() for n, v in plain.items()}
    factors = {"bottleneck": 0.01, "final": 0.01, "logits": 0.002}
    want = pod(
        {**new.features, "logits": new.logits[:, :2]},
        {**old.features, "logits": old.logits},
        factors=factors,
        current=3,
        learned=1,
    )
    assert terms["pod"] == want.item()
    assert (made.takes_teacher(SECOND), made.prepares(SECOND)) == (True, True)
    assert made.declaration.past == "weights"
    assert made.first_step() == Universal().first_step()


def test_terms_of_two_parts_add_up() -> None:
    batch = crops(pseudo=False)
    both = losses(composed("softmax+plop+lwf", {}), batch)
    one, other = (losses(composed(f"softmax+{p}", {}), batch) for p in ("plop", "lwf"))
    assert both == {**one, "distill": other["distill"]}
    made = composed("softmax+lwf+plop", {})
    assert made.declaration.penalties == ("distill", "pod")
    assert not made.declaration.keeps_old_logits  # of `plop`, which shares background out
    assert made.unlabelled == "ignore"  # as `plop` sets it; `lwf` leaves it as it inherits it


def test_stored_logits_work_on_every_head() -> None:
    for head in HEADS:
        made: Any = composed(f"{head}+der", {"mem_size": "2"})
        assert made.declaration.past == "cases"
        assert made.declaration.penalties == ("der",)
        assert (made.mem_size, made.alpha) == (2, Der().alpha)
        assert made.prepares(SECOND) == (head != "softmax")  # pseudo labels, as `universal`
    assert composed("universal+mbs+der", {}).declaration.penalties == ("distill", "classes", "der")
    with pytest.raises(UnknownName, match="no_such_rule"):  # options of the head are checked, too
        composed("universal+der", {"rules": "[no_such_rule]"})


def test_plain_sigmoids_keep_their_head_in_step_1() -> None:
    made: Any = composed("sigmoid+lwf", {})
    first = made.first_step()
    assert type(first).__name__ == "SigmoidFinetune"
    assert type(made).head is type(first).head
    assert type(made).losses is not type(first).losses


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("univers+plop", UnknownName, "did you mean 'universal'"),
        ("universal+plob", UnknownName, "did you mean 'plop'"),
        ("universal+", SettingError, "then of der, derpp"),
        ("universal+mib", SettingError, "no background"),
        ("softmax+mib+plop", SettingError, "labels of old structures"),
        ("universal+lwf+mbs", SettingError, "distill of lwf and mbs"),
        ("softmax+der+derpp", SettingError, "der of der and derpp"),
        ("softmax+lwf+der", SettingError, "alpha of der and lwf"),
        ("softmax+plop+plop", SettingError, "twice"),
        ("plop+universal", SettingError, "--strategy universal+plop"),
        ("mib+universal", SettingError, "next step: --strategy softmax+mib"),
        ("+plop", SettingError, "head and parts"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    name: str, kind: type[ClbenchError], reason: str
) -> None:
    with pytest.raises(kind, match="--strategy") as err:
        load_strategy(name, {})
    assert reason in str(err.value)
    assert name in str(err.value)


def test_the_order_of_parts_makes_no_other_run() -> None:
    plans = [
        resolve(RunSettings(bench="tumor_ext", strategy=name, profile="smoke"))
        for name in ("universal+plop+der", "universal+der+plop")
    ]
    assert {plan.strategy_name for plan in plans} == {"universal+der+plop"}
    assert options(plans[0].strategy) == options(plans[1].strategy)
    assert type(plans[0].strategy).__name__ == "universal+der+plop"


def test_the_list_names_every_head_and_part() -> None:
    assert HEAD_NAMES.keys() == HEADS.keys()
    assert PART_NAMES.keys() == PARTS.keys()


def test_every_part_says_what_it_adds() -> None:
    """The terms by which contradictions are found are those that the losses return."""
    for name, part in PARTS.items():
        for head in HEADS:
            if head != "softmax" and part.sigmoid is None:
                continue
            made = composed(f"{head}+{name}", {})
            assert {*made.declaration.penalties} <= {*part.terms}, (head, name)
            plain = {"ce", "dice", "bce", *made.declaration.penalties, *part.terms}
            assert losses(made, crops(pseudo=True)).keys() <= plain, (head, name)


def allowed_compositions() -> list[str]:
    """Every name of a head with two or three parts that is not refused."""
    names = []
    for head in HEADS:
        for count in (2, 3):
            for parts in combinations(sorted(PARTS), count):
                name = "+".join((head, *parts))
                try:
                    composed(name, {})
                except SettingError:
                    continue
                names.append(name)
    return names


def test_every_declared_penalty_is_a_loss_term_whatever_the_parts() -> None:
    """The terms of the losses, those on class vectors, and those on stored crops."""
    names, batch = allowed_compositions(), crops(pseudo=True)
    assert len(names) > 30
    for name in names:
        made: Any = composed(name, {})
        terms = {*losses(made, batch)}
        if hasattr(made, "class_terms"):
            terms |= {*made.class_terms(torch.randn(1, 3, 5), torch.randn(1, 2, 5))}
        if hasattr(made, "replayed"):
            terms |= {*made.replayed()}
        assert {*made.declaration.penalties} <= terms, name
        each = [composed(f"{name.split('+')[0]}+{part}", {}) for part in name.split("+")[1:]]
        declared = {term for part in each for term in part.declaration.penalties}
        assert declared == {*made.declaration.penalties}, name


def test_mbs_and_plop_on_sigmoids_have_the_terms_of_both() -> None:
    for head in ("universal", "sigmoid"):
        terms = losses(composed(f"{head}+mbs+plop", {}), crops(pseudo=True))
        assert {*terms} == {"bce", "dice", "distill", "features", "pod"}
        alone = (losses(composed(f"{head}+{p}", {}), crops(pseudo=True)) for p in ("mbs", "plop"))
        selective, pooled = alone
        assert terms == {**selective, "pod": pooled["pod"]}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("universal+mbs+plop", 2),
        ("sigmoid+der+mbs+plop", 2),
        ("universal+ilt+plop", 2),
        ("sigmoid+lwf+plop", 2),
        ("universal+mbs", 1),
        ("universal+plop", 1),
        ("sigmoid+ilt", 1),
        ("softmax+lwf+plop", 3),
    ],
)
def test_runs_without_a_declared_term_are_not_those_of_today(name: str, version: int) -> None:
    made = composed(name, {})
    assert made.version == version
    assert made.serves(version)
    if version == 2:
        assert not made.serves(1)
        assert made.defaults_of(1) is None
