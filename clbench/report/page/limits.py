"""Limits: the last section of a report, "what this cannot show", written from its own numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from clbench.report.page.calibration import (
    CLAIM,
    COVERED,
    SETTLED,
    SIMULATED_ALPHA,
    rates,
    rates_of,
)
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import ENDPOINTS, FINAL, asked, hole
from clbench.report.tuning import tuned_equally
from clbench.statistics.max_t import SEEDS_TO_GENERALIZE
from clbench.statistics.verdicts import smallest_sample

MOST_NAMED = 8
"""So many untestable structures are named."""


def limits(a: Analysis) -> list[str]:
    """One sentence or two per limit, the gravest first."""
    return [*_holes(a), *_data(a), *_seeds(a), *_patients(a), *_course(a), *_tests(a)]


def _holes(a: Analysis) -> Iterator[str]:
    of_pairs = (c.hole for c in a.comparisons)
    own = (hole(a.dice, m, e) for e in asked(a.dice) for m in a.dice.strategies)
    for why in dict.fromkeys(filter(None, (*of_pairs, *own))):
        yield f"Hole: {why}. Nothing that would need it was computed."
    for m in a.dice.strategies:
        if m.unfinished:
            yield f"{m.label}: {m.unfinished} unfinished run(s) left out."
    for name, count in a.dice.never_finished.items():
        yield f"{name}: no finished run ({count} unfinished), so it is in no table and no test."
    if not a.dice.others:
        yield "There is one strategy only: nothing is compared."


def _data(a: Analysis) -> Iterator[str]:
    if a.dice.phantom:
        yield (
            "Anything about patients. All scores are from the PHANTOM: a method that wins here has "
            "shown that it runs and does what it says."
        )
    sources = ", ".join(dict.fromkeys(a.dice.sources))
    if a.dice.external:
        yield (
            f"Other hospitals, scanners or populations beyond the external test sets "
            f"({', '.join(a.dice.external)}): all others come from the sources of the training "
            f"cases ({sources})."
        )
    else:
        yield (
            "Other hospitals, scanners or populations: every test case comes from the same sources "
            f"as the training cases ({sources})."
        )


def _seeds(a: Analysis) -> Iterator[str]:
    counts = sorted({len(c.seeds) for c in a.comparisons if c.seeds})
    few = [n for n in counts if n < SEEDS_TO_GENERALIZE]
    if few:
        yield (
            f"Training anew. With {_list(few)} seed(s) per comparison, a verdict holds for these "
            "training runs: so few hardly tell how far runs differ."
        )
    claims = rates()[rates()["question"] == CLAIM].groupby("seeds")
    said = "; ".join(
        f"with {seeds} seed(s) in "
        + ", ".join(f"{r.rate:.1%} at {r.seed_sd:g}" for r in own.itertuples())
        for seeds, own in claims
    )
    yield (
        "How a training run's own luck looks: in simulated studies without any true difference "
        f"`better` or `worse` was claimed, by number of seeds and run-to-run effect (sd, Dice), "
        f"{said}."
    )
    for seeds in counts:
        settled = rates_of(SETTLED, seeds=seeds, seed_sd=0.02)
        if settled and seeds >= SEEDS_TO_GENERALIZE:
            yield (
                "The words without `for these training runs` were earned by chance in "
                f"{_by_patients(settled)} of these simulated studies at 0.02."
            )
    alone = rates_of(COVERED, seeds=1, seed_sd=0.02)
    if alone and 1 in counts:
        yield (
            "How sure a mean of one training run is: its interval is over patients, and held the "
            f"truth of new runs in {_by_patients(alone)} of simulated studies whose runs differ "
            "(sd 0.02 Dice)."
        )
    if a.protocol.alpha != SIMULATED_ALPHA:
        yield (
            "How often a claim at this report's level is wrong: the simulated studies were tested "
            f"at {SIMULATED_ALPHA:.0%}, this report at {a.protocol.alpha:.6g}."
        )


def _patients(a: Analysis) -> Iterator[str]:
    for endpoint in ENDPOINTS:
        detectable = [
            c.result.detectable
            for c in a.comparisons
            if c.endpoint is endpoint and c.result and not c.result.beyond_detectable
            if not math.isnan(c.result.detectable)
        ]
        if detectable:
            ends = dict.fromkeys(f"{find(detectable):.3f}" for find in (min, max))
            yield (
                f"Small differences in the endpoint `{endpoint.name}`: below about "
                f"{' to '.join(ends)} Dice (depending on the other strategy) they are missed more "
                "often than one time in five."
            )
    least = smallest_sample(a.protocol.alpha)
    untested = sorted(
        {
            f"{r.structure} ({r.n} patients)"
            for r in a.classes
            if r.verdict is not None and r.verdict.word == "not testable"
        }
    )
    if untested:
        more = f" and {len(untested) - MOST_NAMED} more" * (len(untested) > MOST_NAMED)
        yield (
            f"Single structures with fewer than {least} patients: no data can bring p to "
            f"{a.protocol.alpha:g}. Not testable: {', '.join(untested[:MOST_NAMED])}{more}."
        )
    for name in a.dice.homes:
        ids = a.dice.patients[name]
        if 0 < len(ids) < least:
            yield f"Anything on {name} alone: {len(ids)} patients cannot reach significance."


def _course(a: Analysis) -> Iterator[str]:
    sets = {name for c in a.comparisons for name in c.patients}
    if len(sets) > 1:
        yield (
            "One population: the mean over all structures joins different patients "
            f"({_list(sorted(sets))}); no patient has all structures. Its test flips signs patient "
            "by patient."
        )
    apart = [
        c.b for c in a.comparisons if c.endpoint is FINAL and not c.hole and not c.first_shared
    ]
    if apart and a.dice.last > 1:
        yield (
            f"What part of the final difference between {a.dice.reference.label} and "
            f"{_list(apart)} is continual learning: they do not start from one first step. The "
            "endpoint `kept` is the contrast that takes the start out, patient by patient."
        )
    names = {m.strategy for m in a.dice.strategies}
    for name, what in (("joint", "joint reference"), ("finetune", "lower bound")):
        if name not in names:
            yield f"The distance to the {what}: there is no finished run of `{name}`."
    yield (
        "False alarms on cases that do not annotate a structure: unlabeled is not absent, so they "
        "cannot be scored."
    )
    tuned = tuned_equally({m.label: m.records for m in a.dice.strategies})
    if tuned is None:
        yield "Whether all strategies were tuned alike: no run was made with `--tuned`."
    elif tuned.startswith("**no**"):
        yield f"What equal tuning would have shown ({tuned.removeprefix('**no**: ')})."


def _tests(a: Analysis) -> Iterator[str]:
    yield (
        "Anything from the exploratory tables alone: they say where to look, and were not fixed in "
        "advance. Each confirmatory endpoint is a family of its own."
    )
    yield (
        "Boundaries, volumes or detection: this report tests Dice. The other metrics of a run are "
        "in its `scores.csv`."
    )


def _by_patients(shares: Mapping[str, float]) -> str:
    """Shares of simulated studies, each with its patients."""
    return _list([f"{share:.1%} ({patients} patients)" for patients, share in shares.items()])


def _list(values: list[int] | list[str]) -> str:
    *texts, last = map(str, values)
    return f"{', '.join(texts)} and {last}" if texts else last
