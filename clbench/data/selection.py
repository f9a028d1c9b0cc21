"""Which cases a course uses: its splits chosen, drawn, and checked against what is there.

Room: row 2. Every refusal here comes before anything is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clbench.data.cache import VolumeCache
from clbench.data.folders import CaseFiles
from clbench.errors import DataError, SettingError
from clbench.settings import PhantomSettings
from clbench.spec import Benchmark, Source, Step
from clbench.splits import PARTS, Split

Files = Mapping[str, Mapping[str, CaseFiles]]
"""Source → case → files."""


def phantom_split(step: Step, number: int, settings: PhantomSettings) -> Split:
    """The cases of a step on the phantom: its own list, or new subjects for every step."""
    if step.phantom_split is not None:
        return _shorten(step.phantom_split, settings)
    sizes = (settings.train, settings.validation, settings.test)
    ids = iter(range(1000 * number, 1000 * number + sum(sizes)))
    train, validation, test = (tuple(str(next(ids)) for _ in range(n)) for n in sizes)
    return Split(
        name=f"phantom, step {number}",
        train=train,
        validation=validation,
        test=test,
        origin="clbench phantom",
    )


def chosen(benchmark: Benchmark, replaced: Mapping[str, Split]) -> list[Split | None]:
    """Per step the split the user named, by step or by source.

    A drawn split of a source that several steps use deals each of them its own block.
    """
    known = {*(s.name for s in benchmark.sources), *(s.name for s in benchmark.steps)}
    for name in replaced:
        if name not in known:
            raise SettingError(
                f"--split names neither a source nor a step of the benchmark: {name!r}",
                expected=", ".join(sorted(known)),
            )
    found: list[Split | None] = []
    for i, step in enumerate(benchmark.steps):
        split = replaced.get(step.name) or replaced.get(step.source)
        if split is not None and split.draw is not None and step.name not in replaced:
            block = 1 + sum(s.source == step.source for s in benchmark.steps[:i])
            split = replace(split, draw=replace(split.draw, part=block))
        found.append(split)
    return found


def _shorten(split: Split, settings: PhantomSettings) -> Split:
    """The first cases of each part, as many as the settings ask for."""
    parts = {}
    for part in ("train", "validation", "test"):
        have, want = getattr(split, part), getattr(settings, part)
        if not (0 if part == "validation" else 1) <= want <= len(have):
            raise SettingError(
                f"the phantom split cannot give {want} {part} cases",
                where=f"phantom.{part}",
                expected=f"1 to {len(have)}",
                got=want,
            )
        parts[part] = have[:want]
    return replace(split, **parts)


def resolve(
    split: Split, source: Source, files: Mapping[str, CaseFiles], cache: VolumeCache
) -> Split:
    """A split by rule becomes lists."""
    needs = set(split.draw.needs) if split.draw is not None else set()
    if wrong := needs - set(source.structures):
        raise SettingError(
            "a drawn split needs structures its source does not have",
            where=f"split {split.name!r}, draw.needs",
            expected=", ".join(source.structures),
            got=", ".join(sorted(wrong)),
        )
    return split.resolve(
        files,
        patient=source.patient_of,
        fits=lambda case: not needs or needs <= cache.holds(files[case], source),
    )


def missing(split: Split, source: Source, have: Mapping[str, CaseFiles], folder: Path) -> None:
    """Refuse a split that names cases the folder does not hold."""
    if absent := [c for c in split.cases if c not in have]:
        raise DataError(
            f"the split names {len(absent)} cases that the data folder does not hold",
            where=folder,
            expected=f"all cases of {split.name}",
            got=f"missing: {', '.join(absent[:20])}{' …' if len(absent) > 20 else ''}",
            next_step=f"add the files, or choose yours with --split {source.name}=FILE.toml"
            + (" (btcv_public: the 30 public volumes)" if source.name == "btcv" else ""),
        )


def taught(benchmark: Benchmark, splits: Sequence[Split], files: Files) -> None:
    """Refuse a step that learns what none of its training cases annotates."""
    for step, split in zip(benchmark.steps, splits, strict=True):
        source = benchmark.reads(step.source)
        have = {n for c in split.train for n in files[step.source][c].annotated(source)}
        if absent := [n for n in step.learns if n not in have]:
            raise DataError(
                f"no training case of the step annotates {', '.join(absent)}",
                where=f"step {step.name!r}, split {split.name!r}",
                expected="each structure a step learns in one training case at least",
                got=f"annotated: {', '.join(n for n in source.structures if n in have)}",
                next_step="choose other training cases, or take it out of `learns`",
            )


USED = {"train": "trained on", "validation": "chosen by"}
"""What teaching does with the cases of a part: validation steers it, so it is no test either."""


def same_patient(benchmark: Benchmark, splits: Sequence[Split], *, patients: bool) -> None:
    """Refuse a patient of a source who is taught from in one step and tested in any.

    On the phantom (`patients` false) every case is a subject of its own.
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for part in PARTS:
        for step, split in zip(benchmark.steps, splits, strict=True):
            source = benchmark.source(step.source)
            for case in getattr(split, part):
                key = (source.name, source.patient_of(case) if patients else case)
                if part in USED:
                    seen.setdefault(key, (part, f"{case} of step {step.name!r}"))
                elif key in seen:
                    other, where = seen[key]
                    raise DataError(
                        f"the same patient is in {other} and in test",
                        where=f"{source.name} case {case}, test of step {step.name!r}",
                        expected="no patient of a test case in train or validation of any step",
                        got=f"patient {key[1]} is {USED[other]} as case {where}",
                        next_step="remove one of the two from its split",
                    )


def same_content(
    benchmark: Benchmark,
    splits: Sequence[Split],
    hashes: Mapping[tuple[str, str], str],
) -> None:
    """Refuse a test case whose image is also taught from, in any step and under any name."""
    seen: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for step, split in zip(benchmark.steps, splits, strict=True):
            for case in getattr(split, part):
                image = hashes[step.source, case]
                if part in USED:
                    seen.setdefault(image, (part, f"{step.source} case {case}"))
                elif image in seen:
                    other, twin = seen[image]
                    raise DataError(
                        f"the same case is in {other} and in test",
                        where=f"{step.source} case {case}",
                        expected="no test case in train or validation of any step",
                        got=f"its image is that of {twin}",
                        next_step="remove one of the two from its split file",
                    )
