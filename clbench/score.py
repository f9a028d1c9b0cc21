"""More metrics for a finished run, from its stored predictions; nothing is trained or predicted.

Room: row 4. Every prediction must first give the Dice that was recorded, so that files of another
run, or data that changed since, are found out before any number is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import registry, store
from clbench.data.cache import default_root
from clbench.data.catalog import Catalog, build_catalog
from clbench.data.reading import spacing_of
from clbench.data.volumes import Volume
from clbench.errors import StoreError
from clbench.examine import Prediction, ScoreContext, read_prediction, score_rows, to_native
from clbench.metrics.native import DEFAULT, Found, implementations, measure, row_names
from clbench.metrics.overlap import Bits
from clbench.metrics.surface import Rows
from clbench.resume import Watch
from clbench.run import alone
from clbench.seal import reseal
from clbench.settings import GROUPS, Profile, change
from clbench.spec import Benchmark, Split
from clbench.store import Score


def score_run(
    folder: Path,
    *,
    words: Sequence[str] = DEFAULT,
    data: str | None = None,
    cache: Path | None = None,
    watch: Watch = lambda event: None,
) -> Path:
    """Add rows of further metrics to `scores.csv`; those that are there already are made anew.

    Args:
        folder: a finished run with predictions.
        words: metrics, see `clbench.metrics.native.parse_words`.
        data: where the data lies now, as in `clbench run --data`; None: where the run found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.
        watch: told about every case.

    Returns:
        The folder. The same call twice leaves the same bytes.

    Raises:
        StoreError: an unfinished run, a missing or foreign prediction, other data.
        DataError: data that cannot be read.
    """
    record = store.read_record(folder)
    if record["status"] != "finished":
        raise StoreError(
            "the run is not finished",
            where=folder,
            next_step="repeat its command; it goes on where it stopped",
        )
    if record.get("external"):
        raise StoreError(
            "the run holds predictions made elsewhere, of which no copy is kept",
            where=folder,
            next_step="score them again: clbench score --predictions … --metrics …",
        )
    catalog = recorded_catalog(record, data=data, cache=cache)
    benchmark, last = catalog.benchmark, len(catalog.benchmark.steps)
    with alone(folder, wait=False):
        rows = store.read_scores(folder / "scores.csv")
        known = {
            (r.step, r.eval_set, r.case, r.structure): r
            for r in rows
            if r.scoring == "strict" and r.metric == "dice"
        }
        files = {
            (t, s, c): folder / "predictions" / f"step{t}" / f"{s}_{c}.npz"
            for _, s, c in exam_cases(catalog)
            for t in range(1, last + 1)
        }
        _all_there(folder, list(files.values()))
        made: list[Score] = []
        cases = list(exam_cases(catalog))
        for done, (number, source, case) in enumerate(cases, 1):
            volume = catalog.open(number, case, "test")
            truth = volume.native_bits()
            for step in range(1, last + 1):
                structures = benchmark.structures(step)
                pred = read_prediction(files[step, source, case])
                _same_grid(pred, volume, structures, files[step, source, case])
                bits = {n: (structures.index(n), b) for n, b in truth_bits(volume, structures)}
                found = measure(
                    native_rows(pred.bits, volume),
                    truth,
                    spacing_of(volume.native_affine).tolist(),
                    bits,
                    ("dice", *words),
                )
                _as_recorded(found, known, (step, source, case), files[step, source, case])
                made += metric_rows(
                    found, structures, volume, words, context_of(record, benchmark, step)
                )
            watch({"event": "exam", "done": done, "of": len(cases), "case": case})
        new = {r.metric for r in made} - {"dice"}
        keep = [r for r in rows if r.scoring != "strict" or r.metric not in new]
        store.write_scores(folder / "scores.csv", [*keep, *(r for r in made if r.metric in new)])
        record["metrics"] = {**record.get("metrics", {}), **implementations(("dice", *words))}
        reseal(folder, record)
        store.write_record(folder, record)
    return folder


# ------------------------------------------------------------------------------------- of any run


def recorded_catalog(record: Mapping[str, Any], *, data: str | None, cache: Path | None) -> Catalog:
    """The data a run was examined on, found again and checked by content.

    Raises:
        StoreError: the benchmark has another version now, or the data changed.
    """
    settings, identity = record["settings"], record["identity"]
    benchmark = registry.benchmark(settings["bench"])
    if benchmark.version != identity["bench_version"]:
        raise StoreError(
            "the run was made on another version of the benchmark",
            where=record["run_id"],
            expected=f"{benchmark.name} v{benchmark.version}",
            got=f"v{identity['bench_version']}",
            next_step="run it again",
        )
    if identity.get("course") not in (None, benchmark.digest()):
        raise StoreError(
            "the benchmark's file was changed since the run was made",
            where=settings["bench"],
            expected=f"content {identity['course']}",
            got=benchmark.digest(),
            next_step="run it again",
        )
    raw = identity["profile"]
    groups = {g: change(kind(), raw.get(g, {}), g) for g, kind in GROUPS.items()}
    profile = Profile(name=raw["name"], **groups)
    kept = settings["cache"]
    catalog = build_catalog(
        benchmark,
        profile.preprocessing(benchmark.preprocessing),
        data=data or settings["data"],
        cache_root=cache or (Path(kept) if kept else default_root()),
        phantom=profile.phantom,
        splits={
            step.name: _split(s)
            for step, s in zip(benchmark.steps, identity["splits"], strict=True)
        },
    )
    if catalog.fingerprint != record["data_fingerprint"]:
        raise StoreError(
            "the data is not what the run was made on",
            where=data or settings["data"] or "the phantom",
            expected=record["data_fingerprint"],
            got=catalog.fingerprint,
            next_step="point --data at the same files; if they changed for good, run again",
        )
    return catalog


def _split(raw: Mapping[str, Any]) -> Split:
    """A split as recorded; where it was drawn by a rule, the rule was applied already."""
    return Split(
        name=raw["name"],
        train=tuple(raw["train"]),
        validation=tuple(raw["validation"]),
        test=tuple(raw["test"]),
        origin=raw["origin"],
    )


def exam_cases(catalog: Catalog) -> Iterator[tuple[int, str, str]]:
    """(step whose split names it, source, case) of every test case, each once."""
    seen = set()
    for number, split in enumerate(catalog.splits, 1):
        source = catalog.source(number).name
        for case in split.test:
            if (source, case) not in seen:
                seen.add((source, case))
                yield number, source, case


def truth_bits(volume: Volume, structures: Sequence[str]) -> list[tuple[str, int]]:
    """(structure, its bit in the truth) of those learned structures that the case annotates."""
    return [
        (s, volume.names.index(s))
        for s in structures
        if s in volume.annotated and s in volume.names
    ]


def native_rows(bits: NDArray[Any], volume: Volume) -> Rows:
    """Reads rows of a prediction on the model grid as they lie on the file's grid."""
    axis0, axis1, axis2 = volume.native_axes()

    def rows(first: int, stop: int) -> Bits:
        found: Bits = to_native(bits, (axis0[first:stop], axis1, axis2))
        return found

    return rows


