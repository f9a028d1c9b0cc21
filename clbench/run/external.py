"""External predictions: NIfTI masks of any tool become a run folder like any other.

Steps may be scored one by one, in any order; what was not scored is a hole in every
table. The masks are scored on the file's own grid by the code that scores native runs, so that
equal masks give equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.catalog import Catalog, exam_cases
from clbench.data.external_masks import (
    LISTS,
    LabelMap,
    find_predictions,
    label_map,
    misspelt,
    read_prediction_files,
    said_others,
    source_map,
)
from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume, resample_nearest
from clbench.errors import ClbenchError, DataError, SettingError
from clbench.evaluation.metrics.case import DEFAULT, implementations, measure
from clbench.evaluation.metrics.overlap import counts_of, dice_paper, pattern_pairs
from clbench.evaluation.scoring import bit_pairs, context_of, metric_rows, score_rows
from clbench.run.course import alone
from clbench.run.identity import course_identity
from clbench.run.plan import load_strategy, open_catalog, resolve_profile
from clbench.run.record import data_and_host, keep_course, recorded_settings
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import need_name
from clbench.spec.splits import Split
from clbench.store import run_folder
from clbench.store.record import Identity, RunRecord
from clbench.store.run_folder import Score
from clbench.training.resume import Watch


@dataclass(frozen=True, kw_only=True)
class OutsideSettings:
    """What the command line asks for."""

    bench: str
    """Registered benchmark, or path of a TOML file."""
    step: int
    """1-based step after which the predictions were made."""
    predictions: Path
    """Folder of predictions."""
    name: str
    """Name of the method in every table."""
    seed: int = 0
    """Which training run of the method it was."""
    metrics: tuple[str, ...] = DEFAULT
    """Metrics beside Dice."""
    labels: Path | None = None
    """File that says what label values mean."""
    profile: str | None = None
    """Whose phantom and whose grid of the paper's scoring; None: as `clbench run`."""
    data: str | None = None
    """As `clbench run --data`."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    """As `clbench run --split`."""
    out: Path = Path("results")
    """Where run folders go."""
    cache: Path | None = None
    """As `clbench run --cache`."""
    expect_hu: bool = True
    """Refuse a source whose images are no CTs in HU."""
    allow_missing: bool = False
    """Leave holes where a test case has no prediction."""


def score_predictions(
    settings: OutsideSettings, watch: Watch = lambda event: None
) -> tuple[Path, list[str]]:
    """Score one step of a method from outside; return its run folder and the holes.

    Rows of the same step from an earlier call are replaced; other steps stay.

    Raises:
        SettingError: a step the benchmark does not have, or a name that is taken.
        SpecError: a name that cannot be a folder's.
        DataError: a prediction on another grid, with unknown labels, or of no test case; test
            cases without prediction, unless holes are allowed.
    """
    benchmark = registry.benchmark(settings.bench)
    _check(settings, benchmark)
    profile = resolve_profile(settings.profile, {}, data=settings.data)
    catalog = open_catalog(
        benchmark,
        profile,
        data=settings.data,
        splits=settings.splits,
        cache=settings.cache,
        expect_hu=settings.expect_hu,
    )
    structures = benchmark.structures(settings.step)
    exams = {
        (source, case): number
        for number, source, case in exam_cases(catalog)
        if set(catalog.files[source][case].annotated(benchmark.reads(source))) & set(structures)
    }
    at_hand = {(s, c): files for s, cases in catalog.files.items() for c, files in cases.items()}
    paths = find_predictions(settings.predictions, {k: at_hand[k] for k in exams}, at_hand)
    holes = [f"{source}/{case}" for source, case in exams if (source, case) not in paths]
    if holes and not settings.allow_missing:
        raise DataError(
            f"{len(holes)} of {len(exams)} test cases have no prediction",
            where=settings.predictions,
            expected="one for every test case of every source that annotates a learned structure",
            got=f"missing: {', '.join(holes[:20])}{' …' if len(holes) > 20 else ''}",
            next_step="add them, or accept holes in every table with --allow-missing",
        )
    maps = _maps(settings, benchmark, paths)
    predictions: dict[str, Any] = {
        "folder": str(settings.predictions),
        "labels": None if settings.labels is None else str(settings.labels),
        "holes": holes,
    }
    record = _record(settings, benchmark, catalog, profile.name, predictions)
    folder = settings.out / benchmark.name / settings.name / record.run_id
    rows: list[Score] = []
    for done, ((source, case), path) in enumerate(paths.items(), 1):
        volume = catalog.open(exams[source, case], case, "test")
        rows += _score(path, volume, structures, settings, maps[source], record, benchmark)
        watch({"event": "exam", "done": done, "of": len(paths), "case": case})
    with alone(folder, wait=True):
        path = folder / "scores.csv"
        if (folder / "run.json").exists():
            old = RunRecord.read(folder)
            rows += [r for r in run_folder.read_scores(path) if r.step != settings.step]
            record.predictions = {**(old.predictions or {}), str(settings.step): predictions}
            record.metrics = {**old.metrics, **record.metrics}
            record.steps_done = max(int(s) for s in record.predictions)
        run_folder.write_scores(path, rows)
        keep_course(folder, settings.bench)
        record.seal(folder)
        record.write(folder)
    return folder, holes


def _record(
    settings: OutsideSettings,
    benchmark: Benchmark,
    catalog: Catalog,
    profile: str,
    predictions: dict[str, Any],
) -> RunRecord:
    """The record of predictions that were made elsewhere, in one step."""
    identity = Identity(
        **course_identity(settings.bench, benchmark, catalog),
        strategy={"class": "external", "name": settings.name},
        profile={"name": "external"},
        vectors=None,
        weights=None,
        seed=settings.seed,
    )
    asked = {name: getattr(settings, name) for name in ("bench", "seed", "data", "out", "cache")}
    return RunRecord(
        status="finished",
        external=True,
        steps_done=settings.step,
        run_id=identity.run_id,
        strategy=settings.name,
        identity=identity,
        settings=recorded_settings({**asked, "profile": profile}, benchmark),
        predictions={str(settings.step): predictions},
        metrics=implementations(("dice", *settings.metrics)),
        warnings=catalog.warnings() or None,
        **data_and_host(benchmark, catalog, ()),
    )


def _check(settings: OutsideSettings, benchmark: Benchmark) -> None:
    last = len(benchmark.steps)
    if not 1 <= settings.step <= last:
        raise SettingError(
            "the benchmark does not have this step",
            where="--step",
            expected=f"1 to {last}",
            got=settings.step,
        )
    need_name(settings.name, "--name")
    if settings.name in registry.entries("strategy") or _is_composition(settings.name):
        raise SettingError(
            "a strategy of clbench has this name",
            where="--name",
            expected="a name of its own, so that the two stand in different rows",
            got=settings.name,
        )


def _is_composition(name: str) -> bool:
    """Whether `--strategy` takes the name as a head and parts."""
    if "+" not in name:
        return False
    try:
        load_strategy(name, {})
    except ClbenchError:
        return False
    return True


def _maps(
    settings: OutsideSettings, benchmark: Benchmark, paths: Mapping[tuple[str, str], Path]
) -> dict[str, LabelMap]:
    """Source → meaning of label values: --labels, a list beside the files, or the source's own."""
    folder = settings.predictions
    lists = [settings.labels] if settings.labels else [folder / n for n in LISTS]
    meant = next((label_map(p) for p in lists if settings.labels or p.is_file()), None)
    maps = {}
    learned = set(benchmark.structures(settings.step))
    for source in dict.fromkeys(s for s, _ in paths):
        inner = next((folder / source / n for n in LISTS if (folder / source / n).is_file()), None)
        if any(not p.is_dir() for (s, _), p in paths.items() if s == source):
            table = benchmark.reads(source)
            own = label_map(inner) if inner and not settings.labels else meant
            maps[source] = own or source_map(table)
            said = {n for names in maps[source].structures.values() for n in names}
            if absent := [s for s in table.structures if s in learned and s not in said]:
                raise DataError(
                    "the label values have none for structures that are examined",
                    where=f"{folder}, {maps[source].origin}",
                    expected=f"a value for {', '.join(absent)}",
                    got=", ".join(sorted(said)) + said_others(maps[source].others),
                    next_step=misspelt(absent, maps[source].others)
                    or "add them to the list, even if the method never predicts them",
                )
        else:
            maps[source] = LabelMap(structures={}, origin="a mask per structure")
    if settings.labels and all(p.is_dir() for p in paths.values()):
        raise SettingError(
            "the predictions are a mask per structure, and hold no label values",
            where=f"--labels {settings.labels}",
            expected="masks called by their structures",
            got=folder,
            next_step="leave --labels out",
        )
    return maps


