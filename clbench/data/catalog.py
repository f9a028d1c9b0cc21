"""The cases of one course: found on disk or made as the phantom, opened one by one, and booked.

Every volume a run opens passes through `Catalog.open`, which writes the ledger and holds the two
rules of the game: no test case in training (validation is part of training), and nothing of earlier
steps beyond what the strategy declares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from clbench.data.cache import VolumeCache
from clbench.data.layouts import CaseFiles, find_cases, resolve_data
from clbench.data.phantom import fingerprint, make_phantom
from clbench.data.volumes import Volume
from clbench.errors import DataError, SettingError, TrainingError
from clbench.settings import PhantomSettings
from clbench.spec import Benchmark, Preprocessing, Source, Split, Step

Purpose = Literal["train", "pseudo", "validation", "test"]


@dataclass(kw_only=True)
class Catalog:
    """All data of a course."""

    benchmark: Benchmark
    preprocessing: Preprocessing
    splits: tuple[Split, ...]
    """One per step."""
    files: Mapping[str, Mapping[str, CaseFiles]]
    """Source → case → files."""
    patients: bool
    """False for the phantom."""
    fingerprint: str
    """Changes when any file's content, or the phantom's version or settings, changes."""
    cache: VolumeCache
    past: str = "nothing"
    """What the strategy declares to need of earlier steps."""
    step: int = 1
    """The step being taught."""
    ledger: dict[int, dict[str, set[str]]] = field(default_factory=dict)
    """Step → purpose → "source/case" opened."""
    _open: dict[tuple[str, str], Volume] = field(default_factory=dict)

    def source(self, step: int) -> Source:
        """The source of a 1-based step."""
        return self.benchmark.source(self.benchmark.steps[step - 1].source)

    def open(self, step: int, case: str, purpose: Purpose) -> Volume:
        """A case of the source of `step`, entered in the ledger.

        Raises:
            TrainingError: a test case for training, or an image of an earlier step that the
                strategy did not declare.
        """
        name = self.source(step).name
        if purpose != "test":
            self._guard(step, name, case, purpose)
        self.ledger.setdefault(self.step, {}).setdefault(purpose, set()).add(f"{name}/{case}")
        if (name, case) not in self._open:
            self._open[name, case] = self.cache.get(
                self.files[name][case], self.source(step), self.preprocessing
            )
        return self._open[name, case]

    def _guard(self, step: int, name: str, case: str, purpose: Purpose) -> None:
        tests = {(self.source(i).name, c) for i, s in enumerate(self.splits, 1) for c in s.test}
        if (name, case) in tests:
            raise TrainingError(
                "a test case was asked for in training",
                where=f"step {self.step}, {name} case {case}",
                next_step="report this to the author of the strategy; the run was stopped",
            )
        split = self.splits[self.step - 1]
        allowed = split.validation if purpose == "validation" else split.train
        own = (name, case) in {(self.source(self.step).name, c) for c in allowed}
        if not own and self.past not in ("images", "cases"):
            raise TrainingError(
                "a strategy opened an image of an earlier step without declaring it",
                where=f"step {self.step}, {name} case {case} of step {step}, for {purpose}",
                expected=f"past = 'images' or 'cases', declared: {self.past!r}",
                next_step="declare it in the strategy, or do not open it",
            )

    def opened(self) -> dict[str, dict[str, list[str]]]:
        """The ledger as JSON-ready lists."""
        return {
            str(step): {purpose: sorted(cases) for purpose, cases in by_purpose.items()}
            for step, by_purpose in self.ledger.items()
        }


def _phantom_split(step: Step, number: int, settings: PhantomSettings) -> Split:
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


def _chosen(benchmark: Benchmark, replaced: Mapping[str, Split]) -> list[Split | None]:
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


def _folders(data: str, benchmark: Benchmark) -> dict[str, Path]:
    used = [s for s in benchmark.sources if any(step.source == s.name for step in benchmark.steps)]
    return resolve_data(data, used)


def _missing(split: Split, source: Source, have: Mapping[str, CaseFiles], folder: Path) -> None:
    if absent := [c for c in split.cases if c not in have]:
        raise DataError(
            f"the split names {len(absent)} cases that the data folder does not hold",
            where=folder,
            expected=f"all cases of {split.name}",
            got=f"missing: {', '.join(absent[:20])}{' …' if len(absent) > 20 else ''}",
            next_step=f"add the files, or choose yours with --split {source.name}=FILE.toml"
            + (" (btcv_public: the 30 public volumes)" if source.name == "btcv" else ""),
        )


def _same_content(
    benchmark: Benchmark,
    splits: Sequence[Split],
    hashes: Mapping[tuple[str, str], str],
) -> None:
    """Refuse a test case that is also a training case, by id or by image content, in any step."""
    trained: dict[str, str] = {}
    trained_ids: set[tuple[str, str]] = set()
    for step, split in zip(benchmark.steps, splits, strict=True):
        for case in split.train:
            trained[hashes[step.source, case]] = f"{step.source} case {case}"
            trained_ids.add((step.source, case))
    for step, split in zip(benchmark.steps, splits, strict=True):
        for case in split.test:
            twin = trained.get(hashes[step.source, case])
            if (step.source, case) in trained_ids or twin is not None:
                raise DataError(
                    "the same case is in train and in test",
                    where=f"{step.source} case {case}",
                    expected="no test case among the training cases of any step",
                    got=f"it equals training case {twin or case}",
                    next_step="remove one of the two from its split file",
                )


def build_catalog(
    benchmark: Benchmark,
    preprocessing: Preprocessing,
    *,
    data: str | None,
    cache_root: Path,
    phantom: PhantomSettings,
    splits: Mapping[str, Split] | None = None,
) -> Catalog:
    """Find real data, or make the phantom when `data` is None, and check it against the splits.

    Args:
        benchmark: the course.
        preprocessing: how volumes are prepared.
        data: `name=PATH,…` or one folder; None for the phantom.
        cache_root: where preprocessed volumes and the phantom are kept.
        phantom: size of the phantom.
        splits: source or step → split that replaces the benchmark's.

    Raises:
        DataError: missing folders or cases, or a case in train and test.
    """
    cache = VolumeCache(cache_root / "volumes")
    chosen = _chosen(benchmark, splits or {})
    if data is None:
        if drawn := [s.name for s in chosen if s is not None and s.draw is not None]:
            raise SettingError(
                "a split drawn by rule needs data to draw from",
                where="--split",
                got=", ".join(drawn),
                next_step="name the data with --data, or list the phantom's cases in the split",
            )
        used = [
            split or _phantom_split(step, number, phantom)
            for number, (step, split) in enumerate(zip(benchmark.steps, chosen, strict=True), 1)
        ]
        cases = {
            s.name: tuple(
                dict.fromkeys(
                    c
                    for step, split in zip(benchmark.steps, used, strict=True)
                    if step.source == s.name
                    for c in split.cases
                )
            )
            for s in benchmark.sources
        }
        folders = make_phantom(
            cache_root / "phantom",
            benchmark.sources,
            cases,
            phantom,
            needed=benchmark.structures(len(benchmark.steps)),
        )
        mark = fingerprint(benchmark.sources, cases, phantom)
    else:
        folders = _folders(data, benchmark)
        used = [split or step.split for step, split in zip(benchmark.steps, chosen, strict=True)]
        mark = ""
    files = {name: find_cases(folder, benchmark.source(name)) for name, folder in folders.items()}
    used = [
        split.resolve(files[step.source]) for step, split in zip(benchmark.steps, used, strict=True)
    ]
    for step, split in zip(benchmark.steps, used, strict=True):
        _missing(split, benchmark.source(step.source), files[step.source], folders[step.source])
    if data is not None:
        hashes = {
            (step.source, case): cache.content_hash(files[step.source][case])
            for step, split in zip(benchmark.steps, used, strict=True)
            for case in split.cases
        }
        images = {
            (step.source, case): cache.image_hash(files[step.source][case])
            for step, split in zip(benchmark.steps, used, strict=True)
            for case in split.cases
        }
        _same_content(benchmark, used, images)
        listing = json.dumps(sorted([*key, value] for key, value in hashes.items()))
        mark = "data-" + hashlib.sha256(listing.encode()).hexdigest()[:16]
    return Catalog(
        benchmark=benchmark,
        preprocessing=preprocessing,
        splits=tuple(used),
        files=files,
        patients=data is not None,
        fingerprint=mark,
        cache=cache,
    )
