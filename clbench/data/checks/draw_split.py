"""`clbench data split`: a split drawn from the cases at hand, and written as a split file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clbench.data.cache import VolumeCache, default_root
from clbench.data.checks.course_splits import file_names
from clbench.data.layouts import (
    CaseFiles,
    find_cases,
    find_layout,
    named_folders,
    natural,
    resolve_data,
)
from clbench.errors import ClbenchError, DataError, SettingError, did_you_mean
from clbench.spec import registry
from clbench.spec.benchmark import Source
from clbench.spec.splits import PARTS, Draw, Split
from clbench.store import files as store_files


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """What the command line asks for."""

    path: str
    """A folder, or `SOURCE=PATH`."""
    bench: str | None = None
    """Benchmark whose source lies there."""
    layout: str | None = None
    """Instead of a benchmark: how the folder is laid out."""
    train: int | None = None
    """Patients to learn from; None: those that are left."""
    validation: int | None = None
    """Patients for choices; None: one in ten."""
    test: int | None = None
    """Patients for the examination; None: one in five."""
    seed: int = 0
    """Changes the order of the patients."""
    needs: tuple[str, ...] = ()
    """Structures of which a case must hold a voxel."""
    without: tuple[str, ...] = ()
    """Cases that are not drawn."""
    cache: Path | None = None
    """Where what was read of labels is kept; None: the user's cache."""


@dataclass(frozen=True, kw_only=True)
class DrawnSplit:
    """A split, and what it was drawn from."""

    split: Split
    """Lists of case ids."""
    source: str
    """The source, or the layout where no benchmark was named."""
    patients: int
    """Patients it was drawn from."""
    bench: str | None
    """The benchmark named."""

    def lines(self, out: Path) -> Iterator[str]:
        """What was written, and how it is used."""
        count = ", ".join(f"{len(getattr(self.split, part))} {part}" for part in PARTS)
        yield f"{out}: {count} case(s), drawn from {self.patients} patient(s)"
        if self.bench is not None:
            word = shlex.quote(f"{self.source}={out}")
            yield f"use it with --bench {shlex.quote(self.bench)} --split {word}"
        else:
            yield f"use it with {shlex.quote(f'--split=SOURCE={out}')}"


def draw_split(settings: DrawSettings) -> DrawnSplit:
    """Draw by the rule of `Draw`: a seed and the names of the patients decide alone.

    Raises:
        SettingError: neither benchmark nor layout, needs without a benchmark, or a case to be left
            out that is not there.
        SpecError: too few patients.
        DataError: no cases.
    """
    if (settings.bench is None) == (settings.layout is None):
        raise SettingError(
            "a split is drawn from the source of a benchmark, or from a folder of a layout",
            expected="--bench BENCH or --layout LAYOUT",
            got="both" if settings.bench else "neither",
        )
    needs = set(settings.needs)
    patient: Callable[[str], str] = lambda case: case  # noqa: E731  # or the source's own
    fits: Callable[[str], bool] = lambda case: True  # noqa: E731
    if settings.layout is None:
        source, files = _source(settings.path, str(settings.bench))
        name, patient = source.name, source.patient_of
        if wrong := needs - set(source.structures):
            raise SettingError(
                "the source does not have a structure that is needed",
                where="--needs",
                expected=", ".join(source.structures),
                got=", ".join(sorted(wrong)),
            )
        if needs:
            cache = VolumeCache((settings.cache or default_root()) / "volumes")

            def fits(case: str) -> bool:
                return needs <= cache.holds(files[case], source)

    elif needs:
        raise SettingError(
            "without a benchmark nothing says what a label means",
            where="--needs",
            got=", ".join(settings.needs),
            next_step="name the benchmark with --bench, not --layout",
        )
    else:
        name = settings.layout
        files = find_layout(name, "--layout").find(Path(settings.path).expanduser())
    names = file_names(files)
    without = {case if case in files else names.get(case, case) for case in settings.without}
    if unknown := sorted(without - set(files)):
        raise SettingError(
            "a case to be left out is not there",
            where="--without",
            expected="ids of cases, or names of their files: "
            + ", ".join(sorted(files, key=natural)[:10])
            + ", …" * (len(files) > 10),
            got=", ".join(unknown),
            next_step=did_you_mean(unknown[0], [*files, *names]),
        )
    patients = {patient(case) for case in files if case not in without and fits(case)}
    rule = Draw(
        **_sizes(settings, len(patients)),
        seed=settings.seed,
        needs=settings.needs,
        without=tuple(sorted(without)),
        among=(),
    )
    said = f"drawn by `clbench data split`: seed {rule.seed}, from {len(patients)} patient(s) of "
    said += name + (f" that hold {', '.join(rule.needs)}" if rule.needs else "")
    said += f", without {', '.join(rule.without)}" if rule.without else ""
    split = Split(name=name, draw=rule, origin=said).resolve(files, patient=patient, fits=fits)
    return DrawnSplit(split=split, source=name, patients=len(patients), bench=settings.bench)


def _source(text: str, bench: str) -> tuple[Source, dict[str, CaseFiles]]:
    """The one source that `SOURCE=PATH` or a folder means, and its cases."""
    course = registry.benchmark(bench)
    names = [s.name for s in course.sources]
    named = named_folders(text, names)
    places = named if named is not None else dict.fromkeys(names, Path(text).expanduser())
    if len(places) == 1:
        source = course.reads(next(iter(places)))
        return source, find_cases(resolve_data(text, [source])[source.name], source)
    at_hand: dict[str, dict[str, CaseFiles]] = {}
    for name, place in places.items() if named is None else ():
        try:
            at_hand[name] = find_cases(place, course.reads(name))
        except ClbenchError:  # another source's folder
            continue
    if len(at_hand) != 1:
        raise DataError(
            "a split is drawn from one source at a time",
            where=text,
            expected=" or ".join(f"{name}=PATH" for name in names),
            got=f"a folder that may be of {', '.join(at_hand) or 'none of them'}"
            if named is None
            else text,
            next_step="write the source and its folder",
        )
    name = next(iter(at_hand))
    return course.reads(name), at_hand[name]


def _sizes(settings: DrawSettings, count: int) -> dict[str, int]:
    """Patients per part: as asked, and a fifth for test, a tenth for validation, the rest train."""
    test = max(1, round(count / 5)) if settings.test is None else settings.test
    validation = round(count / 10) if settings.validation is None else settings.validation
    train = max(1, count - test - validation) if settings.train is None else settings.train
    return {"train": train, "validation": validation, "test": test}


def write_split(split: Split, out: Path) -> None:
    """Write a split of lists as a split file.

    Raises:
        SettingError: the file is there, or its name does not end in .toml.
        StoreError: it cannot be written.
    """
    if out.suffix != ".toml" or out.exists():
        raise SettingError(
            "the split file is there already"
            if out.exists()
            else "a split file is called FILE.toml",
            where="--out",
            expected="the name of a new file that ends in .toml",
            got=out,
        )
    lines = [f"origin = {json.dumps(split.origin, ensure_ascii=False)}"]
    for part in PARTS:
        cases = ", ".join(json.dumps(c, ensure_ascii=False) for c in getattr(split, part))
        lines.append(f"{part} = [{cases}]")
    text = "\n".join(lines) + "\n"
    store_files.atomic_write(
        out,
        lambda file: file.write(text.encode()),
        what="the split file",
        next_step="name another file with --out, or change the permissions of its folder",
    )
