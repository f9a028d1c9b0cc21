"""Strategies by composition: `--strategy universal+mbs`, `softmax+plop+der`.

A name is a head and the parts that work on it, joined by `+`. A part brings terms that tie the new
model to the old one, or a source of labels for old structures that the new data does not annotate,
or both. Where no part brings a source, a head with sigmoids takes the old model's pseudo labels, as
`universal` does, and a softmax takes background, as `softmax_finetune` does. At most one part may
bring a source, no two parts the same term, and no two parts an option of one name; then the order
of the parts has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from itertools import combinations
from typing import Any, get_type_hints

from clbench.errors import SettingError, unknown_name
from clbench.spec.settings import change
from clbench.strategies.composition.sigmoid_parts import (
    SigmoidFinetune,
    SigmoidIlt,
    SigmoidLwf,
    SigmoidPlop,
    SigmoidPseudo,
)
from clbench.strategies.finetune import Finetune
from clbench.strategies.ilt import Ilt
from clbench.strategies.logit_replay.der import StoredLogits
from clbench.strategies.logit_replay.derpp import StoredLogitsAndLabels
from clbench.strategies.lwf import Lwf
from clbench.strategies.mbs import Mbs
from clbench.strategies.mib import Mib
from clbench.strategies.plop import Plop
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategies.universal import Universal
from clbench.strategies.universal_variants.universal_mbs import SelectiveSigmoids
from clbench.strategy import Declaration, Strategy


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head, and the plain training with it."""

    plain: type[Strategy]
    """Without any source of old labels but background, or one that a part brings."""
    labelled: type[Strategy]
    """With the source it has by default."""
    softmax: bool = False
    """Whether channels, background among them, compete."""


@dataclass(frozen=True)
class Part:
    """A method as a part of others."""

    terms: tuple[str, ...]
    """Names of its loss terms that tie to the past."""
    sigmoid: type[Any] | None
    """For heads of sigmoids; None: there is none."""
    softmax: type[Any] | None
    """For softmax heads."""
    labels: Callable[[Head], bool] = lambda head: False
    """Whether it brings the source of old labels to a head."""
    outermost: bool = False
    """Whether it stands before all others: it takes their loss for its own draws."""


HEADS: Mapping[str, Head] = {
    "universal": Head(plain=Finetune, labelled=Universal),
    "sigmoid": Head(plain=SigmoidFinetune, labelled=SigmoidPseudo),
    "softmax": Head(plain=SoftmaxFinetune, labelled=SoftmaxFinetune, softmax=True),
}
PARTS: Mapping[str, Part] = {
    "der": Part(("der",), StoredLogits, StoredLogits, outermost=True),
    "derpp": Part(("der", "replay"), StoredLogitsAndLabels, StoredLogitsAndLabels, outermost=True),
    "ilt": Part(("distill", "features"), SigmoidIlt, Ilt),
    "lwf": Part(("distill",), SigmoidLwf, Lwf),
    "mbs": Part(
        ("classes", "distill", "features", "orthogonal"),
        SelectiveSigmoids,
        Mbs,
        labels=lambda head: True,
    ),
    "mib": Part(("distill",), None, Mib, labels=lambda head: True),
    "plop": Part(("pod",), SigmoidPlop, Plop, labels=lambda head: head.softmax),
}
WITHOUT_SIGMOIDS = {
    "mib": "it counts old structures as background, and a head of sigmoids has no background"
}
PAST = ("nothing", "predictions", "weights", "cases", "images")
"""What a declaration asks of the past, from least to most."""


def composed(name: str, overrides: Mapping[str, Any]) -> Strategy:
    """The strategy that `HEAD+PART+…` names, for `--strategy`.

    Args:
        name: head and parts; the parts in any order.
        overrides: hyperparameters, as text.

    Raises:
        UnknownName: there is no such head or part.
        SettingError: the parts contradict each other; says why.
    """
    first, *names = name.split("+")
    if not all((first, *names)) or first in PARTS:
        raise _without_head(name, [word for word in (first, *names) if word in PARTS])
    if first not in HEADS:
        raise unknown_name("head", first, HEADS, f"--strategy {name}")
    for part in names:
        if part not in PARTS:
            raise unknown_name("part of a strategy", part, PARTS, f"--strategy {name}")
    head, parts = HEADS[first], sorted(names)
    kinds = {part: _kind(name, head, part) for part in parts}
    for one, two in combinations(parts, 2):
        _agree(name, head, one, two)
    labelled = any(PARTS[part].labels(head) for part in parts)
    # what brings labels makes the loss anew, so whatever adds to a loss stands before it
    parts.sort(key=lambda part: (not PARTS[part].outermost, PARTS[part].labels(head)))
    base = head.plain if labelled else head.labelled
    kind = _join("+".join([first, *sorted(names)]), [kinds[part] for part in parts], base)
    if not head.softmax and "plop" in parts and {"ilt", "lwf", "mbs"} & {*parts}:
        kind.version = 2  # in version 1 the term of PLOP was lost beside theirs
    strategy: Strategy = change(kind(), overrides, "strategy")
    return strategy


