"""The table of continual-learning measures: every definition by name, n/a with its reason.

A measure is computed run by run and shown as mean ± sd over seeds; where
one seed has no number, the strategy has none. Intervals over patients are in `learning`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.evaluation.metrics import continual, stability_gap
from clbench.evaluation.metrics.continual import NAMES, Quantity, course_metrics, domain
from clbench.report.evidence import Evidence, Method
from clbench.report.results import PHANTOM, Group, Measured, hole_notes
from clbench.report.study import Protocol, Study
from clbench.report.tables.render import EMPTY, SHARE, Scale, Table
from clbench.statistics.bootstrap import crossed_interval, seed_means
from clbench.types import Floats

JOINT = "joint"
"""The strategy that stands for joint training."""
GAP = {
    "depth": "depth (before minus lowest)",
    "transient": "transient (end minus lowest)",
    "persistent": "persistent (before minus end)",
    "min_acc": "min-ACC",
    "wc_acc": "WC-ACC",
}
"""Parts of the stability gap, see `clbench.evaluation.metrics.stability_gap.StabilityGap`."""
STABILITY = "stability gap"
UNTRACED = Quantity(
    value=math.nan, reason="no trace.csv (a run with --set examine.trace_every=N leaves one)"
)


def continual_table(study: Study, *, metric: str = "dice", scale: Scale = SHARE) -> Table:
    """All measures of all strategies of a benchmark, one row each.

    Args:
        study: the runs.
        metric: which score R is made of; the larger the better (`dice`, `nsd`, …).
        scale: how the numbers are written.

    Raises:
        StoreError: no finished runs, or runs that do not belong in one table.
    """
    groups, scoring = study.finished(metric=metric), study.scoring
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
    found = course_metrics(
        run.values, run.learned_at, run.last, joint=None if beside is None else beside.values
    )
    if isinstance(joint, str):
        several = Quantity(value=math.nan, reason=joint)
        found |= dict.fromkeys(("intransigence", "delta_joint", "relative_joint"), several)
    rows = run.stored.rows_of(scoring, metric)
    cells = continual.domain_transfer(
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
    path = run.folder / stability_gap.FILE
    steps = range(2, run.last + 1)
    if not path.exists():
        return {f"{STABILITY}, step {t}: {w}": UNTRACED for t in steps for w in GAP.values()}
    tests = [case for step in run.record["course"]["test"] for case in step]
    rows, found = stability_gap.read_trace(path, tests), {}
    for step in steps:
        gap = stability_gap.stability_gap(stability_gap.curves(rows, step), run.learned_at, step)
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


# --------------------------------------------------------------------------------------------------
# What continual learning did to each strategy: old, new, all, kept, forgotten, against joint.
# Each number comes with its interval over patients and, apart, its spread
# over seeds; a strategy with a hole has a hole.


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One number of one strategy."""

    value: float = math.nan
    """Mean over structures, patients and seeds."""
    low: float = math.nan
    """Lower end of the interval over patients and seeds."""
    high: float = math.nan
    """Upper end."""
    sd: float = math.nan
    """Standard deviation over seeds."""
    why: str = ""
    """Why there is none."""

    def text(self, difference: bool, scale: Scale = SHARE) -> str:
        """`0.783 [0.751, 0.812] ±0.010`."""
        if math.isnan(self.value):
            return EMPTY
        form = scale.signed if difference else scale.number
        found = form(self.value)
        if not math.isnan(self.low):
            found += f" [{form(self.low)}, {form(self.high)}]"
        return found + ("" if math.isnan(self.sd) else f" ±{scale.number(self.sd)}")


def cells_at(
    e: Evidence, method: Method, at: Mapping[str, int], seeds: Sequence[int] | None = None
) -> dict[str, Floats]:
    """Eval set → (seeds, patients, structures); empty where there is a hole or nothing to show.

    Args:
        e: the runs.
        method: the strategy.
        at: structure → after which step.
        seeds: which seeds; None: all it has.
    """
    pick = [method.seeds.index(s) for s in (method.seeds if seeds is None else seeds)]
    found: dict[str, list[Floats]] = {}
    for c, step in at.items():
        cells = method.cells.get((step, e.home(c), c))
        if cells is None or cells.hole or not pick:
            return {}
        found.setdefault(e.home(c), []).append(cells.values[pick])
    return {name: np.stack(values, axis=-1) for name, values in found.items()}


def _measure(
    table: Mapping[str, Floats], protocol: Protocol, why: str = "scores are missing"
) -> Measure:
    if not table:
        return Measure(why=why)
    i = crossed_interval(
        table, seed=protocol.seed, draws=protocol.descriptive_resamples, level=protocol.level
    )
    return Measure(
        value=i.estimate, low=i.low, high=i.high, sd=continual.spread(list(seed_means(table)))
    )


def _minus(a: Mapping[str, Floats], b: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: a[name] - b[name] for name in a} if a and b else {}


