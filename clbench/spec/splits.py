"""Which cases train, validate and test a step: lists of ids, or a rule that draws patients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated

from pydantic import Field

from clbench.errors import SpecError
from clbench.spec.names import need_case
from clbench.spec.taxonomy import structure
from clbench.spec.validation import Names, checked

PARTS = ("train", "validation", "test")
FORMAT = (
    'a split file is TOML: train = ["1", "4..9"], validation = [], test = ["10"], or '
    "draw = {seed = 1, train = 20, validation = 5, test = 10}; `clbench data split` writes one, "
    "benchmarks/README.md describes it"
)
"""What a split file looks like, for the error of a wrong one."""
NOT_AT_HAND = "not at hand"
"""Origin of the split of a step learned elsewhere (`Step.given`): its training cases are not here;
test cases may be."""
Cases = Annotated[tuple[str, ...], Field(description="a list of case ids")]
Patients = Annotated[int, Field(ge=1)]


@checked(SpecError)
class Draw:
    """A rule that draws a split from the cases at hand, patient by patient.

    Patients are put in an order that depends on `seed` and their names alone, and dealt out in
    blocks: a step with `part = 2` takes the second block. So steps that share a source, a seed,
    `needs`, `among`, `without` and the block size never share a patient, and neither do train and
    test. One patient more at hand, and others may be drawn.
    """

    seed: int
    """Changes the order of the patients."""
    train: Annotated[int, Field(ge=0)] = 0
    """Patients to learn from; 0: none, for a source that is only tested on."""
    validation: Annotated[int, Field(ge=0)] = 0
    """Patients for choices made while developing."""
    test: Patients
    """Patients for the examination."""
    part: Annotated[int, Field(ge=1)] = 1
    """1-based block."""
    needs: Names = ()
    """Structures of which a case must hold a voxel; for sources that image other regions too."""
    without: Cases = ()
    """Case ids that are never drawn: damaged files, say."""
    among: Cases = ()
    """The only case ids that may be drawn; empty: every case at hand."""

    def __post_init__(self) -> None:
        """Check that the structures asked for exist."""
        for name in self.needs:
            structure(name, "draw, needs")

    @property
    def size(self) -> int:
        """Patients of a block."""
        return self.train + self.validation + self.test

    def candidates(self, cases: Iterable[str], patient: Callable[[str], str]) -> list[list[str]]:
        """Cases of each patient that may be drawn, in the order in which patients are dealt out.

        Args:
            cases: ids of the source.
            patient: case id → patient.
        """
        patients: dict[str, list[str]] = {}
        allowed = set(cases) & set(self.among) if self.among else set(cases)
        for case in sorted(allowed - set(self.without)):
            patients.setdefault(patient(case), []).append(case)

        def place(name: str) -> str:
            return hashlib.sha256(f"{self.seed}/{name}".encode()).hexdigest()

        return [patients[name] for name in sorted(patients, key=place)]

    def deal(
        self,
        cases: Iterable[str],
        *,
        patient: Callable[[str], str],
        fits: Callable[[str], bool],
        where: object,
    ) -> dict[str, tuple[str, ...]]:
        """Part → case ids, out of the cases at hand.

        Args:
            cases: ids of the source.
            patient: case id → patient.
            fits: whether a case holds what `needs` asks for; asked of no more than necessary.
            where: what the split belongs to, for the message.

        Raises:
            SpecError: not enough patients.
        """
        size = self.size
        taken: list[list[str]] = []
        for of_patient in self.candidates(cases, patient):
            if fitting := [c for c in of_patient if fits(c)]:
                taken.append(fitting)
            if len(taken) == self.part * size:
                break
        else:
            raise SpecError(
                "too few patients for the drawn split",
                where=where,
                expected=f"at least {self.part * size} (part {self.part} of {size} each)"
                + (f" that hold {', '.join(self.needs)}" if self.needs else ""),
                got=len(taken),
                next_step="add cases, or pass a split file of your own with --split (`clbench data "
                "split` draws one)",
            )
        block = taken[-size:]
        ends = (0, self.train, self.train + self.validation, size)
        return {
            part: tuple(c for cases in block[a:b] for c in cases)
            for part, a, b in zip(PARTS, ends[:-1], ends[1:], strict=True)
        }


@checked(SpecError)
class Split:
    """Which cases of a source train, validate and test a step."""

    name: str
    """File name, for records."""
    train: Cases = ()
    """Case ids a model learns from."""
    validation: Cases = ()
    """Case ids for choices made while developing."""
    test: Cases = ()
    """Case ids no training ever opens."""
    origin: str = ""
    """Where the ids come from."""
    draw: Draw | None = None
    """A rule instead of lists; `resolve` applies it."""

    def __post_init__(self) -> None:
        """Check that no case stands in two parts."""
        where = f"split {self.name!r}"
        wrong = partial(SpecError, where=where)
        named = (*self.draw.without, *self.draw.among) if self.draw is not None else ()
        for case in (*self.cases, *named):
            need_case(case, where)
        if self.draw is not None:
            if self.cases:
                raise wrong("a split lists cases or draws them, not both")
            return
        for i, a in enumerate(PARTS):
            here: tuple[str, ...] = getattr(self, a)
            if len(set(here)) != len(here):
                twice = sorted({case for case in here if here.count(case) > 1})
                raise wrong(
                    f"a case is listed twice in {a}",
                    expected="every case once",
                    got=", ".join(twice),
                    next_step="remove one of the two",
                )
            for b in PARTS[i + 1 :]:
                if both := set(here) & set(getattr(self, b)):
                    raise wrong(
                        f"the same case stands in {a} and {b}",
                        expected="disjoint lists",
                        got=", ".join(sorted(both)),
                        next_step="remove it from one; a case once trained on tests nothing",
                    )
        if self.origin == NOT_AT_HAND and not self.train and not self.validation:
            return
        if not self.test:
            raise wrong(
                "a split needs test cases",
                expected="case ids in `test`, or a rule in `draw`",
                got=f"{len(self.train)} train, {len(self.test)} test",
            )

    @property
    def teaches(self) -> bool:
        """Whether there are cases to learn from or to choose by."""
        rule = self.draw
        return bool(
            self.train or self.validation or (rule is not None and (rule.train or rule.validation))
        )

    def need_training(self) -> None:
        """Refuse a split of a step that is taught and has nothing to learn from.

        Raises:
            SpecError: no training cases.
        """
        if not (self.train if self.draw is None else self.draw.train):
            raise SpecError(
                "a split needs train and test cases",
                where=f"split {self.name!r}",
                expected="case ids in `train` and in `test`, or a rule in `draw` with `train`",
                got=f"0 train, {self.draw.test if self.draw else len(self.test)} test",
            )

    def resolve(
        self,
        cases: Iterable[str],
        *,
        patient: Callable[[str], str],
        fits: Callable[[str], bool] = lambda case: True,
    ) -> Split:
        """This split with its rule applied to the cases at hand; itself where it lists ids.

        Args:
            cases: ids of the cases at hand.
            patient: case id → patient; one patient's cases stay in one part.
            fits: whether a case may take part, by its id.
        """
        if self.draw is None:
            return self
        dealt = self.draw.deal(cases, patient=patient, fits=fits, where=f"split {self.name!r}")
        return replace(self, draw=None, **dealt)  # type: ignore[arg-type]  # keys are PARTS

    @property
    def cases(self) -> tuple[str, ...]:
        """All case ids: train, validation, test."""
        return self.train + self.validation + self.test
