"""Which cases a course uses: its splits chosen, drawn, and checked against what is there.

`clbench run` and `clbench data check` call the same functions: each returns every problem. A run
raises the first, before anything is trained; a check lists them all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clbench.data.find_files import nifti_stem
from clbench.data.layouts import CaseFiles, find_layout, natural
from clbench.errors import ClbenchError, DataError, SettingError
from clbench.spec.benchmark import Benchmark, ExternalTest, Source, Step
from clbench.spec.settings import PhantomSettings
from clbench.spec.splits import PARTS, Draw, Split
from clbench.store.run_folder import case_name

Files = Mapping[str, Mapping[str, CaseFiles]]
"""Source → case → files."""
Course = Sequence[tuple[Step | ExternalTest, Split]]
"""The steps and external test sets looked at, in order, each with its split."""
USED = {"train": "trained on", "validation": "chosen by"}
"""What teaching does with the cases of a part: validation steers it, so it is no test either."""


TEST_CASES = 20
"""Test cases of a step on the phantom where neither course nor settings say how many: the paper
tests on 20 patients in each step of its body extension."""


def phantom_split(step: Step | ExternalTest, number: int, settings: PhantomSettings) -> Split:
    """The cases of a step on the phantom: its own list, or new subjects for every step.

    Args:
        step: the step, or the external test set.
        number: its 1-based place in the course file, external test sets after the steps; keeps
            the subjects of two steps apart.
        settings: numbers of training, validation and test subjects.
    """
    if step.given is not None:
        return step.split
    external = isinstance(step, ExternalTest)
    parts, title = (("test",), step.name) if external else (PARTS, f"step {number}")
    if step.phantom_split is not None:
        return _shorten(step.phantom_split, parts, settings)
    sizes = replace(settings, test=settings.test or TEST_CASES)
    ids = map(str, itertools.count(1000 * number))
    cases: dict[str, Any] = {
        part: tuple(itertools.islice(ids, getattr(sizes, part))) for part in parts
    }
    return Split(name=f"phantom, {title}", origin="clbench phantom", **cases)


def _shorten(split: Split, parts: Iterable[str], settings: PhantomSettings) -> Split:
    """The first cases of each of the parts, as many as asked for; all where that is not said."""
    first = {}
    for part in parts:
        have, asked = getattr(split, part), getattr(settings, part)
        want = len(have) if asked is None else asked
        if not (0 if part == "validation" else 1) <= want <= len(have):
            raise SettingError(
                f"the phantom split cannot give {want} {part} cases",
                where=f"phantom.{part}",
                expected=f"1 to {len(have)}",
                got=want,
            )
        first[part] = have[:want]
    return replace(split, **first)


def chosen(benchmark: Benchmark, replaced: Mapping[str, Split]) -> list[Split | None]:
    """Per step, and after them per external test set, the split the user named.

    Steps are named by step or by source, external test sets by source. A drawn split of a source
    that several steps use deals each of them its own block.

    Raises:
        SettingError: a name that is neither a source nor a step, or whose split nothing would use.
        SpecError: no training cases for a step, or training cases for an external test set.
    """
    known = {*(s.name for s in benchmark.sources), *(s.name for s in benchmark.steps)}
    for name in replaced:
        if name not in known:
            raise SettingError(
                f"--split names neither a source nor a step of the benchmark: {name!r}",
                expected=", ".join(sorted(known)),
            )
    _refuse_unused(benchmark, replaced)
    named: list[Split | None] = []
    for i, step in enumerate(benchmark.steps):
        if step.given is not None:
            named.append(step.split)
            continue
        split = replaced.get(step.name) or replaced.get(step.source)
        if split is not None and split.draw is not None and step.name not in replaced:
            listed = zip(benchmark.steps, benchmark.listed, strict=False)
            block = 1 + sum(
                s.source == step.source and place < benchmark.listed[i] for s, place in listed
            )
            split = replace(split, draw=replace(split.draw, part=block))
        if split is not None:
            split.need_training()
        named.append(split)
    for external in benchmark.external_tests:
        split = replaced.get(external.source)
        if split is not None:
            external.need_no_training(split)
        named.append(split)
    return named


def _refuse_unused(benchmark: Benchmark, replaced: Mapping[str, Split]) -> None:
    """Refuse a split that no step would take, and a block of one that deals blocks itself.

    Raises:
        SettingError: every step of the source has a split of its own, or no step reads it; or
            `part` in a rule that is given for a source.
    """
    steps = {step.name for step in benchmark.steps}
    used = steps | {external.source for external in benchmark.external_tests}
    used |= {step.source for step in benchmark.steps if step.name not in replaced}
    for name, split in replaced.items():
        if name not in used:
            theirs = [s.name for s in benchmark.steps if s.source == name]
            raise SettingError(
                "a split is given that nothing would use",
                where=f"--split {name}=…",
                expected="the split of a source, or of each of its steps",
                got=f"splits of their own for {', '.join(theirs)}"
                if theirs
                else f"no step or external test set reads {name}",
                next_step=f"leave --split {name}=… out",
            )
        if name not in steps and split.draw is not None and split.draw.part != 1:
            raise SettingError(
                "a split drawn for a source deals each of its steps a block of its own",
                where=f"--split {name}=…, draw.part",
                expected="no `part`, or a split per step",
                got=split.draw.part,
                next_step="name the step: --split STEP=FILE.toml, or take `part` out of the file",
            )


def settle(
    course: Course,
    benchmark: Benchmark,
    files: Files,
    folders: Mapping[str, Path],
    *,
    holds: Callable[[str, str], frozenset[str]] | None,
) -> tuple[list[tuple[Step | ExternalTest, Split]], list[ClbenchError]]:
    """Every split as lists of ids that are at hand.

    Args:
        course: steps with their splits: lists, or rules that draw.
        benchmark: the course they belong to.
        files: source → case → files at hand.
        folders: source → where they were looked for.
        holds: (source, case) → structures of which it holds a voxel; None: take every case for one
            that holds what a rule needs.

    Returns:
        The steps and external test sets whose cases are all there, and what is wrong with the
        others.
    """
    settled: list[tuple[Step | ExternalTest, Split]] = []
    problems: list[ClbenchError] = []
    for step, split in course:
        if step.given is not None and not split.cases:
            settled.append((step, split))
            continue
        source, have = benchmark.reads(step.source), files[step.source]
        try:
            split = resolve(split, source, have, holds)
        except ClbenchError as err:
            problems.append(err)
            continue
        if (error := missing(split, source, have, folders[step.source])) is not None:
            problems.append(error)
        else:
            settled.append((step, split))
    return settled, problems


def resolve(
    split: Split,
    source: Source,
    files: Mapping[str, CaseFiles],
    holds: Callable[[str, str], frozenset[str]] | None,
) -> Split:
    """A split by rule becomes lists, and names of files become case ids.

    Args:
        split: lists of case ids, or a rule.
        source: the data set; must have the structures that the rule needs.
        files: case id → files of the case.
        holds: see `settle`.

    Raises:
        SettingError: the rule needs structures that the source does not have.
        SpecError: too few patients, or a case that is listed twice under two spellings.
    """
    needs = set(split.draw.needs) if split.draw is not None else set()
    if wrong := needs - set(source.structures):
        raise SettingError(
            "a drawn split needs structures its source does not have",
            where=f"split {split.name!r}, draw.needs",
            expected=", ".join(source.structures),
            got=", ".join(sorted(wrong)),
        )
    return _with_case_ids(split, files).resolve(
        files,
        patient=source.patient_of,
        fits=lambda case: not needs or holds is None or needs <= holds(source.name, case),
    )


def _with_case_ids(split: Split, files: Mapping[str, CaseFiles]) -> Split:
    """A split in which an id that is no case, but the name of a case's file, is that case's id."""
    rule = split.draw
    without, among = ((), ()) if rule is None else (rule.without, rule.among)
    if all(case in files for case in (*split.cases, *without, *among)):
        return split
    names = file_names(files)

    def ids(cases: Iterable[str]) -> tuple[str, ...]:
        return tuple(c if c in files else names.get(c, c) for c in cases)

    if rule is not None:
        return replace(split, draw=replace(rule, without=ids(without), among=ids(among)))
    return replace(
        split, train=ids(split.train), validation=ids(split.validation), test=ids(split.test)
    )


def file_names(files: Mapping[str, CaseFiles]) -> dict[str, str]:
    """What else a user may call a case: the name of its image or label file or of its folder → id.

    With and without ending, and a number as the name writes it (`img0001`, `img0001.nii.gz` and
    `0001` for case 1). A name that several cases share, such as `ct`, is none.
    """
    cases: dict[str, set[str]] = {}
    for case, place in files.items():
        for path in place.files if isinstance(place.label, Path) else (place.image,):
            stem = nifti_stem(path) or path.name
            folder = path.parent.name
            found = (n for name in (stem, folder) for n in re.findall(r"\d+", name))
            numbers = [n for n in found if str(int(n)) == case]
            for name in {stem, path.name, folder, *numbers} - {case}:
                cases.setdefault(name, set()).add(case)
    return {name: next(iter(ids)) for name, ids in cases.items() if len(ids) == 1}


def missing(
    split: Split, source: Source, have: Mapping[str, CaseFiles], folder: Path
) -> DataError | None:
    """The problem of a split that names cases the folder does not hold.

    Args:
        split: lists of case ids.
        source: the data set, named in the advice.
        have: case id → files at hand.
        folder: where they were looked for.
    """
    absent = [c for c in split.cases if c not in have]
    if not absent:
        return None
    alone = find_layout(source.layout).unpaired(folder)
    if half := [c for c in absent if c in alone]:
        return DataError(
            f"the split names {len(half)} case(s) of which one file is missing",
            where=folder,
            expected="an image and a label for each",
            got="; ".join(f"case {c} {alone[c]}" for c in half[:5]),
            next_step="add the file, or leave the case out of the split",
        )
    return DataError(
        f"the split names {len(absent)} cases that the data folder does not hold",
        where=folder,
        expected=f"all cases of {split.name}",
        got=f"missing: {_some(absent)}; in the folder: {_some(sorted(have, key=natural))}",
        next_step=_ranges(absent)
        + f"add the files, or choose yours with --split {source.name}=FILE.toml (`clbench data "
        "split` draws one)" + (" (btcv_public: the 30 public volumes)" * (source.name == "btcv")),
    )


def _some(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)})" if len(names) > most else "") or "none"


def _ranges(absent: Sequence[str]) -> str:
    """Advice for ids that clbench 0.1.0 took for ranges."""
    old = [c for c in absent if re.fullmatch(r"\d+-\d+", c)]
    return f"for a range of cases write {old[0].replace('-', '..')!r}; else " if old else ""


def cases_of(course: Course) -> dict[str, list[str]]:
    """Source → its cases in the splits of a course, each once."""
    cases: dict[str, dict[str, None]] = {}
    for step, split in course:
        cases.setdefault(step.source, {}).update(dict.fromkeys(split.cases))
    return {name: list(of_source) for name, of_source in cases.items()}


def course_problems(
    course: Course, benchmark: Benchmark, files: Files, *, patients: bool
) -> Iterator[ClbenchError]:
    """What stands against a course by the names of its cases alone.

    Args:
        course: the steps with their splits, all lists of cases at hand.
        benchmark: the course they belong to.
        files: source → case → files.
        patients: whether cases are scans of patients; False on the phantom.
    """
    for name in files:
        yield from _partial(benchmark.source(name), files[name])
    yield from _not_annotated(course, benchmark, files)
    yield from _one_name(course)
    yield from _same_patient(course, benchmark, _people(benchmark, files) if patients else None)


def _partial(source: Source, files: Mapping[str, CaseFiles]) -> Iterable[DataError]:
    """A `[[source.partial]]` that names cases by their files: it would not hold for any."""
    listed = [c for part in source.partial for c in part.cases if c not in files]
    names = file_names(files) if listed else {}
    if wrong := [c for c in listed if c in names]:
        yield DataError(
            "a [[source.partial]] names cases by their files",
            where=f"source {source.name!r}",
            expected=_some([names[c] for c in wrong]),
            got=_some(wrong),
            next_step="write the case ids, as `clbench data check` lists them",
        )


def _not_annotated(course: Course, benchmark: Benchmark, files: Files) -> Iterable[DataError]:
    """Steps that learn what none of their training cases annotates."""
    for step, split in course:
        taught = (*step.learns, *step.again)
        if step.given is not None or not taught:
            continue
        source = benchmark.reads(step.source)
        have = {n for c in split.train for n in files[step.source][c].annotated(source)}
        if absent := [n for n in taught if n not in have]:
            yield DataError(
                f"no training case of the step annotates {', '.join(absent)}",
                where=f"step {step.name!r}, split {split.name!r}",
                expected="each structure a step learns in one training case at least",
                got=f"annotated: {', '.join(n for n in source.structures if n in have)}",
                next_step="choose other training cases, or take it out of `learns`",
            )


def _one_name(course: Course) -> Iterable[DataError]:
    """Test cases of two sources whose files in a run would have one name: b_1 of a, 1 of a_b."""
    first: dict[str, tuple[str, str]] = {}
    for step, split in course:
        for case in split.test:
            name, own = case_name(step.source, case), (step.source, case)
            if (other := first.setdefault(name, own)) != own:
                yield DataError(
                    "two test cases would have one file in the run",
                    where=f"{step.source} case {case}, test of step {step.name!r}",
                    expected="source_case to differ from that of every other test case",
                    got=f"{name}, as of {other[0]} case {other[1]}",
                    next_step="rename one of the two sources in the course file",
                )


def unmatched(course: Course, files: Files, drawn: Sequence[Split]) -> list[str]:
    """A line for every list of a rule that names what is no case at hand, and hence does nothing.

    Args:
        course: the steps with their splits.
        files: source → case → files.
        drawn: the splits as they were asked for, in the same order: with their rules.
    """
    lines: dict[str, None] = {}
    for (step, _), split in zip(course, drawn, strict=True):
        if split.draw is None:
            continue
        have = files[step.source]
        rule = _with_case_ids(split, have).draw
        for word in ("without", "among"):
            if strange := [c for c in getattr(rule, word) if c not in have]:
                said = f"`{word}` of split {split.name!r}: no case of {step.source} is "
                lines[said + _some(strange, 5)] = None
    return list(lines)


def _rules(
    course: Course, benchmark: Benchmark, files: Files
) -> Iterator[tuple[Step | ExternalTest, Draw, list[list[str]]]]:
    """Steps whose split a rule draws, the rule, and the cases of each patient it may take."""
    for step, split in course:
        have = files.get(step.source, {})
        if (rule := _with_case_ids(split, have).draw) is not None:
            patient_of = benchmark.source(step.source).patient_of
            yield step, rule, rule.candidates(have, patient_of)


def asked_first(course: Course, benchmark: Benchmark, files: Files) -> list[tuple[str, str]]:
    """(source, case) of those that drawing surely asks what they hold, each once.

    Args:
        course: the steps with their splits as they were asked for: with their rules.
        benchmark: the course they belong to.
        files: source → case → files at hand.
    """
    cases = [
        (step.source, case)
        for step, rule, patients in _rules(course, benchmark, files)
        if rule.needs
        for of_patient in patients[: rule.part * rule.size]
        for case in of_patient
    ]
    return list(dict.fromkeys(cases))


def drawn_from(course: Course, benchmark: Benchmark, files: Files) -> list[str]:
    """A line for every split that a rule draws: one patient more at hand may change it.

    Args:
        course: the steps with their splits as they were asked for: with their rules.
        benchmark: the course they belong to.
        files: source → case → files at hand.
    """
    return [
        f"the split of step {step.name!r} is drawn from {len(patients)} patients of {step.source}, "
        "and may be another one where there are others: freeze it with `clbench data split`"
        for step, _, patients in _rules(course, benchmark, files)
    ]


def _people(benchmark: Benchmark, files: Files) -> dict[tuple[str, str], tuple[str, str]]:
    """(source, patient) → the first of those who are one person: their sources share an image.

    Two sources may read one folder, for other cases or with other rules of whose case it is.

    Args:
        benchmark: the course.
        files: source → case → files.
    """
    person: dict[tuple[str, str], tuple[str, str]] = {}
    of_image: dict[Path, tuple[str, str]] = {}

    def first(key: tuple[str, str]) -> tuple[str, str]:
        while person.setdefault(key, key) != key:
            key = person[key]
        return key

    for name, cases in files.items():
        source = benchmark.source(name)
        for case, place in cases.items():
            try:
                key = first((name, source.patient_of(case)))
            except ClbenchError:  # said where the case is used
                continue
            person[key] = first(of_image.setdefault(place.image.resolve(), key))
    return {key: first(key) for key in list(person)}


def _same_patient(
    course: Course,
    benchmark: Benchmark,
    people: Mapping[tuple[str, str], tuple[str, str]] | None,
) -> Iterable[ClbenchError]:
    """A patient who stands in two parts, of one step or of two.

    Args:
        course: the steps with their splits.
        benchmark: the course they belong to.
        people: see `_people`; None: cases are no scans of patients.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for part, step, case in _by_part(course):
        source = benchmark.source(step.source)
        try:
            own = (source.name, case if people is None else source.patient_of(case))
            key = own if people is None else people.get(own, own)
        except ClbenchError as err:  # an id that does not say whose it is
            yield err
            continue
        told = f"{case} of step {step.name!r}"
        other, where = seen.setdefault(key, (part, told))
        if other != part:
            yield DataError(
                f"the same patient is in {other} and in {part}",
                where=f"{source.name} case {case}, {part} of step {step.name!r}",
                expected="each patient in one part, in whatever step",
                got=f"patient {key[1]} is {USED[other]} as case {where}",
                next_step="remove one of the two from its split; rules of one source draw apart "
                "where they have one seed, one size and one `needs`",
            )


