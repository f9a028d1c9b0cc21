"""Annotated CTs of one's own: layout, label values and split, for one more step of a course."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from clbench.data.cache import VolumeCache
from clbench.data.external_masks import LISTS, label_map, said_others
from clbench.data.labels import values_of
from clbench.data.layouts import (
    CaseFiles,
    cases_in,
    folder_hints,
    glimpse,
    natural,
    need_folder,
    recognised,
)
from clbench.errors import DataError, SettingError, UnknownName
from clbench.run.prepare import look
from clbench.spec.benchmark import Partial, Source
from clbench.spec.splits import PARTS, Draw, Split
from clbench.spec.taxonomy import (
    DECLARED,
    Kind,
    Structure,
    ancestors,
    canonical,
    declare,
    depth,
)

KINDS: Mapping[str, Kind] = {
    "cyst": "cyst", "tumor": "tumor", "tumour": "tumor", "lesion": "tumor", "metastasis": "tumor",
    "nodule": "tumor", "artery": "vessel", "vein": "vessel", "vessel": "vessel", "aorta": "vessel",
    "duct": "duct", "stent": "device", "catheter": "device",
}  # fmt: skip
"""Last word of a structure's name → its kind, where `--kind` does not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnData:
    """A folder of annotated CTs."""

    folder: Path
    """Where they lie."""
    source: Source
    """Layout and meaning of the labels."""
    split: Split
    """Which cases train, validate and test."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the folder was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OldData:
    """Annotated CTs of structures that a model knows; it is tested on them."""

    folder: Path
    """Where they lie."""
    source: Source
    """Layout and meaning of the labels."""
    cases: tuple[str, ...]
    """All of them."""
    annotated: tuple[str, ...]
    """Structures of the model that they annotate, in its order."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the folder was read."""

    def source_of(self, structures: Sequence[str]) -> Source:
        """The source for a step of some structures; cases annotate those of them that they have."""
        absent = [n for n in structures if n not in self.source.structures]
        if not absent:
            return self.source
        if self.source.masks:
            named: dict[str, Any] = {"masks": {**self.source.masks, **{n: n for n in absent}}}
        else:  # values that no label map holds, as a step's source must name what it learns
            free = (v for v in count(1) if v not in {*self.source.labels, *self.source.ignored})
            named = {"labels": {**self.source.labels, **dict(zip(free, absent, strict=False))}}
        have = Partial(cases=self.cases, annotates=self.source.structures)
        return replace(self.source, partial=(have,), **named)


def new_structures(
    labels: Sequence[str], *, kind: str | None = None, inside: str | None = None
) -> tuple[tuple[str, ...], tuple[Structure, ...]]:
    """The structures to learn; those clbench does not have are declared.

    Args:
        labels: names: clbench's own, those of public data sets, or new ones in snake case.
        kind: of new ones: organ, vessel, duct, device, tumor or cyst; None: by the last word of the
            name, else an organ.
        inside: the structure that contains the new ones; None: none does.

    Returns:
        Canonical names, and what was declared.

    Raises:
        SettingError: a kind that does not exist, or nothing to declare with it.
        SpecError: a name that cannot be one.
        UnknownName: no structure is called as `inside`.
    """
    names: list[str] = []
    declared: list[Structure] = []
    for label in labels:
        try:
            names.append(canonical(label))
            if (known := DECLARED.get(names[-1])) is not None:
                _refuse_otherwise(known, kind, inside)
                declared.append(known)
        except UnknownName:
            guess = KINDS.get(label.rpartition("_")[2], "organ")
            declared.append(
                Structure(
                    name=label,
                    prompt=label.replace("_", " "),
                    kind=kind or guess,  # type: ignore[arg-type]  # checked by the dataclass
                    parent=None if inside is None else canonical(inside),
                )
            )
            names.append(label)
    if (kind or inside) and not declared:
        raise SettingError(
            "clbench has the structures already: what they are is fixed",
            where="--kind" if kind else "--inside",
            got=", ".join(names),
            next_step="leave the option out, or give the structure a name of its own",
        )
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SettingError("a structure is named twice", where="--learn", got=", ".join(twice))
    declare(declared, "--learn")
    return tuple(names), tuple(declared)


def _refuse_otherwise(known: Structure, kind: str | None, inside: str | None) -> None:
    """Refuse what is said of a structure that a course has declared already, and otherwise."""
    for option, said, is_ in (
        ("--kind", kind, known.kind),
        ("--inside", None if inside is None else canonical(inside), known.parent),
    ):
        if said not in (None, is_):
            raise SettingError(
                f"{known.name} is declared already, and otherwise",
                where=option,
                expected=is_ or "nothing: no structure contains it",
                got=said,
                next_step="leave the option out, or give the structure a name of its own",
            )