def _score(
    path: Path,
    volume: Volume,
    structures: Sequence[str],
    settings: OutsideSettings,
    meaning: LabelMap,
    record: RunRecord,
    benchmark: Benchmark,
) -> list[Score]:
    """All rows of one case: both scorings of Dice, and the metrics asked for."""
    names = list(bit_pairs(structures, volume, structures))
    native = read_prediction_files(path, volume.files.image, names, meaning)
    places = bit_pairs(names, volume, names)
    context = context_of(record, benchmark, settings.step)
    metrics = ("dice", *(w for w in settings.metrics if w != "dice"))
    spacing_mm = spacing_of(volume.native_affine).tolist()
    scores = measure(
        lambda first, stop: native[first:stop], volume.native_bits(), spacing_mm, places, metrics
    )
    pairs = pattern_pairs(_on_model_grid(native, volume), volume.bits)
    paper = {n: (dice_paper(c), c) for n, c in counts_of(pairs, places).items()}
    return [
        *metric_rows(scores, structures, volume, metrics, context),
        *score_rows(paper, structures, volume, "paper", "dice", context),
    ]


def _on_model_grid(native: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """Masks resampled and cropped like the case's own labels, for the paper's scoring."""
    model_mm = spacing_of(volume.affine).tolist()
    full = resample_nearest(native, spacing_of(volume.native_affine).tolist(), model_mm)
    stops = np.add(volume.start, volume.bits.shape)
    return np.ascontiguousarray(full[tuple(map(slice, volume.start, stops))])
