"""The table of continual-learning measures: every definition by name, n/a with its reason.

A measure is computed run by run and shown as mean ± sd over seeds; where
one seed has no number, the strategy has none. Intervals over patients are in `learning`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.errors import SettingError
from clbench.evaluation.metrics import case, continual, stability_gap
from clbench.evaluation.metrics.continual import NAMES, Quantity, course_metrics
from clbench.report.scores import Run, Scores, StrategyScores
from clbench.report.significance.endpoints import tested_patients
from clbench.report.study import Protocol, Study
from clbench.report.tables.render import EMPTY, SHARE, Scale, Table, long_table
from clbench.statistics.bootstrap import seed_means
from clbench.statistics.macro_estimate import macro_interval

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
NO_INTERVAL = "no interval over three steps and more: the best step is chosen by its own scores"
SMALLER = (
    "smaller is better: the best is the smallest, and differences are turned; worse than before or "
    "than joint is below 0 in transfer and minus joint, above 0 in forgetting and intransigence, "
    "above 1 relative to joint"
)
"""What a table says of a score of which smaller is better."""
OF_COURSE = Quantity(value=math.nan, reason="traced on validation cases of the course, not here")
OF_DICE = Quantity(value=math.nan, reason="trace.csv holds Dice alone")
ON_VALIDATION = (
    f"{STABILITY}: Dice of validation cases on the network's grid, whatever the scoring of the rest"
)
"""What a table says of the rows of traced runs."""
NOT_TRACED = "its structures were not traced from update 0"
NO_NEW = "no validation case holds a structure of this step"
UNTRACED = Quantity(
    value=math.nan, reason="no trace.csv (a run with --set examine.trace_every=N leaves one)"
)


def continual_table(
    study: Study, *, metric: str = "dice", scale: Scale = SHARE, reference_first: bool = False
) -> Table:
    """All measures of all strategies of a benchmark, one row each.

    Args:
        study: the runs.
        metric: which score R is made of (`dice`, `nsd`, `hd95_mm`, …).
        scale: how the numbers are written; percent of shares alone.
        reference_first: the study's reference stands left of the others; else by name.

    Raises:
        SettingError: a score that is no share is to be written in percent.
        StoreError: no finished runs, or runs that do not belong in one table.
        UnknownName: no finished run of the reference that is to stand first.
    """
    facts = _facts(metric)
    if facts.unit != "share" and scale.factor != 1:
        raise SettingError(
            f"{metric} is no share, so it is not written in percent",
            where="--percent",
            expected="a metric between 0 and 1: dice, nsd, …",
            got=f"{metric}, in {facts.unit}",
            next_step="leave --percent out",
        )
    scores = study.need_scores(metric=metric)
    if reference_first:
        scores = study.reference_first(scores)
    joint, labels = _joint(scores), [s.label for s in scores.strategies]
    by_label = {
        s.label: [
            _measures(scores, s, i, joint, facts.higher_is_better) for i in range(len(s.runs))
        ]
        for s in scores.strategies
    }
    rows, long = [], []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(n for each in by_label.values() for one in each for n in one):
        label_of_measure, cells = NAMES.get(name, name), []
        for s in scores.strategies:
            quantities = [one.get(name, UNTRACED) for one in by_label[s.label]]
            cells.append(scale.over_seeds([q.value for q in quantities]))
            for reason in dict.fromkeys(q.reason for q in quantities if q.reason):
                reasons.setdefault((reason, s.label), []).append(label_of_measure)
            long += [
                (name, label_of_measure, s.label, seed, q.value, q.reason)
                for seed, q in zip(s.seeds, quantities, strict=True)
            ]
        rows.append((label_of_measure, *cells))
    unit = scale.unit if metric == "dice" else scale.unit.replace("Dice", metric)
    if facts.unit != "share" and not metric.endswith(f"_{facts.unit}"):
        unit += f", {facts.unit}"
    return Table(
        title=f"{scores.title()}: continual-learning measures, {unit}",
        columns=("measure", *labels),
        rows=tuple(rows),
        block=8,
        narrow=5,
        notes=(
            (
                f"{study.scoring} scoring; means over structures, over test cases; "
                "mean ± sd over seeds"
            ),
            *((SMALLER,) if facts.higher_is_better is False else ()),
            *((ON_VALIDATION,) if _has_gaps(by_label) else ()),
            "joint training: the run of `joint` with the same seed",
            *_merged(reasons, labels),
            *scores.notes(),
        ),
        long=long_table("measure definition strategy seed value why", long),
    )


def _facts(metric: str) -> case.Metric:
    """Unit and direction of a metric; `nsd` stands for every structure's own tolerance."""
    of_word = case.metrics_of(case.word_of(metric), "liver_tumor")
    return next((m for m in of_word if m.name == metric), of_word[0])


