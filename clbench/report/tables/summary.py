"""What one run ends with, and the summary of several: scores, forgetting, learning, time.

Every number is computed here from `scores.csv`; a mean over an incomplete
set is an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench.evaluation.metrics import continual
from clbench.report.past_images import past_card
from clbench.report.scores import Run, Scores, read_frame, scores_of
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, SHARE, Scale, Table, long_table, number
from clbench.report.tuning import tuned_card

LOWER_BOUND = "finetune"
"""Label of the strategy whose loss the others are set beside."""


def run_report(folder: Path, *, scoring: str) -> list[Table]:
    """What one run ends with: the score of every structure after each step, and the forgetting."""
    run = Run.read(folder)
    frame = read_frame([run])
    dice = scores_of(frame, [run], scoring=scoring)
    of_truth = scores_of(frame, [run], scoring="strict", metric="dice_ceiling")
    tables = [_structures(dice, of_truth.strategies[0].r[0])]
    if dice.last == 1:
        return tables
    values = continual.course_metrics(dice.reference.r[0], dice.learned_at, dice.last)
    labels = {
        "own": "old structures, each after its own step",
        "old": "old structures, after the last step",
        "forgetting": "forgetting (mean over old structures)",
        "bwt": "backward transfer (mean over old structures)",
        "learning": "new structures, each after its own step",
        "all": "all structures, after the last step",
    }
    own = continual.mean(
        dice.reference.r[0].get((s, c), math.nan)
        for c, s in dice.learned_at.items()
        if s < dice.last
    )
    return [
        *tables,
        Table(
            title="What was kept and what was learned",
            columns=("measure", "value"),
            rows=tuple(
                (label, number(own if name == "own" else values[name].value))
                for name, label in labels.items()
            ),
            notes=(
                f"past images opened: {past_card(run.record)}",
                *([f"settings: {tuned_card(run.record)}"] if run.record.tuned else []),
            ),
        ),
    ]


def _structures(dice: Scores, ceiling: continual.Matrix) -> Table:
    """Every structure of one run after each step, and the means of groups."""
    strategy, last, record = dice.reference, dice.last, dice.record
    r = strategy.r[0]
    steps = range(1, last + 1)
    lost = continual.forgetting(r, dice.learned_at, last)
    rows = []
    for name, home in strategy.home.items():
        final = strategy.cells[last, home, name]
        rows.append(
            (
                name, home, *(number(r.get((t, name), math.nan)) for t in steps),
                number(lost.get(name, math.nan)), str(final.cases[0]), str(final.missed[0]),
                number(ceiling.get((last, name), math.nan)),
            )
        )  # fmt: skip
    for title, members in record.course.groups.items():
        means = [continual.mean(r.get((t, c), math.nan) for c in members) for t in steps]
        all_old = continual.mean(lost.get(c, math.nan) for c in members)
        texts = map(number, [*means, all_old])
        rows.append((title, f"mean of {len(members)}", *texts, EMPTY, EMPTY, EMPTY))
    return Table(
        title=f"{dice.title()}: {strategy.label}, seed {record.seed}, Dice "
        f"({dice.scoring} scoring)",
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


def summary(study: Study, scale: Scale = SHARE, *, reference_first: bool = False) -> Table:
    """One row per strategy: what it knew, what it lost, what it learned.

    Args:
        study: the runs.
        scale: how the numbers are written.
        reference_first: the study's reference stands above the others; else by name.
    """
    over_seeds = scale.over_seeds
    scores = study.need_scores()
    if reference_first:
        scores = study.reference_first(scores)
    last, at = scores.last, scores.learned_at
    first = [c for c, s in at.items() if s == 1]
    study.need(
        first,
        f"the external test set {scores.on!r} annotates no structure of step 1",
        "name another one with --external, or `clbench table learning`",
    )
    rows, lost, long = [], {}, []
    for g in scores.strategies:
        begin, end = ([continual.mean(r[t, c] for c in first) for r in g.r] for t in (1, last))
        after_1 = [(r[1, c], c, seed) for seed, r in zip(g.seeds, g.r, strict=True) for c in first]
        seeds = list(map(str, g.seeds))
        new = [continual.learning_accuracy(r, at) for r in g.r]
        whole = [continual.accuracy(r, at, last, lambda s: True) for r in g.r]
        lost[g.label] = {s: a - b for s, a, b in zip(g.seeds, begin, end, strict=True)}
        of_measure = {"before": begin, "after": end, "lost": list(lost[g.label].values()),
                      "new": new, "all": whole}  # fmt: skip
        long += [
            (g.label, name, "", seed, value)
            for name, values in of_measure.items()
            for seed, value in zip(g.seeds, values, strict=True)
        ]
        long += [
            (g.label, "before", c, seed, r[1, c])
            for c in first
            for seed, r in zip(g.seeds, g.r, strict=True)
        ]
        rows.append(
            (
                g.label,
                ", ".join(seeds) if len(seeds) > 1 else f"{seeds[0]} (one seed)",
                over_seeds(begin),
                _lowest(after_1, scale),
                over_seeds(end),
                over_seeds(list(lost[g.label].values())),
                over_seeds(new),
                over_seeds(whole),
            )
        )
    record = scores.record
    cases = (
        f"{scores.scans[scores.on]} {scores.on}"
        if scores.on
        else ", ".join(
            f"{len(test)} {step.source}"
            for step, test in zip(record.course.steps, record.course.test, strict=True)
        )
    )
    over = "mean ± sd over seeds"
    notes = [
        f"{scale.unit} ({study.scoring} scoring), class means over test cases ({cases}); {over}.",
        f"profile {record.identity.profile['name']}, data {record.data_fingerprint}.",
        *_beside_the_lower_bound(lost),
        *scores.holes(),
    ]
    if unfinished := sum(g.unfinished for g in scores.strategies):
        notes.append(f"left out: {unfinished} unfinished run(s) of these strategies")
    return Table(
        title=f"{scores.title()}: summary",
        columns=(
            "strategy", "seeds", "step 1 structures, after step 1", "lowest of them, any seed",
            "the same, after the last step", "lost", "new structures", "all, after the last step",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
        long=long_table("strategy measure structure seed value", long),
    )  # fmt: skip


def _lowest(scores: Sequence[tuple[float, str, int]], scale: Scale) -> str:
    """The lowest score and whose it is; the dash where one is missing, for it may be lower.

    Args:
        scores: score, structure, seed.
        scale: how numbers are written.
    """
    if any(math.isnan(value) for value, _, _ in scores):
        return EMPTY
    value, structure, seed = min(scores, key=lambda x: x[0])
    return f"{scale.number(value)} ({structure}, seed {seed})"


def _beside_the_lower_bound(lost: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Which strategies lost less than half of what the lower bound lost, on the seeds they share.

    Args:
        lost: label → seed → loss of the structures of step 1.
    """
    bound = lost.get(LOWER_BOUND, {})
    shares = {}
    for label, own in lost.items():
        seeds = own.keys() & bound.keys()
        below = sum(bound[s] for s in seeds)
        shares[label] = sum(own[s] for s in seeds) / below if below > 0 else math.nan
    shares.pop(LOWER_BOUND, None)
    without = [label for label, share in shares.items() if math.isnan(share)]
    if len(without) == len(shares):
        return []
    notes = []
    for word, half in (("less than half", True), ("half or more", False)):
        chosen = sorted((v, k) for k, v in shares.items() if k not in without and (v < 0.5) is half)
        named = ", ".join(f"{k} ({v:z.0%})" for v, k in chosen)
        notes.append(f"lost {word} of what {LOWER_BOUND} lost, same seeds: {named or 'none'}.")
    if without:
        notes.append(f"no seed in common with {LOWER_BOUND}, or no score: {', '.join(without)}.")
    return notes