def _without_head(name: str, parts: list[str]) -> SettingError:
    """The error for a name that has no head, or a gap; names the compositions there are."""
    kinds = {h: [_kind_of(head, part) for part in parts] for h, head in HEADS.items()}
    heads = [h for h, classes in kinds.items() if None not in classes]
    return SettingError(
        "the name of a composition is a head and parts, joined by +",
        where="--strategy",
        expected=f"one of {', '.join(HEADS)} first, then of {', '.join(PARTS)}",
        got=name,
        next_step=" or ".join(
            f"--strategy {'+'.join((head, *(parts or ['plop'])))}" for head in heads
        ),
    )


def _kind_of(head: Head, part: str) -> type[Any] | None:
    """The class of a part for a head; None: there is none."""
    return PARTS[part].softmax if head.softmax else PARTS[part].sigmoid


def _kind(name: str, head: Head, part: str) -> type[Any]:
    """The class of a part for a head."""
    kind = _kind_of(head, part)
    if kind is None:
        raise SettingError(
            f"{part} does not work on this head: {WITHOUT_SIGMOIDS[part]}",
            where=f"--strategy {name}",
            expected=f"the head softmax before {part}",
            got=name.split("+")[0],
            next_step=f"--strategy softmax+{part}",
        )
    return kind


def _agree(name: str, head: Head, one: str, two: str) -> None:
    """Refuse two parts that contradict each other."""
    terms = sorted({*PARTS[one].terms} & {*PARTS[two].terms})
    options = sorted(_options(head, one) & _options(head, two))
    if one == two:
        why, got = "a part stands there twice", one
    elif PARTS[one].labels(head) and PARTS[two].labels(head):
        why, got = "two parts each say what the labels of old structures are", f"{one} and {two}"
    elif terms:
        why, got = "two parts bring the same loss term", f"{', '.join(terms)} of {one} and {two}"
    elif options:
        why = "two parts have an option of the same name"
        got = f"{', '.join(options)} of {one} and {two}"
    else:
        return
    raise SettingError(
        f"the parts of this strategy contradict each other: {why}",
        where=f"--strategy {name}",
        expected="parts with terms and options of their own, at most one with labels",
        got=got,
        next_step="leave one of them out; `clbench list` says what each part brings",
    )


def _options(head: Head, part: str) -> set[str]:
    """Options of a part that its head does not have."""
    kind = _kind_of(head, part)
    assert kind is not None  # noqa: S101  # refused before
    return {f.name for f in fields(kind)} - {f.name for f in fields(head.labelled)}  # type: ignore[arg-type]  # a dataclass


def _join(name: str, parts: list[type[Any]], base: type[Strategy]) -> type[Strategy]:
    """A frozen dataclass of the parts before the base.

    Each option has the default of the class nearest to it: of dataclasses alone, one that inherits
    an option unchanged would take back what another class sets it to.
    """
    bases = (*parts, base)
    order = type(name, bases, {}).__mro__[1:]
    options: list[tuple[str, Any, Any]] = []
    for option in dict.fromkeys(f.name for kind in reversed(bases) for f in fields(kind)):
        kind = next(k for k in order if option in vars(k).get("__annotations__", {}))
        options.append(
            (
                option,
                get_type_hints(kind, include_extras=True)[option],
                field(default=vars(kind)[option]),
            )
        )

    def declares(self: Strategy) -> Declaration:
        promised = [part.declares(self) for part in bases if hasattr(part, "declares")]
        return replace(
            promised[0],
            past=max((p.past for p in promised), key=PAST.index),
            keeps_old_logits=all(p.keeps_old_logits for p in promised),
            penalties=tuple(dict.fromkeys(name for p in promised for name in p.penalties)),
        )

    joined: type[Strategy] = make_dataclass(
        name,
        options,
        bases=bases,
        frozen=True,
        kw_only=True,
        namespace={"declares": declares, "__module__": __name__},
    )
    return joined