def read_own_data(
    folder: Path,
    *,
    learn: Sequence[str],
    name: str,
    cache: VolumeCache,
    layout: str | None = None,
    labels: Path | None = None,
    patient: str = "(.+)",
    split: Split | None = None,
    seed: int = 0,
) -> OwnData:
    """Find the cases of a folder, what their labels mean, and which of them train and test.

    Args:
        folder: the data.
        learn: structures to learn; known to the taxonomy.
        name: of the source.
        cache: remembers which structures a case holds.
        layout: how it is laid out; None: as its names say.
        labels: file of label values; None: `dataset.json` or `labels.json` in the folder.
        patient: regular expression whose one group is the patient within a case id.
        split: lists of cases; None: a fifth of the patients who have a structure to learn is for
            test, a tenth for validation, and all others are for training.
        seed: changes who is drawn.

    Raises:
        DataError: no cases, labels without meaning, or too few cases that hold a structure.
        SettingError, SpecError: a wrong layout, name or expression.
    """
    layout, files = _cases(folder, layout)
    source, notes = _source(folder, files, learn, name, layout, labels, patient)
    named = {case: of_case.named(source) for case, of_case in files.items()}
    look(cache, [(1, source, of_case) for of_case in named.values()], "values")
    holds = {case: cache.holds(of_case, source) for case, of_case in named.items()}
    drawn = split or _split(folder, source, holds, learn, seed)
    return OwnData(folder=folder, source=source, split=drawn, notes=notes)


def read_old_data(
    folder: Path, *, known: Sequence[str], name: str, patient: str = "(.+)"
) -> OldData:
    """Find cases that annotate structures a model knows; all of them are for test.

    Args:
        folder: the data; the names in its `dataset.json`, or of its mask files, say what is what.
        known: structures of the model.
        name: of the source.
        patient: regular expression whose one group is the patient within a case id.

    Raises:
        DataError: no cases, labels without meaning, or none of the structures.
        SettingError, SpecError: a wrong name or expression.
    """
    layout, files = _cases(folder, None, "--old-data")
    source, notes = _source(folder, files, (), name, layout, None, patient)
    annotated = tuple(n for n in known if n in source.structures)
    if not annotated:
        raise DataError(
            "the cases annotate no structure that the model knows",
            where=f"--old-data {folder}",
            expected=f"one or more of {', '.join(known)}",
            got=(", ".join(source.structures) or "no structure") + "; ".join(("", *notes)),
            next_step="name its labels in dataset.json as the model's, or leave --old-data out",
        )
    cases = tuple(sorted(files, key=natural))
    return OldData(folder=folder, source=source, cases=cases, annotated=annotated, notes=notes)


def _cases(
    folder: Path, layout: str | None, option: str = "--data"
) -> tuple[str, dict[str, CaseFiles]]:
    """Layout and annotated cases of a folder that an option names."""
    need_folder(folder, option)
    if layout is None:
        layout = next(iter(recognised(folder)), None)
    if layout is None:
        raise DataError(
            "no annotated cases in this folder",
            where=folder,
            expected="imagesTr/CASE_0000.nii.gz + labelsTr/CASE.nii.gz and dataset.json, or "
            "another layout of `clbench list layouts`",
            got=glimpse(folder),
            next_step="; ".join(folder_hints(folder)) or "lay the files out like this",
        )
    return layout, cases_in(folder, layout, "--layout")


# ------------------------------------------------------------------------------ meaning of labels


def _source(
    folder: Path,
    files: Mapping[str, CaseFiles],
    learn: Sequence[str],
    name: str,
    layout: str,
    labels: Path | None,
    patient: str,
) -> tuple[Source, tuple[str, ...]]:
    first = next(iter(files.values()))
    title = f"own CTs in {folder.absolute().name}"
    if not isinstance(first.label, Path):
        if labels is not None:
            raise SettingError(
                "the folder holds a mask per structure, and no label values",
                where=f"--labels {labels}",
                expected="masks called by their structures",
                got=f"the layout {layout}",
                next_step="leave --labels out; rename masks where no structure is called so",
            )
        stems = sorted(
            {s for f in files.values() if isinstance(f.label, tuple) for s, _ in f.label}
        )
        masks = {stem: known for stem in stems if (known := _known(stem)) is not None}
        passed = [stem for stem in stems if stem not in masks]
        _need(learn, masks.values(), folder, passed)
        source = Source(name=name, title=title, layout=layout, masks=masks, patient=patient)
    else:
        values, passed = _values(folder, files, learn, labels)
        _need(learn, values.values(), folder, passed)
        source = Source(
            name=name,
            title=title,
            layout=layout,
            labels={value: structure for value, structure in values.items() if structure},
            ignored=tuple(value for value, structure in values.items() if value and not structure),
            patient=patient,
        )
    note = f"not used, no structure is called so: {', '.join(passed)}"
    return source, (note,) if passed else ()


