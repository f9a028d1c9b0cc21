"""What is taught, in what order, from which data: Source, Preprocessing, Step, Benchmark.

Room: row 0 (no torch). These types are the parsed form of a benchmark's TOML file. They are frozen
and validate themselves, so whoever holds one may trust it.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import SpecError, closest
from clbench.taxonomy import structure

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """Cases of a source that annotate fewer structures than the rest."""

    cases: tuple[str, ...]
    """Case ids."""
    annotates: tuple[str, ...]
    """The structures these cases annotate."""
    why: str = ""
    """Where the fact comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set: how it lies on disk, what its label values mean, what each case annotates."""

    name: str
    """Name in `--data name=PATH` and in every table."""
    title: str
    """Name for readers."""
    layout: str
    """Folder layout (`clbench.data.layouts`)."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Raw label value → structure; a structure also holds the values of those inside it."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """For layouts with a mask per structure: file stem → structure; several stems may stand for
    one structure (two generations of names)."""
    sides: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Raw label value that holds both of a pair → (left, right) structure."""
    ignored: tuple[int, ...] = ()
    """Further label values that occur and count as background."""
    partial: tuple[Partial, ...] = ()
    """Cases that annotate fewer structures."""
    licence: str = ""
    """Licence of the data, as its owner states it."""
    url: str = ""
    """Where to get it."""

    def __post_init__(self) -> None:
        """Check that every named structure exists and is in the labels."""
        where = f"source {self.name!r}"
        if bool(self.labels or self.sides) == bool(self.masks):
            raise SpecError(
                "a source needs label values, or names of mask files",
                where=where,
                expected="either [source.labels] or [source.masks]",
                got="both" if self.masks else "neither",
            )
        for name in (*self.labels.values(), *self.masks.values()):
            structure(name, where)
        for value, pair in self.sides.items():
            if len(pair) != 2 or structure(pair[0], where).mirror != pair[1]:
                raise SpecError(
                    "sides needs the left and the right structure of a pair",
                    where=where,
                    expected=f'{value} = ["left_…", "right_…"]',
                    got=f"{value} = {list(pair)}",
                )
        for value in (*self.labels, *self.sides, *self.ignored):
            if value <= 0:
                raise SpecError("label values start at 1; 0 is background", where=where, got=value)
        used = [*self.labels, *self.sides, *self.ignored]
        if len(set(used)) < len(used):
            raise SpecError(
                "a label value is listed twice",
                where=where,
                expected="each in one of labels, sides and ignored",
                got=sorted(v for v in set(used) if used.count(v) > 1),
            )
        seen: set[str] = set()
        for part in self.partial:
            for name in part.annotates:
                if name not in self.structures:
                    raise SpecError(
                        f"partial cases annotate {name!r}, which the source does not have",
                        where=where,
                        expected=f"one of {', '.join(sorted(self.structures))}",
                    )
            if twice := seen & set(part.cases):
                raise SpecError(
                    "a case stands in two partial lists", where=where, got=sorted(twice)
                )
            seen |= set(part.cases)

    @property
    def structures(self) -> tuple[str, ...]:
        """Every structure labels or masks name, in the order of the values, each once."""
        by_value = {**{v: (n,) for v, n in self.labels.items()}, **self.sides}
        names = [n for v in sorted(by_value) for n in by_value[v]]
        return tuple(dict.fromkeys([*names, *self.masks.values()]))

    def annotated(self, case: str) -> tuple[str, ...]:
        """The structures that case `case` annotates, in the order of `structures`.

        Where masks may be missing, see `CaseFiles.annotated`.
        """
        for part in self.partial:
            if case in part.cases:
                return tuple(s for s in self.structures if s in part.annotates)
        return self.structures


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a volume becomes what a network sees."""

    orientation: str = "RAS"
    """Axis codes after reorientation; axis 0 grows to the patient's right, 1 to the front, 2 up."""
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 1.5)
    """Voxel size after resampling (image linear, label nearest)."""
    window_hu: tuple[float, float] = (-175.0, 250.0)
    """HU range that is mapped to [0, 1]; values outside are clipped."""
    patch_vox: tuple[int, int, int] = (96, 96, 96)
    """Training patch and sliding window, in voxels."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.orientation != "RAS":
            raise SpecError("only RAS is supported", where="preprocessing", got=self.orientation)
        if len(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0:
            raise SpecError(
                "spacing_mm needs three positive numbers",
                where="preprocessing",
                got=self.spacing_mm,
            )
        if len(self.window_hu) != 2 or self.window_hu[0] >= self.window_hu[1]:
            raise SpecError("window_hu needs low < high", where="preprocessing", got=self.window_hu)
        if len(self.patch_vox) != 3 or min(self.patch_vox) < 1:
            raise SpecError(
                "patch_vox needs three positive whole numbers",
                where="preprocessing",
                got=self.patch_vox,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A rule that draws a split from the cases at hand, patient by patient.

    Patients are put in an order that depends on `seed` and their names alone, and dealt out in
    blocks: a step with `part = 2` takes the second block. So steps that share a source, a seed and
    the block size never share a patient.
    """

    seed: int
    """Changes the order of the patients."""
    train: int
    """Patients to learn from."""
    validation: int = 0
    """Patients for choices made while developing."""
    test: int
    """Patients for the examination."""
    part: int = 1
    """1-based block."""
    patient: str = "(.+)"
    """Regular expression whose first group is the patient within a case id."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.train, self.test, self.part) < 1 or self.validation < 0:
            raise SpecError(
                "a drawn split needs at least one train and one test patient and part ≥ 1",
                where="draw",
                got=f"train={self.train}, test={self.test}, part={self.part}",
            )
        try:
            groups = re.compile(self.patient).groups
        except re.error as err:
            raise SpecError("draw.patient is no regular expression", got=self.patient) from err
        if groups != 1:
            raise SpecError("draw.patient needs exactly one group", where="draw", got=self.patient)

    def deal(self, cases: Iterable[str], where: object) -> dict[str, Any]:
        """`{"train": ids, "validation": ids, "test": ids}` out of the cases at hand.

        Raises:
            SpecError: not enough patients, or an id without a patient.
        """
        patients: dict[str, list[str]] = {}
        for case in sorted(cases):
            match = re.match(self.patient, case)
            if match is None:
                raise SpecError(
                    "a case id does not match draw.patient",
                    where=where,
                    expected=self.patient,
                    got=case,
                )
            patients.setdefault(match[1], []).append(case)
        order = sorted(
            patients, key=lambda p: hashlib.sha256(f"{self.seed}/{p}".encode()).hexdigest()
        )
        size = self.train + self.validation + self.test
        block = order[(self.part - 1) * size : self.part * size]
        if len(block) < size:
            raise SpecError(
                "too few patients for the drawn split",
                where=where,
                expected=f"at least {self.part * size} (part {self.part} of {size} each)",
                got=len(order),
                next_step="add cases, or pass a split file of your own with --split",
            )
        ends = {"train": (0, self.train), "validation": (self.train, size - self.test),
                "test": (size - self.test, size)}  # fmt: skip
        return {
            part: tuple(c for p in block[a:b] for c in patients[p]) for part, (a, b) in ends.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which cases of a source train, validate and test a step."""

    name: str
    """File name, for records."""
    train: tuple[str, ...] = ()
    """Case ids a model learns from."""
    validation: tuple[str, ...] = ()
    """Case ids for choices made while developing."""
    test: tuple[str, ...] = ()
    """Case ids no training ever opens."""
    origin: str = ""
    """Where the ids come from."""
    draw: Draw | None = None
    """A rule instead of lists; `resolve` applies it."""

    def resolve(self, cases: Iterable[str]) -> Split:
        """This split with its rule applied to the cases at hand; itself where it lists ids."""
        if self.draw is None:
            return self
        dealt = self.draw.deal(cases, f"split {self.name!r}")
        return Split(name=self.name, origin=self.origin, **dealt)

    def __post_init__(self) -> None:
        """Check that no case stands in two parts."""
        if self.draw is not None:
            if self.cases:
                raise SpecError(
                    "a split lists cases or draws them, not both", where=f"split {self.name!r}"
                )
            return
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        names = list(parts)
        for i, a in enumerate(names):
            if len(set(parts[a])) != len(parts[a]):
                raise SpecError(f"a case is listed twice in {a}", where=f"split {self.name!r}")
            for b in names[i + 1 :]:
                if both := set(parts[a]) & set(parts[b]):
                    raise SpecError(
                        f"the same case stands in {a} and {b}",
                        where=f"split {self.name!r}",
                        expected="disjoint lists",
                        got=", ".join(sorted(both)),
                        next_step="remove it from one; a case once trained on tests nothing",
                    )
        if not self.train or not self.test:
            raise SpecError(
                "a split needs train and test cases",
                where=f"split {self.name!r}",
                got=f"{len(self.train)} train, {len(self.test)} test",
            )

    @property
    def cases(self) -> tuple[str, ...]:
        """All case ids: train, validation, test."""
        return self.train + self.validation + self.test


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One lesson: which structures are learned, from which source."""

    name: str
    """Short name for tables."""
    source: str
    """Name of the source."""
    learns: tuple[str, ...]
    """Structures first learned here, in channel order."""
    split: Split
    """Cases on real data."""
    phantom_split: Split | None = None
    """Cases on the embedded phantom; None: as many as the profile asks for, numbered by step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A course: sources, steps and how to read the result."""

    name: str
    """Name for `--bench`."""
    version: int
    """Raised by any change that moves a number; results of two versions never share a table."""
    title: str
    """One line for `clbench list`."""
    sources: tuple[Source, ...]
    """The data sets."""
    steps: tuple[Step, ...]
    """The lessons, in order."""
    preprocessing: Preprocessing
    """Common to all steps."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Table groups: printed name → structures whose plain mean it is."""
    citation: str = ""
    """What to cite."""

    def __post_init__(self) -> None:
        """Check that steps, sources and groups fit together."""
        where = f"benchmark {self.name!r}"
        if not self.steps:
            raise SpecError("a benchmark needs at least one step", where=where)
        known = {s.name: s for s in self.sources}
        learned: dict[str, str] = {}
        for step in self.steps:
            here = f"{where}, step {step.name!r}"
            if step.source not in known:
                guess = closest(step.source, known)
                raise SpecError(
                    f"the step's source {step.source!r} is not defined",
                    where=here,
                    expected=f"one of {', '.join(known)}",
                    next_step=f"did you mean {guess!r}?" if guess else None,
                )
            if not step.learns:
                raise SpecError("a step must learn at least one structure", where=here)
            for name in step.learns:
                structure(name, here)
                if name in learned:
                    raise SpecError(
                        f"{name!r} is learned twice",
                        where=here,
                        expected="each structure learned in one step",
                        got=f"steps {learned[name]!r} and {step.name!r}",
                        next_step="remove it from one of the two `learns` lists",
                    )
                if name not in known[step.source].structures:
                    raise SpecError(
                        f"the step learns {name!r}, which its source does not annotate",
                        where=here,
                        expected=f"one of {', '.join(known[step.source].structures)}",
                    )
                learned[name] = step.name
        for group, names in self.groups.items():
            for name in names:
                if name not in learned:
                    raise SpecError(
                        f"group {group!r} names {name!r}, which no step learns", where=where
                    )

    def source(self, name: str) -> Source:
        """The source called `name`."""
        return next(s for s in self.sources if s.name == name)

    def structures(self, step: int) -> tuple[str, ...]:
        """Every structure learned in steps 1 to `step` (1-based), in channel order."""
        return tuple(name for s in self.steps[:step] for name in s.learns)

    def learned_at(self, name: str) -> int:
        """The 1-based step that first teaches `name`."""
        return next(i for i, s in enumerate(self.steps, 1) if name in s.learns)


