"""What one run ends with, and the summary of several: scores, forgetting, learning, time.

Every number is computed here from `scores.csv`; a mean over an incomplete
set is an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.evaluation.metrics import continual
from clbench.report.results import PHANTOM, StoredRun, past_card, read_run
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, SHARE, Scale, Table, number

LOWER_BOUND = "finetune"
"""Label of the strategy whose loss the others are set beside."""


def run_report(folder: Path, *, scoring: str) -> list[Table]:
    """What one run ends with: the score of every structure after each step, and the forgetting."""
    run = read_run(StoredRun.read(folder), scoring)
    record, last = run.record, run.last
    steps = range(1, last + 1)
    ceiling = continual.cells(
        run.stored.rows_of("strict", "dice_ceiling"),
        run.sources,
        scoring="strict",
        metric="dice_ceiling",
    )
    gone = continual.forgetting(run.values, run.learned_at, last)
    rows = []
    for name, own in run.learned_at.items():
        after = [run.r.get((t, name)) for t in steps]
        final = after[-1]
        rows.append(
            (
                name,
                run.sources[own - 1],
                *(EMPTY if c is None else number(c.value) for c in after),
                number(gone.get(name, math.nan)),
                str(final.cases) if final else EMPTY,
                str(final.missed) if final else EMPTY,
                number(ceiling[last, name].value) if (last, name) in ceiling else EMPTY,
            )
        )
    for title, members in record["course"]["groups"].items():
        old = [gone[c] for c in members if c in gone]
        rows.append(
            (
                title,
                f"mean of {len(members)}",
                *(
                    number(continual.mean(run.values.get((t, c), math.nan) for c in members))
                    for t in steps
                ),
                number(continual.mean(old)) if len(old) == len(members) else EMPTY,
                EMPTY, EMPTY, EMPTY,
            )
        )  # fmt: skip
    scores = Table(
        title=f"{_title(record)}: {record['strategy']}, seed {record['identity']['seed']}, "
        f"Dice ({scoring} scoring)",
        columns=(
            "structure", "test cases of", *(f"after step {t}" for t in steps),
            "forgetting", "cases", "missed", "ceiling",
        ),
        rows=tuple(rows),
        keys=2,
        notes=(
            "forgetting: best score of an earlier step minus the score after the last.",
            "missed: cases in which nothing was found.",
            "ceiling: the truth itself taken to the network's grid and back (strict scoring).",
        ),
    )  # fmt: skip
    bwt = continual.backward_transfer(run.values, run.learned_at, last)
    kept = Table(
        title="What was kept and what was learned",
        columns=("measure", "value"),
        rows=(
            ("old structures, each after its own step",
             number(continual.mean(run.values.get((s, c), math.nan)
                                  for c, s in run.learned_at.items() if s < last))),
            ("old structures, after the last step",
             number(continual.accuracy(run.values, run.learned_at, last, last.__gt__))),
            ("forgetting (mean over old structures)", number(continual.mean(gone.values()))),
            ("backward transfer (mean over old structures)", number(continual.mean(bwt.values()))),
            ("new structures, each after its own step",
             number(continual.learning_accuracy(run.values, run.learned_at))),
            ("all structures, after the last step",
             number(continual.accuracy(run.values, run.learned_at, last, lambda s: True))),
        ),
        notes=(f"past images opened: {past_card(record)}",),
    )  # fmt: skip
    return [scores, kept] if last > 1 else [scores]


def _title(record: Mapping[str, Any]) -> str:
    identity = record["identity"]
    return f"{identity['bench']} v{identity['bench_version']}" + (
        "" if record["patients"] else f" on the {PHANTOM}"
    )


def summary(study: Study, scale: Scale = SHARE) -> Table:
    """One row per strategy: what it knew, what it lost, what it learned."""
    over_seeds = scale.over_seeds
    groups = study.finished()
    rows, lost = [], {}
    for g in groups:
        last, at = g.runs[0].last, g.runs[0].learned_at
        first = [c for c, s in at.items() if s == 1]
        begin = [continual.mean(r.values[1, c] for c in first) for r in g.runs]
        end = [continual.mean(r.values[last, c] for c in first) for r in g.runs]
        lowest = min(
            ((r.values[1, c], c, r.record["identity"]["seed"]) for r in g.runs for c in first),
            key=lambda x: x[0],
        )
        seeds = [str(r.seed) for r in g.runs]
        lost[g.label] = {r.seed: a - b for r, a, b in zip(g.runs, begin, end, strict=True)}
        rows.append(
            (
                g.label,
                ", ".join(seeds) if len(seeds) > 1 else f"{seeds[0]} (one seed)",
                over_seeds(begin),
                f"{scale.number(lowest[0])} ({lowest[1]}, seed {lowest[2]})",
                over_seeds(end),
                over_seeds(list(lost[g.label].values())),
                over_seeds([continual.learning_accuracy(r.values, at) for r in g.runs]),
                over_seeds(
                    [continual.accuracy(r.values, at, last, lambda s: True) for r in g.runs]
                ),
            )
        )
    record = groups[0].runs[0].record
    cases = ", ".join(
        f"{len(test)} {step['source']}"
        for step, test in zip(record["course"]["steps"], record["course"]["test"], strict=True)
    )
    over = "mean ± sd over seeds"
    notes = [
        f"{scale.unit} ({study.scoring} scoring), class means over test cases ({cases}); {over}.",
        f"profile {record['identity']['profile']['name']}, data {record['data_fingerprint']}.",
        *_beside_the_lower_bound(lost),
    ]
    if unfinished := sum(g.unfinished for g in groups):
        notes.append(f"left out: {unfinished} unfinished run(s)")
    return Table(
        title=f"{_title(record)}: summary",
        columns=(
            "strategy", "seeds", "step 1 structures, after step 1", "lowest of them, any seed",
            "the same, after the last step", "lost", "new structures", "all, after the last step",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )  # fmt: skip


def _beside_the_lower_bound(lost: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Which strategies lost less than half of what the lower bound lost, on the seeds they share.

    Args:
        lost: label → seed → loss of the structures of step 1.
    """
    bound = lost.get(LOWER_BOUND, {})
    shares, without = {}, []
    for label, own in lost.items():
        if label == LOWER_BOUND:
            continue
        seeds = own.keys() & bound.keys()
        below = sum(bound[s] for s in seeds)
        share = sum(own[s] for s in seeds) / below if below > 0 else math.nan
        if math.isnan(share):
            without.append(label)
        else:
            shares[label] = share
    if not shares:
        return []
    notes = []
    for word, half in (("less than half", True), ("half or more", False)):
        chosen = sorted((v, k) for k, v in shares.items() if (v < 0.5) is half)
        named = ", ".join(f"{k} ({v:z.0%})" for v, k in chosen)
        notes.append(f"lost {word} of what {LOWER_BOUND} lost, same seeds: {named or 'none'}.")
    if without:
        notes.append(f"no seed in common with {LOWER_BOUND}, or no score: {', '.join(without)}.")
    return notes