def _known(word: str) -> str | None:
    try:
        return canonical(word)
    except UnknownName:
        return None


def _values(
    folder: Path, files: Mapping[str, CaseFiles], learn: Sequence[str], labels: Path | None
) -> tuple[dict[int, str], list[str]]:
    """Label value → structure, empty for what counts as background; and names nobody has."""
    lists = (
        [labels] if labels is not None else [folder / n for n in LISTS if (folder / n).is_file()]
    )
    if not lists:
        there = sorted({v for f in files.values() for path in f.files[1:] for v in values_of(path)})
        if len(learn) == 1 and len([v for v in there if v]) == 1:
            return {there[-1]: learn[0]}, []
        raise DataError(
            "nothing says what the label values mean",
            where=folder,
            expected=f"one label value for one structure, or {folder / LISTS[0]} with "
            f'{{"labels": {{"background": 0, "{learn[0] if learn else "liver"}": 1, …}}}}',
            got=f"values {', '.join(map(str, there))} in {len(files)} cases",
            next_step="write that file, or name one with --labels",
        )
    read = label_map(lists[0])
    values = {}
    for value, names in read.structures.items():
        inner = sorted(names, key=depth)[-1:]
        if outside := set(names) - {*inner, *(a for n in inner for a in ancestors(n))}:
            raise DataError(
                "one label value stands for several structures",
                where=lists[0],
                expected="a value for each structure, or for one inside another",
                got=f"{value}: {', '.join(sorted(outside))} and {inner[0]}",
                next_step="give --labels a file with one structure per value",
            )
        values[value] = inner[0] if inner else ""
    return values, list(read.others)


def _need(learn: Sequence[str], there: Iterable[str], folder: Path, passed: Sequence[str]) -> None:
    have = [n for n in there if n]
    if absent := [n for n in learn if n not in have]:
        raise DataError(
            f"the data does not annotate {', '.join(absent)}",
            where=folder,
            expected="a label value or mask for each structure to learn",
            got=(", ".join(dict.fromkeys(have)) or "no structure") + said_others(passed),
            next_step="name it in dataset.json (or a file for --labels) as --learn does",
        )


# ------------------------------------------------------------------------------------------ split


def _split(
    folder: Path,
    source: Source,
    holds: Mapping[str, frozenset[str]],
    learn: Sequence[str],
    seed: int,
) -> Split:
    """Patients who have a structure to learn are dealt out, all others are for training."""
    wanted = set(learn)
    patient_of = {case: source.patient_of(case) for case in holds}
    having = {patient_of[case] for case, names in holds.items() if wanted & names}
    for name in learn:
        patients = {patient_of[case] for case, names in holds.items() if name in names}
        if len(patients) < 2:
            raise DataError(
                f"too few cases hold {name}",
                where=folder,
                expected="two patients at least: one to learn from, one to test on",
                got=f"{len(patients)} of {len(set(patient_of.values()))}"
                + (f" (patient {next(iter(patients))})" if patients else ""),
                next_step="add annotated cases; ten are a good number"
                if patients
                else "add cases that hold it, or correct the label values",
            )
    count = len(having)
    test, validation = max(1, round(count / 5)), round(count / 10)
    rule = Draw(seed=seed, train=count - test - validation, validation=validation, test=test)
    dealt = rule.deal(
        [case for case in holds if patient_of[case] in having],
        patient=patient_of.__getitem__,
        fits=lambda case: True,
        where="--data",
    )
    dealt["train"] = (*dealt["train"], *(c for c in holds if patient_of[c] not in having))
    for name in learn:
        if not any(name in holds[case] for case in dealt["train"]):
            raise DataError(
                f"no training case holds {name}",
                where=folder,
                got=f"it is in {', '.join(c for c, names in holds.items() if name in names)} alone",
                next_step="choose the cases yourself with --split FILE.toml, or learn one "
                "structure after the other",
            )
    return Split(
        name=f"{source.name}, drawn",
        origin=f"drawn from {len(holds)} cases of {folder.absolute().name}, seed {seed}",
        **{part: tuple(sorted(dealt[part], key=natural)) for part in PARTS},  # type: ignore[arg-type]  # keys are PARTS
    )


def plain_name(text: str) -> str:
    """A name as clbench writes names: small letters, digits and _."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def source_name(folder: Path, taken: Sequence[str]) -> str:
    """A name for the source of a folder, after the folder's.

    Args:
        folder: the data.
        taken: names of the other sources.
    """
    plain = plain_name(folder.absolute().name)[:40] or "own"
    names = (plain, *(f"{plain}_{i}" for i in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)