# ------------------------------------------------------------------------------- reading TOML


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file, with the line of a syntax error in the message."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError("file not found", where=path, next_step="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise SpecError(f"not a valid TOML file: {err}", where=path) from err


def expand_ids(ids: list[Any], where: object) -> tuple[str, ...]:
    """Case ids as text; `"61-80"` stands for all whole numbers from 61 to 80."""
    found: list[str] = []
    for item in ids:
        text = str(item)
        low, dash, high = text.partition("-")
        if dash and low.isdigit() and high.isdigit():
            if int(low) > int(high):
                raise SpecError("a range of cases runs backwards", where=where, got=text)
            found += [str(i) for i in range(int(low), int(high) + 1)]
        else:
            found.append(text)
    return tuple(found)


def _make(kind: type[T], values: dict[str, Any], where: object) -> T:
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]  # only dataclasses are passed
    for key in values:
        if key not in known:
            guess = closest(key, known)
            raise SpecError(
                f"unknown field {key!r}",
                where=where,
                expected=f"one of {', '.join(known)}",
                next_step=f"did you mean {guess!r}?" if guess else None,
            )
    try:
        return kind(**values)
    except TypeError as err:
        raise SpecError(f"incomplete {kind.__name__}: {err}", where=where) from err


def _value(text: str, where: object) -> int:
    """A label value, which TOML keys hold as text."""
    if not text.isdigit():
        raise SpecError("a label value is not a whole number", where=where, got=text)
    return int(text)


