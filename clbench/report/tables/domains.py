"""Domains: a structure taught again from other sources, measured on each of them.

A domain is a source, and its step the one that teaches from it. What counts on a domain are the
structures that its step teaches, new or again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clbench.evaluation.metrics import continual
from clbench.report.scores import Scores, StrategyScores
from clbench.report.study import Study
from clbench.report.tables.render import SHARE, Scale, Table, long_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A source, as one step teaches from it."""

    name: str
    """The source."""
    step: int
    """1-based step that teaches from it."""
    members: tuple[str, ...]
    """Structures that the step teaches."""
    known: tuple[str, ...]
    """Those of them that an earlier step taught from another source."""


def domains_of(scores: Scores) -> list[Domain]:
    """The domain of each step, in order."""
    return [
        Domain(
            name=step.source,
            step=number,
            members=(*step.again, *step.learns),
            known=tuple(step.again),
        )
        for number, step in enumerate(scores.record.course.steps, 1)
    ]


def on_domain(
    method: StrategyScores, domain: Domain, step: int, members: Sequence[str]
) -> list[float]:
    """Per seed the mean of some structures on a domain after a step; nan where one is missing.

    Args:
        method: the strategy.
        domain: whose test cases.
        step: 1-based step after which they are examined.
        members: the structures.
    """
    per_seed = []
    for seed in range(len(method.runs)):
        means = []
        for name in members:
            cells = method.cells.get((step, domain.name, name))
            values = np.empty(0) if cells is None else cells.values[seed]
            hole = cells is None or cells.reasons[seed]
            means.append(math.nan if hole else continual.mean(values[~np.isnan(values)].tolist()))
        per_seed.append(continual.mean(means))
    return per_seed


def domains_table(study: Study, scale: Scale = SHARE) -> Table:
    """Rows are strategies by domains: before its step, right after it, after the last one.

    Args:
        study: the runs.
        scale: how the numbers are written.

    Raises:
        StoreError: no finished runs, or a course that teaches nothing again.
    """
    scores = study.need_scores()
    domains = domains_of(scores)
    study.need(
        any(d.known for d in domains),
        "the course teaches no structure again from another source",
        "name structures in `again` of a step, or run `domain_ext`",
    )
    rows, long = [], []
    for method in scores.strategies:
        of_all: dict[str, list[list[float]]] = {"before": [], "own": [], "last": [], "change": []}
        for domain in domains:
            own, last = (
                on_domain(method, domain, t, domain.members) for t in (domain.step, scores.last)
            )
            values = {
                "before": on_domain(method, domain, domain.step - 1, domain.known)
                if domain.known
                else [],
                "own": own,
                "last": last,
                "change": [b - a for a, b in zip(own, last, strict=True)]
                if domain.step < scores.last
                else [],
            }
            rows.append((method.label, *_row(domain, values, scale)))
            for name, per_seed in values.items():
                if per_seed:
                    of_all[name].append(per_seed)
                long += [
                    (method.label, domain.name, domain.step, name, seed, value)
                    for seed, value in zip(method.seeds, per_seed, strict=bool(per_seed))
                ]
        # The domain of the last step has no change: a mean over the others has a row of its own, so
        # that a change is the difference of the two means beside it.
        but_last = {name: of_all[name][: len(of_all["change"])] for name in ("own", "last")}
        for words, lists in (
            ("mean of domains", {**of_all, "change": []}),
            ("mean without the last", {**of_all, **but_last, "before": []}),
        ):
            means = {
                name: [continual.mean(seed) for seed in zip(*per_domain, strict=True)]
                for name, per_domain in lists.items()
            }
            mean = Domain(name=words, step=0, members=(), known=())
            rows.append((method.label, *_row(mean, means, scale)))
    return Table(
        title=f"{scores.title()}: domain by domain, {scale.unit}",
        columns=(
            "strategy", "domain", "step", "structures", "before its step", "right after it",
            "after the last step", "change",
        ),
        rows=tuple(rows),
        keys=3,
        rules=frozenset(range(0, len(rows), len(domains) + 2)),
        notes=(
            (
                f"{study.scoring} scoring; means over the structures that the domain's step "
                "teaches, over its test cases; mean ± sd over seeds"
            ),
            (
                "before its step: forward transfer, of what earlier domains taught to one not yet "
                "seen; its mean is over the domains that teach something again"
            ),
            (
                "change: after the last step minus right after its own; below 0: forgotten; the "
                "domain of the last step has none"
            ),
            *scores.holes(),
        ),
        long=long_table("strategy domain step measure seed value", long),
    )  # fmt: skip


def _row(domain: Domain, values: dict[str, list[float]], scale: Scale) -> tuple[str, ...]:
    """Cells of a domain after the name of the strategy."""
    change = values["change"]
    sd = continual.spread(change)
    said = scale.signed(continual.mean(change))
    return (
        domain.name, str(domain.step) if domain.step else "",
        ", ".join(name.replace("_", " ") for name in domain.members),
        *(scale.over_seeds(values[name]) for name in ("before", "own", "last")),
        said if math.isnan(sd) else f"{said} ± {scale.number(sd)}",
    )  # fmt: skip