def _joint(scores: Scores) -> Mapping[int, continual.Matrix] | str:
    """Seed → R of joint training, or why there is none to compare with."""
    variants = [s for s in scores.strategies if s.strategy == JOINT]
    if len(variants) > 1:
        labels = ", ".join(s.label for s in variants)
        return f"there are several variants of joint training: {labels}"
    return {seed: r for s in variants for seed, r in zip(s.seeds, s.r, strict=True)}


def _measures(
    scores: Scores,
    s: StrategyScores,
    i: int,
    joint: Mapping[int, continual.Matrix] | str,
    higher_is_better: bool | None,
) -> dict[str, Quantity]:
    """Measures of a strategy's run number `i`, those of domain transfer and trace included."""
    beside = None if isinstance(joint, str) else joint.get(s.seeds[i])
    by_name = course_metrics(
        s.r[i],
        scores.learned_at,
        scores.last,
        joint=beside,
        higher_is_better=higher_is_better,
    )
    if isinstance(joint, str):
        several = Quantity(value=math.nan, reason=joint)
        by_name |= dict.fromkeys(("intransigence", "delta_joint", "relative_joint"), several)
    return by_name | _domain_transfer(scores, s, i) | _gaps(scores, s.runs[i])


def _domain_transfer(scores: Scores, s: StrategyScores, i: int) -> dict[str, Quantity]:
    """How a structure does on a source that is taught later, right before that.

    With BTCV before LiTS: the liver learned on BTCV and looked for on LiTS after step 1.

    Source: forward transfer (Lopez-Paz and Ranzato, NeurIPS 2017), of the domain.
    Differs: forward transfer itself asks for the score of a structure before it is taught, when
        a model that grows by classes has no output for it.
    """
    transfer = {}
    for (step, source, name), cells in sorted(s.cells.items(), key=lambda x: (x[0][2], x[0][1])):
        if source != s.home[name] and step == scores.sources.index(source) and cells.annotated[i]:
            values = cells.values[i]
            why = cells.reasons[i] or ("" if cells.cases[i] else "no test case contains it")
            transfer[f"domain transfer: {name} on {source}, after step {step}"] = (
                Quantity(value=math.nan, reason=why)
                if why
                else Quantity(value=continual.mean(values[~np.isnan(values)].tolist()))
            )
    if transfer:
        return transfer
    reason = (
        "all steps use one source"
        if len(set(scores.sources)) == 1
        else "no structure is annotated both where it is taught and in a later source"
    )
    return {"domain transfer": Quantity(value=math.nan, reason=reason)}


def _gaps(scores: Scores, run: Run) -> dict[str, Quantity]:
    """The stability gap of every step but the first, where the run was traced."""
    path = run.folder / stability_gap.FILE
    steps = range(2, scores.last + 1)
    none = OF_DICE if scores.metric != "dice" else OF_COURSE if scores.on else UNTRACED
    if none is not UNTRACED or not path.exists():
        return {f"{STABILITY}, step {t}: {w}": none for t in steps for w in GAP.values()}
    tests = [case for step in run.record.course.test for case in step]
    rows, gaps = stability_gap.read_trace(path, tests), {}
    lowest: dict[str, float] = {}  # of each structure since it was learned
    for step in steps:
        curves = stability_gap.curves(rows, step)
        gap = stability_gap.stability_gap(curves, scores.learned_at, step, lowest)
        lowest = stability_gap.lowest(curves, scores.learned_at, step, lowest)
        for name, label in GAP.items():
            value = math.nan if gap is None else float(getattr(gap, name))
            reason = "" if not math.isnan(value) else NOT_TRACED if gap is None else NO_NEW
            gaps[f"{STABILITY}, step {step}: {label}"] = Quantity(value=value, reason=reason)
    return gaps