def context_of(record: Mapping[str, Any], benchmark: Benchmark, step: int) -> ScoreContext:
    """What all rows of one step of a run share."""
    return ScoreContext(
        bench=benchmark.name,
        bench_version=benchmark.version,
        strategy=record["strategy"],
        seed=record["identity"]["seed"],
        step=step,
        learned_at={s: benchmark.learned_at(s) for s in benchmark.structures(step)},
    )


def metric_rows(
    found: Mapping[str, Found],
    structures: Sequence[str],
    volume: Volume,
    words: Sequence[str],
    context: ScoreContext,
) -> list[Score]:
    """Rows of every metric of the words, for the structures each metric is of."""
    of: dict[str, list[str]] = {}
    for name in structures:
        for word in words:
            for metric in row_names(word, name):
                members = of.setdefault(metric, [])
                if name not in members:
                    members.append(name)
    return [
        row
        for metric, names in of.items()
        for row in score_rows(
            {n: (found[n].values[metric], found[n].counts) for n in names if n in found},
            names, volume, "strict", metric, context,
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ checks


def _all_there(folder: Path, files: Sequence[Path]) -> None:
    absent = [f for f in files if not f.is_file()]
    if absent:
        raise StoreError(
            f"{len(absent)} of {len(files)} predictions of the run are missing",
            where=folder / "predictions",
            expected="one file per step and test case",
            got="missing: "
            + ", ".join(str(f.relative_to(folder / "predictions")) for f in absent[:5])
            + (", …" if len(absent) > 5 else ""),
            next_step="repeat the run's command with --fresh --keep-predictions test",
        )


def _same_grid(pred: Prediction, volume: Volume, structures: Sequence[str], path: Path) -> None:
    there = (pred.source, pred.case, pred.structures, pred.bits.shape)
    wanted = (volume.source, volume.case, tuple(structures), volume.bits.shape)
    near = np.allclose(pred.affine, volume.affine, atol=1e-6)
    if there != wanted or not near:
        raise StoreError(
            "a stored prediction is not of this case",
            where=path,
            expected="{}/{}, {} structures, shape {}".format(
                *wanted[:2], len(wanted[2]), wanted[3]
            ),
            got="{}/{}, {} structures, shape {}".format(*there[:2], len(there[2]), there[3])
            + ("" if near else ", in another place"),
            next_step="put the right file back, or run again with --fresh",
        )


def _as_recorded(
    found: Mapping[str, Found],
    known: Mapping[tuple[int, str, str, str], Score],
    key: tuple[int, str, str],
    path: Path,
) -> None:
    """The prediction must give the Dice and the volumes that were recorded."""
    for name, new in found.items():
        old = known.get((*key, name))
        value = new.values["dice"]
        same = old is not None and (
            old.value == value or (math.isnan(old.value) and math.isnan(value))
        )
        if (
            old is None
            or not same
            or (old.gt_vox, old.pred_vox) != (new.counts.gt_vox, new.counts.pred_vox)
        ):
            raise StoreError(
                "a stored prediction does not give the recorded Dice",
                where=f"{path}, {name}",
                expected="no such row" if old is None else f"{old.value!r}, {old.pred_vox} voxels",
                got=f"{value!r}, {new.counts.pred_vox} voxels",
                next_step="the file or scores.csv was changed; run again with --fresh",
            )