def load_split(path: Path) -> Split:
    """Read a split file: `train`, `validation`, `test` (ids or ranges) or `draw`, and `origin`."""
    return _split(read_toml(path), path.name, path)


def _split(raw: dict[str, Any], name: str, where: object) -> Split:
    for part in ("train", "validation", "test"):
        if part in raw and not isinstance(raw[part], list):
            raise SpecError(f"{part} must be a list of case ids", where=where, got=raw[part])
        raw[part] = expand_ids(raw.get(part, []), where)
    if "draw" in raw:
        raw["draw"] = _make(Draw, raw["draw"], f"{where}, draw")
    return _make(Split, {"name": name, **raw}, where)


def load_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file.

    A split is a path relative to the file, which may not leave its folder, or stands in the file.
    """
    raw = read_toml(path)
    folder = path.parent.resolve()

    def split(name: str | dict[str, Any], where: str) -> Split:
        if isinstance(name, dict):
            return _split(name, where.rpartition(", ")[2], where)
        target = (folder / name).resolve()
        if not target.is_relative_to(folder):
            raise SpecError(
                "a split file lies outside the benchmark's folder", where=path, got=name
            )
        return load_split(target)

    sources = []
    for item in raw.pop("source", []):
        where = f"{path}, source {item.get('name', '?')!r}"
        item["labels"] = {_value(k, where): v for k, v in item.get("labels", {}).items()}
        item["sides"] = {_value(k, where): tuple(v) for k, v in item.get("sides", {}).items()}
        item["ignored"] = tuple(item.get("ignored", ()))
        item["partial"] = tuple(
            _make(
                Partial,
                {
                    **p,
                    "cases": expand_ids(p.get("cases", []), where),
                    "annotates": tuple(p.get("annotates", ())),
                },
                where,
            )
            for p in item.get("partial", [])
        )
        sources.append(_make(Source, item, where))
    steps = []
    for item in raw.pop("step", []):
        where = f"{path}, step {item.get('name', '?')!r}"
        item["learns"] = tuple(item.get("learns", ()))
        for key in ("split", "phantom_split"):
            if key in item:
                item[key] = split(item[key], where)
        steps.append(_make(Step, item, where))
    pre = {
        k: tuple(v) if isinstance(v, list) else v for k, v in raw.pop("preprocessing", {}).items()
    }
    raw["groups"] = {k: tuple(v) for k, v in raw.get("groups", {}).items()}
    return _make(
        Benchmark,
        {
            **raw,
            "sources": tuple(sources),
            "steps": tuple(steps),
            "preprocessing": _make(Preprocessing, pre, path),
        },
        path,
    )
