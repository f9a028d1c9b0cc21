"""One course with its steps in several orders: what each ends with, and the spread they cause."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from shlex import quote

import numpy as np

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.report.scores import Run, Scores, StrategyScores, labelled
from clbench.report.study import Study
from clbench.report.tables.render import SHARE, Scale, Table, long_table
from clbench.spec.names import ordered_name, split_order
from clbench.statistics.ranking import block_ranks, kendall_w

MEASURES = {
    "all": "all, after the last step",
    "kept": "change of old structures",
    "new": "new structures, own step",
}
"""Measure → what it is. The structures that are old or new differ from order to order."""
_OF_TEXT = ("encoding", "prompt", "file", "model", "weights_sha256")
"""What tells text vectors apart where the order of the structures is another one."""
Order = tuple[int, ...]
"""Listed steps, from 1, in the order in which they were taught."""


def orders_table(study: Study, scale: Scale = SHARE) -> Table:
    """Rows are strategies by measures; a column per order, then what the orders spread.

    Args:
        study: the runs of the course in any order; those in the others lie beside them.
        scale: how the numbers are written.

    Raises:
        StoreError: fewer than two orders with finished runs, or runs of other data or profiles.
    """
    by_order = _scores_by_order(study)
    columns = [",".join(map(str, order)) for order in by_order]
    rows, long, complete = [], [], list[list[float]]()
    uneven, absent = list[str](), list[str]()
    for label, methods in _methods(study, by_order).items():
        absent += _absent(label, methods, by_order)
        seeds, said = _seeds(label, dict(zip(columns, methods, strict=True)))
        uneven += said
        for name, what in MEASURES.items():
            every = [
                _per_seed(scores, method, name)
                for scores, method in zip(by_order.values(), methods, strict=True)
            ]
            long += [
                (label, name, column, seed, value)
                for column, own in zip(columns, every, strict=True)
                for seed, value in own.items()
            ]
            per_order = [{s: own[s] for s in seeds if s in own} for own in every]
            means = [continual.mean(list(own.values())) for own in per_order]
            spread = max(means) - min(means) if not any(map(math.isnan, means)) else math.nan
            within = [continual.spread(list(own.values())) for own in per_order]
            rows.append(
                (
                    label, what, *(scale.over_seeds(list(s.values())) for s in per_order),
                    scale.number(continual.mean(means)), scale.number(continual.spread(means)),
                    scale.number(spread), scale.number(_pooled(within)),
                )
            )  # fmt: skip
            if name == "all" and not any(map(math.isnan, means)):
                complete.append(means)
    first = next(iter(by_order.values()))
    return Table(
        title=f"{_title(study, first)}: {len(columns)} orders of the steps, {scale.unit}",
        columns=(
            "strategy", "measure", *columns, "mean", "sd of orders", "range", "sd of seeds",
        ),
        rows=tuple(rows),
        keys=2,
        narrow=5,
        tail=4,
        rules=frozenset(range(0, len(rows), len(MEASURES))),
        notes=(
            (
                f"{study.scoring} scoring; means over structures, over test cases; mean ± sd over "
                "seeds. A column is an order of the steps as the course lists them."
            ),
            "range: largest minus smallest mean of an order; sd of seeds: pooled over the orders.",
            "Which structures are old or new differs from order to order; all is one question.",
            *uneven,
            *_agreement(complete),
            *absent,
            *(
                f"order {column}: {note}"
                for column, scores in zip(columns, by_order.values(), strict=True)
                for note in scores.holes()
            ),
        ),
        long=long_table("strategy measure order seed value", long),
    )  # fmt: skip


def _methods(
    study: Study, by_order: Mapping[Order, Scores]
) -> Mapping[str, list[StrategyScores | None]]:
    """Label → the runs with the same settings in each order; None where an order has none.

    Raises:
        StoreError: two variants in one order differ in nothing that another order can tell.
    """
    each = [(k, m) for k, scores in enumerate(by_order.values()) for m in scores.strategies]
    found: dict[str, list[StrategyScores | None]] = {}
    for label, members in sorted(labelled({i: _alike(m) for i, (_, m) in enumerate(each)}).items()):
        row: list[StrategyScores | None] = [None] * len(by_order)
        for i in members:
            k, method = each[i]
            if (other := row[k]) is not None:
                raise StoreError(
                    "two variants of a strategy cannot be told apart in other orders of the steps",
                    where=study.results / list(by_order.values())[k].bench,
                    got=f"{other.label} and {method.label}",
                    next_step="keep them in different results folders (--out, --results)",
                )
            row[k] = method
        found[label] = row
    return found


def _alike(method: StrategyScores) -> Run:
    """The first run, its text vectors replaced by what made them.

    The checksum of the vectors is one of an array, whose rows follow the order of the steps.
    """
    run = method.runs[0]
    text = {name: run.record.text_encoding.get(name) for name in _OF_TEXT}
    identity = replace(run.record.identity, vectors=json.dumps(text, sort_keys=True))
    return replace(run, record=replace(run.record, identity=identity))


def _absent(
    label: str, methods: Sequence[StrategyScores | None], by_order: Mapping[Order, Scores]
) -> list[str]:
    """One line per order in which a strategy has no finished run, unless it is named there anyway.

    Args:
        label: of the strategy.
        methods: its runs in each order.
        by_order: the scores of each.
    """
    name = next(m.strategy for m in methods if m is not None)
    return [
        f"order {','.join(map(str, order))}: hole: {label} has no finished run"
        for (order, scores), method in zip(by_order.items(), methods, strict=True)
        if method is None and not {name, label} & set(scores.never_finished)
    ]


def _seeds(
    label: str, methods: Mapping[str, StrategyScores | None]
) -> tuple[Sequence[int], Sequence[str]]:
    """The seeds that a row rests on, those of every order with runs, and what that leaves out.

    Args:
        label: of the strategy.
        methods: order, as its column is called → its runs.
    """
    own = {column: set(m.seeds) for column, m in methods.items() if m is not None}
    common = sorted(set.intersection(*own.values()))
    if all(seeds == set(common) for seeds in own.values()):
        return common, ()
    each = "; ".join(f"order {c}: {_listed(sorted(seeds))}" for c, seeds in own.items())
    rests = f"only seed {_listed(common)} counts" if common else "no seed is common, so none counts"
    return common, (f"{label} has not the same seeds in every order ({each}): {rests}",)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _scores_by_order(study: Study) -> Mapping[Order, Scores]:
    """Order → scores, the listed order first.

    Raises:
        StoreError: fewer than two, or some that answer another question.
    """
    base, _ = split_order(study.bench)
    folders = [study.results / base, *sorted(study.results.glob(f"{base}.order*"))]
    found: dict[Order, Scores] = {}
    for folder in folders:
        _, order = split_order(folder.name)
        scores = replace(study, bench=folder.name).scores()
        if scores is not None:
            found[order or tuple(range(1, scores.last + 1))] = scores
    if len(found) < 2:
        known = ", ".join(",".join(map(str, order)) for order in found) or "none"
        raise StoreError(
            "there are finished runs in fewer than two orders of the steps",
            where=study.results / base,
            got=known,
            next_step=f"`clbench run --bench {quote(base)} --strategy STRATEGY --order 2,1`, and "
            "other orders alike",
        )
    _refuse_other_data(found, base)
    return found


def _refuse_other_data(found: Mapping[Order, Scores], base: str) -> None:
    """Refuse orders that differ in more than the order.

    Raises:
        StoreError: names the two and what differs.
    """
    (first, one), *others = found.items()
    facts = ("bench_version", "numerics", "data_fingerprint", "profile")
    for order, other in others:
        a, b = one.record.identity, other.record.identity
        if differs := [name for name in facts if getattr(a, name) != getattr(b, name)]:
            raise StoreError(
                "these orders do not belong in one table",
                where=f"{ordered_name(base, first)} and {ordered_name(base, order)}",
                expected="the same version, data, profile and numerics",
                got="different " + ", ".join(differs),
                next_step="keep them in different results folders (--out, --results)",
            )


def _per_seed(scores: Scores, method: StrategyScores | None, measure: str) -> dict[int, float]:
    """Seed → one measure of a strategy; nothing where the order has no run of it."""
    if method is None:
        return {}
    at, last = scores.learned_at, scores.last
    return {
        seed: {
            "all": continual.accuracy(r, at, last, lambda s: True),
            "kept": continual.mean(
                r.get((last, c), math.nan) - r.get((s, c), math.nan)
                for c, s in at.items()
                if s < last
            ),
            "new": continual.learning_accuracy(r, at),
        }[measure]
        for seed, r in zip(method.seeds, method.r, strict=True)
    }


def _pooled(deviations: Sequence[float]) -> float:
    """Root of the mean variance; nan where one is not known."""
    return math.sqrt(continual.mean([sd**2 for sd in deviations]))


def _agreement(means: Sequence[Sequence[float]]) -> Sequence[str]:
    """How far orders agree on the ranks of the strategies: Kendall's W over the orders.

    Args:
        means: per strategy its mean in each order.
    """
    k = len(means)
    if k < 2:
        return ()
    ranks = block_ranks(np.array(means).T)
    if len(ranks) and not (ranks != ranks[:, :1]).any():
        return (f"no order ranks one of {k} strategies above another.",)
    w = kendall_w(ranks)
    said = (
        f"ranks of {k} strategies over the orders, by all: Kendall's W {w:.2f} (1: every order "
        "ranks them alike)."
    )
    return (said,)


def _title(study: Study, scores: Scores) -> str:
    """Course and version without the order; says PHANTOM where it must."""
    return scores.title().replace(scores.bench, split_order(study.bench)[0], 1)
