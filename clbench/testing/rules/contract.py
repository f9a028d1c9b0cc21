"""Rules about declarations, building, growing, decoding, and hooks without side effects."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import get_annotations
from typing import get_args, get_type_hints

import torch
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.output import Output
from clbench.strategy.contract import Declaration, Lesson, Strategy
from clbench.strategy.search_space import space_of
from clbench.testing.fixtures import PATCH, confident_output, perturb, same
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Broken

ORDERS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("liver_tumor",), ("liver",), ("colon", "spleen", "left_kidney", "right_kidney")),
    (("right_kidney", "colon", "left_kidney", "spleen"), ("liver", "liver_tumor")),
)
"""Ways to learn the same six: one first and many last, a part before its whole, and the reverse."""
ROUNDING = 1e-5
"""Largest difference of one logit in two networks of different shapes, in units of the largest.

Another number of output channels, or a slab instead of a whole, lets the library choose another
kernel, which sums in another order; which one depends on the processor. Equal bits are asked for
only where shapes are equal.
"""

# ------------------------------------------------------------------------------- declarations


def declarations_are_legal(harness: StrategyHarness) -> None:
    """The runner acts on them: a word it does not know would be taken for a promise."""
    strategy = harness.strategy
    _is_frozen_dataclass(type(strategy))
    types = get_type_hints(Declaration)
    for name in ("past", "starts_from", "unlabelled", "resumes"):
        allowed = get_args(types[name])
        if getattr(strategy.declaration, name) not in allowed:
            raise Broken(
                f"{name} is declared with a word that does not exist",
                where=f"{type(strategy).__qualname__}.{name}",
                expected=f"one of {', '.join(allowed)}",
                got=getattr(strategy.declaration, name),
            )
    version = strategy.version
    if not isinstance(version, int) or version < 1:
        raise Broken(
            "version is not a whole number from 1 on",
            where=f"{type(strategy).__qualname__}.version",
            expected="1, and one more whenever the same settings give other numbers",
            got=repr(version),
        )
    if not isinstance(strategy.declaration.keeps_old_logits, bool):
        raise Broken("keeps_old_logits is not a bool", got=strategy.declaration.keeps_old_logits)
    terms = strategy.declaration.penalties
    if not isinstance(terms, tuple) or not all(isinstance(t, str) for t in terms):
        raise Broken(
            "penalties is not a tuple of names",
            where=f"{type(strategy).__qualname__}.penalties",
            expected='for example ("kd",); a tuple of one name needs its comma',
            got=repr(terms),
        )
    try:
        space_of(type(strategy))
    except SettingError as err:
        raise Broken(
            err.what, where=err.where, expected=err.expected, got=err.got, next_step=err.next_step
        ) from None


_DECORATED = "@dataclass(frozen=True, kw_only=True) above the class"


def _is_frozen_dataclass(kind: type) -> None:
    """Refuse a class that is none, and one whose own annotations are no fields."""
    parameters = getattr(kind, "__dataclass_params__", None)
    if not (is_dataclass(kind) and parameters is not None and parameters.frozen):
        raise Broken(
            "the strategy is not a frozen dataclass",
            where=kind.__qualname__,
            expected=_DECORATED,
            next_step="hyperparameters are fields; what changes lives in memory",
        )
    for part in kind.__mro__:
        # being a dataclass is inherited: a class without the decorator passes for one
        if "__dataclass_fields__" in vars(part) or not issubclass(part, Strategy):
            continue
        lost = [n for n, hint in get_annotations(part).items() if "ClassVar" not in str(hint)]
        if lost:
            raise Broken(
                "the strategy has hyperparameters that are no fields, so nobody can set them",
                where=part.__qualname__,
                expected=_DECORATED,
                got=f"no decorator above the class, and {', '.join(lost)} in it",
                next_step="put it there; what is no hyperparameter is annotated as ClassVar",
            )


# ------------------------------------------------------------------------------------- models


def builds(harness: StrategyHarness) -> None:
    """Without a model whose answer has one logit per voxel, nothing else can be said."""
    lesson = harness.lesson(1)
    model = harness.strategy.build(harness.plan.kit, lesson)
    if not isinstance(model, nn.Module):
        raise Broken("build returns no torch module", got=type(model).__name__)
    _answer(model, lesson)


def _answer(model: nn.Module, lesson: Lesson) -> Output:
    """The model's answer to one patch in evaluation mode, checked for its shape."""
    image = torch.rand(1, 1, PATCH, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.eval()(image)
    logits = getattr(output, "logits", None)
    where = f"the model's forward, after learning {', '.join(lesson.structures)}"
    if not isinstance(output, Output) or not isinstance(logits, Tensor):
        raise Broken(
            "the model does not answer with an Output",
            where=where,
            expected="clbench.nets.output.Output(logits=…, features=…)",
            got=type(output).__name__,
        )
    if logits.ndim != 5 or tuple(logits.shape[2:]) != tuple(image.shape[2:]):
        raise Broken(
            "the logits do not lie on the image's grid",
            where=where,
            expected=f"(1, C, {PATCH}, {PATCH}, {PATCH})",
            got=tuple(logits.shape),
        )
    if not bool(torch.isfinite(logits).all()):
        raise Broken("a fresh model answers with NaN or infinity", where=where)
    return output


def course(order: Sequence[Sequence[str]]) -> Iterator[Lesson]:
    """The lessons of a course that learns in this order."""
    known: tuple[str, ...] = ()
    for number, learns in enumerate(order, 1):
        known = (*known, *learns)
        yield Lesson(
            number=number,
            learns=tuple(learns),
            structures=known,
            source="made up",
            cases=("a", "b"),
            past=dict.fromkeys(range(1, number), ("a", "b")),
        )


def grows_in_any_order(harness: StrategyHarness) -> None:
    """A course may add one structure or many, in any order; a checkpoint is loaded by growing."""
    kit = harness.plan.kit
    for order in ORDERS:
        model: nn.Module | None = None
        lessons = list(course(order))
        for lesson in lessons:
            if model is None:
                model = harness.strategy.build(kit, lesson)
            else:
                harness.strategy.grow(model, kit, lesson)
            output = _answer(model, lesson)
            decoded = harness.strategy.decode(output.logits, lesson.structures)
            if decoded.shape[1] != len(lesson.structures):
                raise Broken(
                    "the model does not answer for every structure learned so far",
                    where=f"after learning {' | '.join(', '.join(o) for o in order)}",
                    expected=f"{len(lesson.structures)} channels after decode",
                    got=decoded.shape[1],
                )
        assert model is not None  # noqa: S101  # ORDERS has no empty course
        perturb(model)
        again = harness.strategy.build(kit, lessons[0])
        for lesson in lessons[1:]:
            harness.strategy.grow(again, kit, lesson)
        try:
            again.load_state_dict(model.state_dict())
        except RuntimeError as err:
            raise Broken(
                "the weights of a grown model do not fit a model grown the same way",
                where="build and grow, replayed",
                got=str(err).splitlines()[-1].strip(),
                next_step="name what grows by structure, never by a count or by chance",
            ) from err
        if not same(_answer(model, lessons[-1]).logits, _answer(again, lessons[-1]).logits):
            raise Broken(
                "a model loaded from a checkpoint answers differently",
                where="build and grow, replayed, then load_state_dict",
                expected="equal logits: everything that counts stands in the state dict",
            )


def starts_from_what_it_declares(harness: StrategyHarness) -> None:
    """One that says 'previous' and begins anew has forgotten all, whatever it shows afterwards."""
    if harness.strategy.declaration.starts_from == "scratch":
        return  # then the runner makes the model
    model = harness.blank(1)
    perturb(model)
    before = copy.deepcopy(model.state_dict())
    harness.strategy.grow(model, harness.plan.kit, harness.lesson(2))
    _nothing_kept(before, model, "grow, step 2")
    state = harness.start(2)
    before = copy.deepcopy(state.model.state_dict())
    harness.enter(state)
    _nothing_kept(before, state.model, "enter_phase, step 2")


def _nothing_kept(before: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    now = model.state_dict()
    common = [n for n, v in before.items() if n in now and v.numel() > 1]
    if not any(same(before[n], now[n]) for n in common):
        raise Broken(
            "no weight of the previous model is left, although starts_from is 'previous'",
            where=where,
            expected="the model after the previous step, grown",
            got=f"{len(common)} tensors, all of them others",
            next_step="leave old weights alone, or declare starts_from = 'scratch'",
        )


def growth_keeps_old_logits_as_declared(harness: StrategyHarness) -> None:
    """Else old structures are lost or kept (to rounding, 1e-5) before any update, and unseen."""
    image = torch.rand(2, 1, PATCH, PATCH, PATCH, generator=torch.Generator().manual_seed(1))
    moved = []
    for number in (2, 3):
        model = harness.blank(number - 1)
        perturb(model)
        with torch.no_grad():
            before = model.eval()(image).logits
            harness.strategy.grow(model, harness.plan.kit, harness.lesson(number))
            after = model.eval()(image).logits
        gone = _lost_channels(before, after)
        if gone and harness.strategy.declaration.keeps_old_logits:
            raise Broken(
                "growing changes old logits, although keeps_old_logits is declared",
                where=f"grow, step {number}",
                expected="every old logit unchanged by growth alone",
                got=f"channel {', '.join(map(str, gone))} of {before.shape[1]} changed or gone",
                next_step="leave old weights alone, or declare keeps_old_logits = False",
            )
        moved += gone
    if not moved and not harness.strategy.declaration.keeps_old_logits:
        raise Broken(
            "keeps_old_logits is declared False, but growing changes no old logit",
            where="grow, steps 2 and 3",
            next_step="declare keeps_old_logits = True",
        )


def _lost_channels(before: Tensor, after: Tensor) -> list[int]:
    """Channels of `before` without an equal in `after`; the order must stay, places may move."""
    gone, start = [], 0
    for channel in range(before.shape[1]):
        size = float(before[:, channel].abs().max()) + 1.0
        for place in range(start, after.shape[1]):
            if float((before[:, channel] - after[:, place]).abs().max()) <= ROUNDING * size:
                start = place + 1
                break
        else:
            gone.append(channel)
    return gone


def another_seed_gives_other_weights(harness: StrategyHarness) -> None:
    """Three seeds with one set of initial weights would measure less than seeds claim to."""
    kit = copy.copy(harness.plan.kit)
    kit.seed += 1
    one = harness.strategy.build(harness.plan.kit, harness.lesson(1))
    two = harness.strategy.build(kit, harness.lesson(1))
    if same(one.state_dict(), two.state_dict()):
        raise Broken(
            "another seed gives the same initial weights",
            where="build",
            expected="with kit.fresh(step.number, …) around what is initialised",
        )


def decodes_to_probabilities(harness: StrategyHarness) -> None:
    """Examination decodes slab by slab and calls above 0.5 foreground."""
    for number in (1, 2, 3):
        structures = harness.lesson(number).structures
        like = _answer(harness.blank(number), harness.lesson(number))
        for scale in (1.0, 1e4):
            logits = scale * confident_output(like, 1).logits.detach()[:, :, :, :6, :5]
            before = logits.clone()
            decoded = harness.strategy.decode(logits, structures)
            _check_probabilities(decoded, logits, structures)
            if not same(logits, before):
                raise Broken("decode changes the logits it is given", where="decode")
            slabs = [
                harness.strategy.decode(logits[:, :, a:b], structures)
                for a, b in ((0, 1), (1, 5), (5, PATCH))
            ]
            if not torch.allclose(torch.cat(slabs, dim=2), decoded, atol=ROUNDING):
                raise Broken(
                    "decode answers differently for a slab than for the whole",
                    where="decode",
                    expected="each voxel decoded from its own logits",
                )


def _check_probabilities(decoded: Tensor, logits: Tensor, structures: Sequence[str]) -> None:
    expected = (logits.shape[0], len(structures), *logits.shape[2:])
    if tuple(decoded.shape) != expected:
        raise Broken(
            "decode returns another shape",
            where=f"decode, after learning {', '.join(structures)}",
            expected=expected,
            got=tuple(decoded.shape),
            next_step="one channel per structure, in the order of structures; no background",
        )
    low, high = float(decoded.min()), float(decoded.max())
    if not (low >= 0.0 and high <= 1.0 + 1e-6):  # NaN fails both
        raise Broken(
            "decode returns something that is no probability",
            where="decode",
            expected="values in [0, 1]",
            got=f"{low:g} to {high:g}",
        )