def measures(e: Evidence, method: Method, protocol: Protocol) -> dict[str, Measure]:
    """Name → number, in the order of the table.

    Args:
        e: the runs.
        method: one of their strategies.
        protocol: level and resamples of the intervals.
    """
    last = e.last
    old = {c: s for c, s in e.learned_at.items() if s < last}
    new = {c: s for c, s in e.learned_at.items() if s > 1}
    at_end = dict.fromkeys(e.learned_at, last)
    found = {
        "Old": _measure(cells_at(e, method, dict.fromkeys(old, last)), protocol),
        "New": _measure(cells_at(e, method, new), protocol),
        "All": _measure(cells_at(e, method, at_end), protocol),
        "BWT": _measure(
            _minus(cells_at(e, method, dict.fromkeys(old, last)), cells_at(e, method, old)),
            protocol,
        ),
        "Forgetting": _forgetting(e, method, protocol),
    }
    joint = [m for m in e.methods if m.strategy == JOINT]
    if len(joint) != 1:
        absent = Measure(why="no run of joint" if not joint else "several variants of joint")
        return {**found, "Intransigence": absent, "Δ joint": absent}
    seeds = [s for s in method.seeds if s in joint[0].seeds]
    why = "no seed in common with joint" if not seeds else "scores are missing"
    mine, bound = cells_at(e, method, new, seeds), cells_at(e, joint[0], new, seeds)
    found["Intransigence"] = _measure(_minus(bound, mine), protocol, why)
    mine, bound = cells_at(e, method, at_end, seeds), cells_at(e, joint[0], at_end, seeds)
    found["Δ joint"] = _measure(_minus(mine, bound), protocol, why)
    return found


def _forgetting(e: Evidence, method: Method, protocol: Protocol) -> Measure:
    """The best of the earlier steps minus the last, per structure; its interval for two steps only.

    Source: Chaudhry et al., ECCV 2018; see `clbench.evaluation.metrics.continual.forgetting`.
    """
    old = {c: s for c, s in e.learned_at.items() if s < e.last}
    if e.last == 2:
        end = dict.fromkeys(old, e.last)
        return _measure(_minus(cells_at(e, method, old), cells_at(e, method, end)), protocol)
    per_seed = []
    for i in range(len(method.seeds)):
        r = {}
        for c, s in old.items():
            for t in range(s, e.last + 1):
                cells = method.cells.get((t, e.home(c), c))
                ok = cells is not None and not cells.hole and not np.isnan(cells.values[i]).all()
                r[t, c] = float(np.nanmean(cells.values[i])) if cells and ok else math.nan
        per_seed.append(continual.mean(continual.forgetting(r, old, e.last).values()))
    value = continual.mean(per_seed)
    return Measure(value=value, sd=continual.spread(per_seed), why="scores are missing")


def learning_table(study: Study, scale: Scale = SHARE) -> Table:
    """One row per strategy; a mean over structures, [interval] over patients, ± over seeds."""
    e, protocol = study.evidence, study.protocol
    rows, long, why = [], [], []
    names: list[str] = []
    for m in e.methods:
        found = measures(e, m, protocol)
        names = list(found)
        rows.append(
            (
                m.label, str(len(m.seeds)),
                *(x.text(k not in ("Old", "New", "All"), scale) for k, x in found.items()),
            )
        )  # fmt: skip
        for name, x in found.items():
            exact = ("" if math.isnan(v) else repr(v) for v in (x.value, x.low, x.high, x.sd))
            long.append((m.label, name, *exact, str(len(m.seeds)), x.why))
        if reasons := {f"{k}: {x.why}" for k, x in found.items() if math.isnan(x.value)}:
            why.append(f"hole: {m.label}, {'; '.join(sorted(reasons))}")
    sizes = ", ".join(f"{len(p)} {s}" for s, p in e.patients.items())
    return Table(
        title=f"{e.title()}: what was kept and learned, {scale.unit}",
        columns=("strategy", "seeds", *names),
        rows=tuple(rows),
        keys=2,
        narrow=3,
        notes=(
            (
                f"{e.scoring} scoring; mean over structures, [{protocol.percent} interval] of "
                "patients and seeds:"
            ),
            (
                f"crossed bootstrap ({protocol.descriptive_resamples} draws; {sizes} test cases), "
                "± sd over seeds"
            ),
            "Old: structures of earlier steps after the last step; All: all structures after it",
            "New: structures of step 2 and later, each right after its own step",
            "BWT: old structures, last step minus own step (Lopez-Paz and Ranzato 2017)",
            "Forgetting: best earlier step minus last (Chaudhry et al. 2018)",
            "Intransigence: joint minus the strategy on New; Δ joint: strategy minus joint on All",
            *why,
        ),
        long=Table(
            title="",
            columns=("strategy", "measure", "value", "low", "high", "sd", "seeds", "why"),
            rows=tuple(long),
        ),
    )
