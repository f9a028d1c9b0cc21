"""Internal and external test sets beside each other: means, ranks, and which order turns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

from clbench.report.scores import StrategyScores
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.external import ExternalRanking
from clbench.report.study import Protocol
from clbench.report.tables.render import EMPTY, SHARE, Scale, Table, long_table

PAIRS_NAMED = 5
"""Reversed pairs that the notes name; the rest stand in the CSV."""


def external_table(study: Analysis, scale: Scale = SHARE) -> Table:
    """One row per strategy: internal and external mean and rank, and pairs in another order.

    Args:
        study: the runs.
        scale: how the numbers are written.

    Raises:
        StoreError: no finished runs, or a course without external test sets.
    """
    e = study.dice
    study.need(
        e.external,
        "the course has no external test sets",
        "name sources that are only tested on in `[[external]]` of a course file",
    )
    found = study.external_rankings
    heads = ("internal", "rank", "external", "rank", "turned")
    columns = [_columns(one, scale) for one in found]
    return Table(
        title=f"{e.title()}: after the last step, internally and externally, {scale.unit}",
        columns=("strategy", "seeds", *heads * len(found)),
        over=("", "", *(one.eval_set for one in found for _ in heads)),
        rows=tuple(
            (
                m.label, _seeds(m, found),
                *chain.from_iterable(by_label.get(m.label, [EMPTY] * 5) for by_label in columns),
            )
            for m in e.strategies
        ),
        keys=2,
        block=10,
        narrow=5,
        notes=(
            (
                f"{e.scoring} scoring, means over structures and seeds; internal: the structures "
                "that the external test set annotates, on test cases of the sources that taught "
                "them."
            ),
            "turned: strategies against which its order is another one externally.",
            *chain.from_iterable(_notes(one, study.protocol, scale) for one in found),
            (
                f"A reversal is shown where one strategy is better internally and worse externally "
                f"(p, the larger of the two, ≤ {study.protocol.alpha:g}); all pairs on both test "
                "sets are tested together (max-T over patients flipped jointly, seeds averaged)."
            ),
        ),
        long=_long(found, study.protocol),
    )  # fmt: skip


def _seeds(m: StrategyScores, found: Sequence[ExternalRanking]) -> str:
    """How many of its training runs the numbers rest on; several where test sets differ in it."""
    counts = {len(one.seeds) for one in found if m.label in one.labels}
    return "–".join(map(str, sorted(counts))) or str(len(m.seeds))


def ranks_of(values: Sequence[float]) -> list[int]:
    """1 for the largest; equal ones share the better rank."""
    return [1 + sum(other > value for other in values) for value in values]


def _columns(one: ExternalRanking, scale: Scale) -> dict[str, list[str]]:
    """Strategy → its cells for one external test set."""
    turned = [sum(k in (p.first, p.second) for p in one.turned) for k in range(len(one.labels))]
    sides = zip(
        one.labels, one.internal, ranks_of(one.internal), one.external, ranks_of(one.external),
        turned, strict=True,
    )  # fmt: skip
    return {
        label: [scale.number(a), str(rank_a), scale.number(b), str(rank_b), str(count)]
        for label, a, rank_a, b, rank_b, count in sides
    }


def _notes(one: ExternalRanking, protocol: Protocol, scale: Scale) -> Iterable[str]:
    """What one external test set is, and what it reverses."""
    yield (
        f"{one.eval_set}: {len(one.structures)} structures, {one.patients[1]} patients; "
        f"internally {one.patients[0]} patients."
    )
    yield from (f"hole: {why}" for why in one.left_out)
    if one.beyond:
        yield (
            f"{one.eval_set}: means of the seeds that all of them have "
            f"({', '.join(map(str, one.seeds))}); others do not count: {'; '.join(one.beyond)}."
        )
    pairs = len(one.reversals.pairs)
    if not pairs:
        return
    shown = one.shown(protocol.alpha)
    yield (
        f"{one.eval_set}: {len(one.turned)} of {pairs} pairs in another order (Kendall's tau "
        f"{one.reversals.kendall_tau:+.2f}); shown: {len(shown)}."
    )
    for pair in shown[:PAIRS_NAMED]:
        first, second = one.in_order(pair)
        yield (
            f"{one.eval_set}: {first} is better than {second} internally "
            f"({scale.signed(abs(pair.internal))}) and worse externally "
            f"({scale.signed(-abs(pair.external))}), p {pair.p:.3g}."
        )
    if one.turned and not shown:
        first, second = one.in_order(one.turned[0])
        p = one.turned[0].p
        told = "too few patients" if math.isnan(p) else f"p {p:.3g}"
        yield f"{one.eval_set}: nearest to a reversal are {first} and {second} ({told})."


def _long(found: Iterable[ExternalRanking], protocol: Protocol) -> Table:
    return long_table(
        "eval_set first second internal external p_internal p_external p reversed",
        [
            (
                one.eval_set, one.labels[pair.first], one.labels[pair.second], pair.internal,
                pair.external, pair.p_internal, pair.p_external, pair.p, pair.p <= protocol.alpha,
            )
            for one in found
            for pair in one.reversals.pairs
        ],
    )  # fmt: skip
