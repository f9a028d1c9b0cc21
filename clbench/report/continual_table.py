"""The table of continual-learning measures: every definition by name, n/a with its reason.

Room: row 5 (no torch). A measure is computed run by run and shown as mean ± sd over seeds; where
one seed has no number, the strategy has none. Intervals over patients are in `learning`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench import store
from clbench.errors import StoreError
from clbench.metrics import trace, transfer
from clbench.metrics.continual import NAMES, Quantity, continual, domain
from clbench.report.render import EMPTY, Table
from clbench.report.runs import PHANTOM, Group, Measured, collect, hole_notes
from clbench.report.scale import SHARE, Scale

JOINT = "joint"
"""The strategy that stands for joint training."""
GAP = {
    "depth": "depth (before minus lowest)",
    "transient": "transient (end minus lowest)",
    "persistent": "persistent (before minus end)",
    "min_acc": "min-ACC",
    "wc_acc": "WC-ACC",
}
"""Parts of the stability gap, see `clbench.metrics.trace.StabilityGap`."""
STABILITY = "stability gap"
UNTRACED = Quantity(
    value=math.nan, reason="no trace.csv (a run with --set examine.trace_every=N leaves one)"
)


def continual_table(
    *,
    results: Path,
    bench: str,
    scoring: str = "strict",
    metric: str = "dice",
    scale: Scale = SHARE,
) -> Table:
    """All measures of all strategies of a benchmark, one row each.

    Args:
        results: folder of runs.
        bench: benchmark.
        scoring: `strict` or `paper`.
        metric: which score R is made of; the larger the better (`dice`, `nsd`, …).
        scale: how the numbers are written.

    Raises:
        StoreError: no finished runs, or runs that do not belong in one table.
    """
    groups = collect(results, bench=bench, scoring=scoring, metric=metric)
    if not groups:
        raise StoreError(
            "there are no finished runs of this benchmark",
            where=results / bench,
            next_step=f"clbench run --bench {bench} --strategy universal",
        )
    joint = _joint(groups)
    found = {
        g.label: [_measures(run, joint, scoring, metric) for run in g.runs] for g in groups
    }  # fmt: skip
    names = list(dict.fromkeys(n for each in found.values() for one in each for n in one))
    rows, long = [], []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in names:
        words = NAMES.get(name, name)
        cells = []
        for g in groups:
            seen = [one.get(name, UNTRACED) for one in found[g.label]]
            cells.append(scale.over_seeds([q.value for q in seen]))
            for reason in dict.fromkeys(q.reason for q in seen if q.reason):
                reasons.setdefault((reason, g.label), []).append(words)
            long += [
                (name, words, g.label, str(run.seed),
                 "" if math.isnan(q.value) else repr(q.value), q.reason)
                for run, q in zip(g.runs, seen, strict=True)
            ]  # fmt: skip
        rows.append((words, *cells))
    record = groups[0].runs[0].record
    unit = scale.unit if metric == "dice" else scale.unit.replace("Dice", metric)
    return Table(
        title=f"{record['identity']['bench']} v{record['identity']['bench_version']}"
        + ("" if record["patients"] else f" on the {PHANTOM}")
        + f": continual-learning measures, {unit}",
        columns=("measure", *(g.label for g in groups)),
        rows=tuple(rows),
        block=8,
        narrow=5,
        notes=(
            f"{scoring} scoring; means over structures, over test cases; mean ± sd over seeds",
            "joint training: the run of `joint` with the same seed",
            *_merged(reasons, [g.label for g in groups]),
            *hole_notes(groups),
        ),
        long=Table(
            title="",
            columns=("measure", "definition", "strategy", "seed", "value", "why"),
            rows=tuple(long),
        ),
    )


def _joint(groups: Sequence[Group]) -> Mapping[int, Measured] | str:
    """Seed → run of joint training, or why there is none to compare with."""
    found = [g for g in groups if g.strategy == JOINT]
    if len(found) > 1:
        return "there are several variants of joint training: " + ", ".join(
            g.label for g in found
        )  # fmt: skip
    return {run.seed: run for g in found for run in g.runs}


def _measures(
    run: Measured, joint: Mapping[int, Measured] | str, scoring: str, metric: str
) -> dict[str, Quantity]:
    """Measures of one run, those of domain transfer and of the trace included."""
    beside = None if isinstance(joint, str) else joint.get(run.seed)
    found = continual(
        run.values, run.learned_at, run.last, joint=None if beside is None else beside.values
    )
    if isinstance(joint, str):
        several = Quantity(value=math.nan, reason=joint)
        found |= dict.fromkeys(("intransigence", "delta_joint", "relative_joint"), several)
    rows = store.read_scores(run.folder / "scores.csv")
    cells = transfer.domain_transfer(
        rows, run.sources, scoring=scoring, metric=metric, patient_of=run.patient_of
    )
    for name, quantity in domain(cells, run.sources).items():
        words = "domain transfer"
        if cells:
            before = run.sources.index(name.rpartition(" on ")[2])
            words += f": {name}, after step {before}"
        found[words] = quantity
    return found | _gaps(run)


def _gaps(run: Measured) -> dict[str, Quantity]:
    """The stability gap of every step but the first, where the run was traced."""
    path = run.folder / trace.FILE
    steps = range(2, run.last + 1)
    if not path.exists():
        return {f"{STABILITY}, step {t}: {w}": UNTRACED for t in steps for w in GAP.values()}
    tests = [case for step in run.record["course"]["test"] for case in step]
    rows, found = trace.read_trace(path, tests), {}
    for step in steps:
        gap = trace.stability_gap(trace.curves(rows, step), run.learned_at, step)
        for name, words in GAP.items():
            value = math.nan if gap is None else float(getattr(gap, name))
            reason = "" if not math.isnan(value) else "its structures were not traced from update 0"
            found[f"{STABILITY}, step {step}: {words}"] = Quantity(value=value, reason=reason)
    return found


def _merged(
    reasons: Mapping[tuple[str, str], Sequence[str]], labels: Sequence[str]
) -> list[str]:  # fmt: skip
    """One line per reason: which measures, and whose where it is not everybody's."""
    whose: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, label), words in reasons.items():
        whose.setdefault((reason, tuple(words)), []).append(label)
    lines = []
    for (reason, words), mine in whose.items():
        of = "" if list(mine) == list(labels) else f" of {', '.join(mine)}"
        gap = [w for w in words if w.startswith(STABILITY)]
        what = "; ".join([*([STABILITY] if gap else []), *(w for w in words if w not in gap)])
        lines.append(f"{EMPTY} {what}{of}: n/a, {reason}")
    return lines