def _by_part(course: Course) -> Iterator[tuple[str, Step | ExternalTest, str]]:
    """Every case a course names, with its part and step: all cases that train, then the others."""
    for part in PARTS:
        for step, split in course:
            for case in getattr(split, part):
                yield part, step, case


def content_problems(course: Course, image_hash: Callable[[str, str], str]) -> Iterator[DataError]:
    """One image under two names, in whatever parts, steps and sources of a course.

    In train and test it is a leak; within test it is one patient who counts as several in every
    mean and p-value; within train it counts twice, and opens the past under another name.

    Args:
        course: the steps with their splits, all lists of cases at hand.
        image_hash: (source, case) → digest of the image's voxels.
    """
    seen: dict[str, tuple[str, str]] = {}
    named: set[tuple[str, str]] = set()
    for part, step, case in _by_part(course):
        if (step.source, case) in named:
            continue  # one name in several steps is one case
        named.add((step.source, case))
        where = f"{step.source} case {case}, {part} of step {step.name!r}"
        other, first = seen.setdefault(image_hash(step.source, case), (part, where))
        if first != where:
            yield DataError(
                f"the same image stands under two names in {part}"
                if other == part
                else f"the same case is in {other} and in {part}",
                where=where,
                expected="every image under one name, in one part",
                got=f"its image is that of {first}",
                next_step="remove one of the two from its split",
            )
