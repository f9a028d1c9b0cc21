"""The last column of Tables 10 and 11: what the confirmatory test says about each strategy.

Room: row 5 (no torch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clbench.report.endpoints import FINAL
from clbench.report.evidence import Method, gather
from clbench.report.runs import Group
from clbench.report.significance import Protocol, confirm

HOLE = "hole"
_SEEN_BY_OTHER = {"better": "worse", "worse": "better"}


def verdicts(
    results: Path,
    groups: Sequence[Group],
    *,
    bench: str,
    scoring: str,
    seeds: Sequence[int] | None,
    ref: str,
) -> tuple[dict[str, str], str]:
    """The word for each strategy against the reference, seen from the strategy.

    Args:
        results: folder of runs.
        groups: the strategies of the table.
        bench: benchmark.
        scoring: of the table.
        seeds: the table's seeds; None: all there are.
        ref: label or registered name of the reference.

    Returns:
        Label → word, and a line that says what was tested. No word where nothing can be compared.
    """
    whole = [g for g in groups if not g.absent]
    if len(whole) < 2:
        return {}, "no verdict: two strategies with finished runs are needed"
    names = [g.label for g in whole if ref in (g.label, g.strategy)]
    if len(names) != 1:
        return {}, f"no verdict: {len(names)} finished strategies answer to the reference {ref!r}"
    evidence = gather(results, bench=bench, ref=names[0], scoring=scoring)
    kept = [m for m in evidence.methods if m.label in {g.label for g in whole}]
    if seeds is not None:
        kept = [_restricted(m, seeds) for m in kept]
    # the word depends on the permutation test, not on the bootstrap interval
    protocol = Protocol(resamples=100)
    found = {**{g.label: HOLE for g in groups}, names[0]: "reference"}
    cautious, m = False, 0
    for c in confirm(replace(evidence, methods=tuple(kept)), protocol):
        if c.endpoint is FINAL and c.verdict is not None:
            found[c.b] = _SEEN_BY_OTHER.get(c.verdict.word, c.verdict.word)
            cautious, m = cautious or bool(c.verdict.scope), c.m
    return found, (
        f"verdict: mean of all structures after the last step, against {names[0]}; stratified "
        f"sign-flip over patients, Holm (m = {m}), alpha {protocol.alpha:g}, equivalence margin "
        f"{protocol.margin:g}" + (", for these training runs" if cautious else "")
    )


def _restricted(method: Method, seeds: Sequence[int]) -> Method:
    """The strategy with some of its seeds."""
    pick = [i for i, s in enumerate(method.seeds) if s in seeds]
    return replace(
        method,
        seeds=tuple(method.seeds[i] for i in pick),
        first_steps=tuple(method.first_steps[i] for i in pick),
        records=tuple(method.records[i] for i in pick),
        cells={
            key: replace(c, values=c.values[pick], with_empty=c.with_empty[pick])
            for key, c in method.cells.items()
        },
    )
