"""What continual learning did to each strategy: old, new, all, kept, forgotten, against joint.

Room: row 5 (no torch). Each number comes with its interval over patients and, apart, its spread
over seeds; a strategy with a hole has a hole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clbench.bootstrap import crossed_interval, seed_means
from clbench.metrics import transfer
from clbench.report.evidence import Evidence, Method
from clbench.report.render import EMPTY, Table
from clbench.report.scale import SHARE, Scale

Floats = NDArray[np.float64]
JOINT = "joint"
"""The strategy that sees all old cases: the upper bound."""
DRAWS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One number of one strategy."""

    value: float = math.nan
    """Mean over structures, patients and seeds."""
    low: float = math.nan
    """Lower end of the 95 % interval over patients and seeds."""
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


def _measure(table: Mapping[str, Floats], why: str = "scores are missing") -> Measure:
    if not table:
        return Measure(why=why)
    i = crossed_interval(table, draws=DRAWS)
    return Measure(
        value=i.estimate, low=i.low, high=i.high, sd=transfer.spread(list(seed_means(table)))
    )


def _minus(a: Mapping[str, Floats], b: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: a[name] - b[name] for name in a} if a and b else {}


def measures(e: Evidence, method: Method) -> dict[str, Measure]:
    """Name → number, in the order of the table."""
    last = e.last
    old = {c: s for c, s in e.learned_at.items() if s < last}
    new = {c: s for c, s in e.learned_at.items() if s > 1}
    at_end = dict.fromkeys(e.learned_at, last)
    found = {
        "Old": _measure(cells_at(e, method, dict.fromkeys(old, last))),
        "New": _measure(cells_at(e, method, new)),
        "All": _measure(cells_at(e, method, at_end)),
        "BWT": _measure(
            _minus(cells_at(e, method, dict.fromkeys(old, last)), cells_at(e, method, old))
        ),
        "Forgetting": _forgetting(e, method),
    }
    joint = [m for m in e.methods if m.strategy == JOINT]
    if len(joint) != 1:
        absent = Measure(why="no run of joint" if not joint else "several variants of joint")
        return {**found, "Intransigence": absent, "Δ joint": absent}
    seeds = [s for s in method.seeds if s in joint[0].seeds]
    why = "no seed in common with joint" if not seeds else "scores are missing"
    mine, bound = cells_at(e, method, new, seeds), cells_at(e, joint[0], new, seeds)
    found["Intransigence"] = _measure(_minus(bound, mine), why)
    mine, bound = cells_at(e, method, at_end, seeds), cells_at(e, joint[0], at_end, seeds)
    found["Δ joint"] = _measure(_minus(mine, bound), why)
    return found


def _forgetting(e: Evidence, method: Method) -> Measure:
    """The best of the earlier steps minus the last, per structure; its interval for two steps only.

    Source: Chaudhry et al., ECCV 2018; see `clbench.metrics.transfer.forgetting`.
    """
    old = {c: s for c, s in e.learned_at.items() if s < e.last}
    if e.last == 2:
        end = dict.fromkeys(old, e.last)
        return _measure(_minus(cells_at(e, method, old), cells_at(e, method, end)))
    per_seed = []
    for i in range(len(method.seeds)):
        r = {}
        for c, s in old.items():
            for t in range(s, e.last + 1):
                cells = method.cells.get((t, e.home(c), c))
                ok = cells is not None and not cells.hole and not np.isnan(cells.values[i]).all()
                r[t, c] = float(np.nanmean(cells.values[i])) if cells and ok else math.nan
        per_seed.append(transfer.mean(transfer.forgetting(r, old, e.last).values()))
    value = transfer.mean(per_seed)
    return Measure(value=value, sd=transfer.spread(per_seed), why="scores are missing")


def learning_table(e: Evidence, scale: Scale = SHARE) -> Table:
    """One row per strategy; a mean over structures, [95 % interval] over patients, ± over seeds."""
    rows, long, why = [], [], []
    for m in e.methods:
        found = measures(e, m)
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
    names = list(measures(e, e.methods[0]))
    sizes = ", ".join(f"{len(p)} {s}" for s, p in e.patients.items())
    return Table(
        title=f"{e.title()}: what was kept and learned, {scale.unit}",
        columns=("strategy", "seeds", *names),
        rows=tuple(rows),
        keys=2,
        narrow=3,
        notes=(
            f"{e.scoring} scoring; mean over structures, [95 % interval] of patients and seeds:",
            f"crossed bootstrap ({DRAWS} draws; {sizes} test cases), ± sd over seeds",
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