def _has_gaps(by_label: Mapping[str, Sequence[Mapping[str, Quantity]]]) -> bool:
    """Whether any run has a number of the stability gap.

    Args:
        by_label: strategy → the measures of each run.
    """
    return any(
        name.startswith(STABILITY) and not math.isnan(quantity.value)
        for runs in by_label.values()
        for measures_of_run in runs
        for name, quantity in measures_of_run.items()
    )


def _merged(reasons: Mapping[tuple[str, str], Sequence[str]], labels: Sequence[str]) -> list[str]:
    """One line per reason: which measures, and whose where it is not everybody's."""
    whose: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, label), measures in reasons.items():
        whose.setdefault((reason, tuple(measures)), []).append(label)
    lines = []
    for (reason, measures), mine in whose.items():
        of = "" if mine == labels else f" of {', '.join(mine)}"
        gap = [m for m in measures if m.startswith(STABILITY)]
        what = "; ".join([*[STABILITY] * bool(gap), *(m for m in measures if m not in gap)])
        lines.append(f"{EMPTY} {what}{of}: n/a, {reason}")
    return lines


# --------------------------------------------------------------------------------------------------
# What continual learning did to each strategy: old, new, all, kept, forgotten, against joint.
# Each number comes with its interval over patients and, apart, its spread
# over seeds; a strategy with a hole has a hole.


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One number of one strategy."""

    value: float = math.nan
    """Mean over structures, patients and seeds."""
    low: float = math.nan
    """Lower end of the interval over patients and seeds."""
    high: float = math.nan
    """Upper end."""
    sd: float = math.nan
    """Standard deviation over seeds."""
    seeds: int = 0
    """Training runs it rests on: with another strategy taken off, those that both have."""
    why: str = ""
    """Why there is none."""
    warnings: tuple[str, ...] = ()
    """What to know about the interval, in words."""

    def text(self, difference: bool, scale: Scale = SHARE) -> str:
        """`0.783 [0.751, 0.812] ±0.010`."""
        if math.isnan(self.value):
            return EMPTY
        form = scale.signed if difference else scale.number
        text = form(self.value)
        if not math.isnan(self.low):
            text += f" [{form(self.low)}, {form(self.high)}]"
        return text + ("" if math.isnan(self.sd) else f" ±{scale.number(self.sd)}")


def measures(e: Scores, method: StrategyScores, protocol: Protocol) -> dict[str, Estimate]:
    """Name → number, in the order of the table.

    Args:
        e: the runs.
        method: one of their strategies.
        protocol: level of the intervals.
    """
    old = {c: s for c, s in e.learned_at.items() if s < e.last}
    new = {c: s for c, s in e.learned_at.items() if s > 1}
    at_end = dict.fromkeys(e.learned_at, e.last)
    old_at_end = dict.fromkeys(old, e.last)
    by_name = {
        "Old": _estimate(method, old_at_end, protocol),
        "New": _estimate(method, new, protocol),
        "All": _estimate(method, at_end, protocol),
        "BWT": _estimate(method, old_at_end, protocol, minus=(method, old)),
        "Forgetting": _forgetting(e, method, protocol),
    }
    joint = [m for m in e.strategies if m.strategy == JOINT]
    if len(joint) != 1:
        absent = Estimate(why="no run of joint" if not joint else "several variants of joint")
        return {**by_name, "Intransigence": absent, "Δ joint": absent}
    by_name["Intransigence"] = _estimate(joint[0], new, protocol, minus=(method, new))
    by_name["Δ joint"] = _estimate(method, at_end, protocol, minus=(joint[0], at_end))
    return by_name


def _estimate(
    method: StrategyScores,
    at: Mapping[str, int],
    protocol: Protocol,
    minus: tuple[StrategyScores, Mapping[str, int]] | None = None,
) -> Estimate:
    """Mean of some structures with its interval, or its difference from another one.

    Args:
        method: the strategy.
        at: structure → step after which it is looked at.
        protocol: level of the interval.
        minus: the strategy and the steps of what is taken off, on the seeds both have.
    """
    other, before = minus or (method, at)
    seeds = [s for s in method.seeds if s in other.seeds]
    if not seeds:
        return Estimate(why="no seed in common with joint")
    table, less = method.table(at, seeds), other.table(before, seeds)
    if not table or not less:
        return Estimate(
            why=method.hole(at.items())
            or other.hole(before.items())
            or "there is no such structure"
        )
    if minus:
        table = {name: table[name] - less[name] for name in table}
    i = macro_interval(table, level=protocol.level, bounds=None if minus else (0.0, 1.0))
    return Estimate(
        value=i.estimate,
        low=i.low,
        high=i.high,
        sd=continual.spread(list(seed_means(table))),
        seeds=len(seeds),
        warnings=i.flags,
    )


def _forgetting(e: Scores, method: StrategyScores, protocol: Protocol) -> Estimate:
    """The best of the earlier steps minus the last, per structure; an interval for two steps only.

    Source: Chaudhry et al., ECCV 2018; see `clbench.evaluation.metrics.continual.forgetting`.
    """
    old = {c: s for c, s in e.learned_at.items() if s < e.last}
    end = dict.fromkeys(old, e.last)
    if e.last == 2:
        return _estimate(method, old, protocol, minus=(method, end))
    per_seed = [continual.mean(continual.forgetting(r, old, e.last).values()) for r in method.r]
    value = continual.mean(per_seed)
    if not math.isnan(value):
        return Estimate(
            value=value,
            sd=continual.spread(per_seed),
            seeds=len(per_seed),
            warnings=(NO_INTERVAL,),
        )
    why = method.hole((c, t) for c, s in old.items() for t in range(s, e.last + 1))
    return Estimate(why=why or "there is no such structure")


def _warnings(
    warned: Sequence[tuple[str, str, str]], labels: Sequence[str], names: Sequence[str]
) -> list[str]:
    """One line per warning of intervals: whose, and of which measures, where not of all.

    Args:
        warned: warning, strategy, measure.
        labels: all strategies.
        names: all measures.
    """
    lines = []
    for warning in dict.fromkeys(w for w, _, _ in warned):
        whose = dict.fromkeys(label for w, label, _ in warned if w == warning)
        measured = {name for w, _, name in warned if w == warning}
        # Forgetting of a long course has no interval, so it never has this one's warning.
        ordered = [name for name in names if name in measured]
        what = "intervals" if len(measured) >= len(names) - 1 else ", ".join(ordered)
        of = "" if len(whose) == len(labels) else f"{', '.join(whose)}, "
        lines.append(f"{of}{what}: {warning}")
    return lines


def learning_table(study: Study, scale: Scale = SHARE) -> Table:
    """One row per strategy; a mean over structures, [interval] over patients, ± over seeds."""
    e, protocol = study.dice, study.protocol
    rows, long, why = [], [], []
    names: list[str] = []
    warned: list[tuple[str, str, str]] = []
    for m in e.strategies:
        by_name = measures(e, m, protocol)
        names = list(by_name)
        rows.append(
            (
                m.label, str(len(m.seeds)),
                *(x.text(k not in ("Old", "New", "All"), scale) for k, x in by_name.items()),
            )
        )  # fmt: skip
        for name, x in by_name.items():
            long.append((m.label, name, x.value, x.low, x.high, x.sd, x.seeds, x.why,
                         "; ".join(x.warnings)))  # fmt: skip
            warned += [(warning, m.label, name) for warning in x.warnings]
        if reasons := {f"{k}: {x.why}" for k, x in by_name.items() if math.isnan(x.value)}:
            why.append(f"hole: {m.label}, {'; '.join(sorted(reasons))}")
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
            "t over patients and training runs, ± sd over seeds",
            f"test cases: {tested_patients(e)}",
            "Old: structures of earlier steps after the last step; All: all structures after it",
            "New: structures of step 2 and later, each right after its own step",
            "BWT: old structures, last step minus own step (Lopez-Paz and Ranzato 2017)",
            "Forgetting: best earlier step minus last (Chaudhry et al. 2018)",
            "Intransigence: joint minus the strategy on New; Δ joint: strategy minus joint on All",
            *why,
            *e.without_row(),
            *_warnings(warned, [m.label for m in e.strategies], names),
        ),
        long=long_table("strategy measure value low high sd seeds why warnings", long),
    )
