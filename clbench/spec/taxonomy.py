"""Every structure clbench can name: its prompt name, printed aliases, kind and family ties.

They stand in `structures.csv`. The 32 classes are those of the paper's Table 2 in its order
(`template_id` 1 to 32); 33 to 38 are the further JHH structures of the authors' template; the iliac
arteries serve the public stand-in of the body extension. Benchmarks refer to structures by `name`
only. A benchmark's file may declare further ones (`declare`), which live as long as the process; a
run records them (`declare_recorded`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, Literal

from clbench.errors import SpecError, unknown_name
from clbench.spec.validation import Names, checked, from_toml

Kind = Literal["organ", "vessel", "duct", "device", "tumor", "cyst"]


@checked(SpecError)
class Structure:
    """One structure of the body.

    A structure contains the structures below it: a voxel of `liver_tumor` is a voxel of `liver`.
    """

    name: str
    """Canonical name, snake case, American spelling."""
    prompt: str
    """The words that stand for [CLS] in a text prompt."""
    kind: Kind
    """What it is; decides sampling class and post-processing."""
    template_id: int | None = None
    """Number in the paper's Table 2 (1 to 32) or the authors' extension (33 to 38)."""
    aliases: Names = ()
    """Names printed in the paper's tables and used by public data sets."""
    parent: str | None = None
    """The structure that contains this one."""
    mirror: str | None = None
    """The partner on the other side of the body."""
    single_component: bool = False
    """True where a healthy body holds it in one piece (largest component may be kept)."""

    @property
    def tolerance_mm(self) -> float:
        """Tolerance of its surface Dice: 1 mm where it is thin all over, otherwise 2 mm.

        Metrics Reloaded takes the tolerance from how far raters differ; there are no second raters
        for most of these data sets, so it is stated instead and can be swept.
        """
        thin = self.kind in ("vessel", "duct", "device") or self.name.endswith("adrenal_gland")
        return 1.0 if thin else 2.0


def _built_in() -> Iterator[Structure]:
    text = resources.files("clbench.spec").joinpath("structures.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        stated: dict[str, Any] = {key: text for key, text in row.items() if text}
        yield Structure(**{**stated, "aliases": tuple(filter(None, row["aliases"].split(";")))})


STRUCTURES: dict[str, Structure] = {s.name: s for s in _built_in()}
"""Canonical name → structure, in the paper's order."""

DECLARED: dict[str, Structure] = {}
"""Structures that benchmark files have added, see `declare`."""

_BY_ALIAS = {alias: s.name for s in STRUCTURES.values() for alias in (s.name, *s.aliases)}


def structure(name: str, where: object = None) -> Structure:
    """The structure called `name`.

    Raises:
        UnknownName: with the closest known name.
    """
    known = STRUCTURES.get(name) or DECLARED.get(name)
    if known is None:
        raise unknown_name("structure", name, [*STRUCTURES, *DECLARED], where)
    return known


def declare(structures: Sequence[Structure], where: object = None) -> None:
    """Add structures the taxonomy does not have; the same ones again change nothing.

    Raises:
        SpecError: a name that is taken, is no name, or family ties that do not hold.
    """
    wrong = partial(SpecError, where=where)
    added = {s.name: s for s in structures}
    if len(added) < len(structures):
        raise wrong("a structure is declared twice", got=[*added])
    for new in structures:
        if new.name in STRUCTURES or DECLARED.get(new.name, new) != new:
            raise wrong(
                f"the name {new.name!r} is taken",
                expected="a structure clbench does not have yet",
                next_step="use clbench's own without declaring it"
                if new.name in STRUCTURES
                else "another file of this session declares it differently: choose another name",
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", new.name):
            raise wrong(
                "a declared structure needs a name in snake case",
                expected="a small letter first, then small letters, digits and _",
                got=repr(new.name),
            )
        _refuse_second_meaning(new, added, where)
        for tie in (new.parent, new.mirror):
            if tie is not None and tie not in added:
                structure(tie, f"{where}, structure {new.name!r}")
        if new.mirror is not None and (
            new.mirror not in added or added[new.mirror].mirror != new.name
        ):
            raise wrong(
                f"the mirror of {new.name!r} does not point back",
                expected=f"{new.mirror!r} declared with mirror = {new.name!r}",
            )
        seen, parent = {new.name}, new.parent
        while parent in added:
            if parent in seen:
                raise wrong(f"{new.name!r} contains itself")
            seen.add(parent)
            parent = added[parent].parent
    DECLARED.update(added)


def _refuse_second_meaning(new: Structure, added: Mapping[str, Structure], where: object) -> None:
    """Refuse a name or alias of a declared structure that stands for another one already.

    Args:
        new: the structure.
        added: name → structure of all that are declared with it.
        where: the file, for the error.

    Raises:
        SpecError: it does.
    """
    declared = [s for s in {**DECLARED, **added}.values() if s.name != new.name]
    others = {alias: s.name for s in declared for alias in (s.name, *s.aliases)}
    for alias in (new.name, *new.aliases):
        other = _BY_ALIAS.get(alias) or others.get(alias)
        if other is not None:
            raise SpecError(
                f"{alias!r} stands for {other!r} already",
                where=f"{where}, structure {new.name!r}",
                expected="a name and aliases that no other structure has",
                got=alias,
                next_step=f"use {other!r} without declaring it, or choose another name"
                if alias == new.name
                else "take it out of `aliases`",
            )


def declare_recorded(structures: Iterable[Mapping[str, Any]]) -> None:
    """Add the structures that a run's record holds, so that its names can be looked up.

    What clbench has by itself stays; of two records that differ, the later one counts.
    """
    for fields in structures:
        if fields["name"] not in STRUCTURES:
            DECLARED[fields["name"]] = from_toml(
                Structure, fields, raised=SpecError, where="the record of a run"
            )


def canonical(alias: str) -> str:
    """The canonical name behind a printed header or a public data set's name.

    Capitals, and blanks or hyphens in place of underscores, make no other name, where only one
    structure can be meant: tools write `SPLEEN`, `Left Kidney` and `left-kidney`.

    Raises:
        UnknownName: no structure is called so.
    """
    declared = {a: s.name for s in DECLARED.values() for a in (s.name, *s.aliases)}
    structure_name = _BY_ALIAS.get(alias) or declared.get(alias)
    if structure_name is None:
        wanted = _plain(alias)
        meant = {n for a, n in [*_BY_ALIAS.items(), *declared.items()] if _plain(a) == wanted}
        if len(meant) != 1:
            raise unknown_name("structure", alias, [*_BY_ALIAS, *declared])
        (structure_name,) = meant
    return structure_name


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def ancestors(name: str) -> tuple[str, ...]:
    """What contains `name`, nearest first: `liver_tumor` → (`liver`,)."""
    containing: list[str] = []
    parent = structure(name).parent
    while parent is not None:
        containing.append(parent)
        parent = structure(parent).parent
    return tuple(containing)


def depth(name: str) -> int:
    """How many structures contain `name`."""
    return len(ancestors(name))


def with_descendants(name: str, among: Iterable[str]) -> tuple[str, ...]:
    """`name` and whatever of `among` lies inside it, in the order of `among`."""
    return tuple(other for other in among if other == name or name in ancestors(other))
