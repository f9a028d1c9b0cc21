"""Verdicts: each comparison, and each strategy's forgetting, as one sentence."""

from __future__ import annotations

import math

from clbench.report.significance.confirmatory import Comparison, Tested
from clbench.report.significance.forgetting import Own
from clbench.report.study import Protocol
from clbench.statistics.max_t import SEEDS_TO_GENERALIZE, FamilyComparison
from clbench.statistics.sample_size import MOST, PatientsNeeded
from clbench.statistics.verdicts import LESS, MORE, NOT_BETTER, NOT_WORSE, smallest_sample

NO_NUMBER = "no number"
_WHEN = {
    "final": "after the last step (mean Dice of all structures)",
    "kept": "in what is kept (change in Dice of the old structures)",
    "new": "in what is learned (mean Dice of the new structures, each right after its own step)",
}


def p_text(p: float, alpha: float, *, sign: bool = True) -> str:
    """`= 0.012`, `< 0.0001`, with as many digits as keep it on its side of the level.

    Args:
        p: the p-value; nan has no text.
        alpha: level of the test.
        sign: with an equals sign; cells have none.

    Example:
        >>> from clbench.report.significance.sentences import p_text
        >>> p_text(0.0123, 0.05), p_text(0.0503, 0.05), p_text(0.04996, 0.05)
        ('= 0.012', '= 0.0503', '= 0.05')
    """
    if math.isnan(p):
        return ""
    if p < 1e-4 <= alpha:
        return "< 0.0001"
    texts = (f"{p:.{digits}g}" if p < 0.1 else f"{p:.{digits + 1}f}" for digits in range(2, 12))
    text = next((t for t in texts if (float(t) <= alpha) == (p <= alpha)), f"{p:.12g}")
    return f"= {text}" if sign else text


def end_text(value: float, margin: float, *, signed: bool = True) -> str:
    """An end of an interval: three decimals, or as many as keep it apart from 0 and the margins.

    Args:
        value: the end.
        margin: of equivalence.
        signed: write a plus, too.

    Example:
        >>> from clbench.report.significance.sentences import end_text
        >>> end_text(-0.0112, 0.02), end_text(0.00031, 0.02), end_text(-0.0199996, 0.02)
        ('-0.011', '+0.0003', '-0.0199996')
    """
    sign = "+" if signed else ""
    for digits in range(3, 9):
        text = f"{value:{sign}.{digits}f}"
        if all(
            (float(text) < mark) == (value < mark) and (float(text) > mark) == (value > mark)
            for mark in (0.0, margin, -margin)
        ):
            return text
    return f"{value:{sign}.3f}"


def span_text(result: FamilyComparison, margin: float) -> str:
    """The simultaneous interval: `-0.011 to +0.028`, `above 0 to +0.028`; empty = none."""
    if math.isnan(result.low):
        return ""
    low, high = (end_text(end, margin) for end in (result.low, result.high))
    low = f"above {result.low:g}" if result.low_open else low
    high = f"below {result.high:g}" if result.high_open else high
    return f"{low} to {high}"


def soonest(needed: PatientsNeeded, *, change: bool) -> tuple[float, str]:
    """The smaller number of patients, and whether it shows a difference (d) or the other claim.

    Args:
        needed: patients that would decide.
        change: a strategy's own change, for which "keeps" (k) takes the place of "equivalent" (e).
    """
    other = (needed.not_worse, "k") if change else (needed.equivalence, "e")
    claims = [(needed.difference, "d"), other]
    return min((c for c in claims if not math.isnan(c[0])), key=lambda c: c[0])


def needed_text(result: FamilyComparison, *, change: bool = False) -> str:
    """How many patients would decide, and what they would show; empty = not known.

    Args:
        result: an undecided comparison.
        change: a strategy's own change, for which "keeps" takes the place of "equivalent".
    """
    if result.needed is None:
        return ""
    n, letter = soonest(result.needed, change=change)
    d, e = ("a change", "that it keeps") if change else ("a difference", "equivalence")
    claim = d if letter == "d" else e
    if math.isinf(n):
        return f"more than {MOST:,} patients ({result.mean.n} now) would be needed to decide"
    return (
        f"about {n:.0f} patients ({result.mean.n} now) would decide (for {claim}), if difference "
        "and spread stay as seen"
    )


def sentence(c: Comparison, protocol: Protocol) -> str:
    """One comparison in words; Dice differences with three decimals."""
    when, r = _WHEN[c.endpoint.name], c.result
    if c.hole or r is None:
        return f"{c.a} against {c.b} {when}: {NO_NUMBER} ({c.hole})."
    margin = f"{protocol.margin:g} Dice"
    v = r.verdict
    scope = f", {v.scope}" if v.scope else ""
    if v.word == "shared":
        return f"{c.a} and {c.b} {when}: one checkpoint of both, nothing is compared."
    if v.word == "not testable":
        return f"{c.a} against {c.b} {when}: {_not_testable(c, r, protocol)}."
    if v.word in ("better", "worse"):
        by = {MORE: f" by more than {margin}", LESS: f", by less than {margin},"}
        claim = f"{c.a} is {v.word} than {c.b}"
        if v.detail_scope:
            claim += f" {when}, and {v.detail_scope}{by[v.detail].strip(',')}"
        else:
            claim += f"{by.get(v.detail, '')} {when}{scope}"
    elif v.word == "equivalent":
        claim = f"{c.a} and {c.b} are equivalent {when}{scope}; they differ by less than {margin}"
    else:
        rest = {NOT_WORSE: f", not worse by {margin}", NOT_BETTER: f", not better by {margin}"}
        claim = f"{c.a} against {c.b} {when} is undecided{scope}{rest.get(v.detail, '')}"
    p = f"adjusted p {p_text(r.p, protocol.alpha)} of a difference, "
    p += f"p {p_text(r.p_equivalent, protocol.alpha)} of equivalence"
    return f"{claim}: {c.mean_a:.3f} and {c.mean_b:.3f}; {_numbers(c, r, p, protocol)}."


def own_sentence(o: Own, protocol: Protocol) -> str:
    """One strategy's forgetting in words."""
    r = o.result
    if r is None:
        return f"{o.method}, kept: {NO_NUMBER} ({o.hole})."
    margin = f"{protocol.margin:g} Dice"
    v = r.verdict
    scope = f"{v.scope[:1].upper()}{v.scope[1:]}, " if v.scope else ""
    if v.word == "not testable":
        return f"{o.method}, kept: {_too_few(r, protocol)}."
    claim = {
        "forgets": "forgets",
        "gains": "gains on its old structures",
        "keeps": f"keeps its old structures; a loss of {margin} or more is ruled out",
        "undecided": "is undecided; neither a change nor that it keeps its old structures was "
        "shown",
    }[v.word]
    if v.detail:
        limited = f", and {v.detail_scope}" if v.detail_scope else ","
        claim += f"{limited} by {'more' if v.detail == MORE else 'less'} than {margin}"
    p = f"adjusted p {p_text(r.p, protocol.alpha)} of a change, "
    p += f"p {p_text(r.p_low, protocol.alpha)} against a loss of {margin}"
    return f"{scope}{o.method} {claim}: {_numbers(o, r, f'{p} or more', protocol, change=True)}."


def _numbers(
    t: Tested, r: FamilyComparison, p: str, protocol: Protocol, *, change: bool = False
) -> str:
    """The numbers a claim rests on.

    Args:
        t: what was tested.
        r: its result.
        p: the p-values in words.
        protocol: confidence of the interval.
        change: a strategy's own change.
    """
    span = span_text(r, protocol.margin)
    interval = f"{protocol.percent} interval {span}" if span else "no interval"
    n = " and ".join(f"{k} {name}" for name, k in t.patients.items())
    parts = [
        f"{'change' if change else 'difference'} {r.mean.estimate:+.3f} ({interval})",
        f"{p} (m = {t.m})",
        f"{n} patients, {len(t.seeds)} seed{'s' if len(t.seeds) > 1 else ''}",
        _over_new_runs(r, protocol),
        needed_text(r, change=change) if r.verdict.word == "undecided" else "",
    ]
    return "; ".join(part for part in parts if part)


def _over_new_runs(r: FamilyComparison, protocol: Protocol) -> str:
    """The interval over new runs, and the one that decided where a claim is limited to these."""
    if math.isnan(r.new_runs[0]):
        return ""
    low, high = (end_text(end, protocol.margin) for end in r.new_runs)
    text = f"over new training runs {low} to {high}"
    limited = r.verdict.word != "undecided" and (r.verdict.scope or r.verdict.detail_scope)
    if limited and r.mean.n_seeds >= SEEDS_TO_GENERALIZE:
        ends = (r.mean.estimate - r.over_runs, r.mean.estimate + r.over_runs)
        low, high = (end_text(end, protocol.margin) for end in ends)
        text += f" for this comparison alone, {low} to {high} at the level of its family"
    return text


def _too_few(r: FamilyComparison, protocol: Protocol) -> str:
    least = smallest_sample(protocol.alpha)
    if r.mean.n >= least:  # Holm only: there is a p, and none could be small enough
        return (
            f"not testable with Holm's correction: no data of {r.mean.n} patients can reach "
            f"{protocol.alpha:g} in this family"
        )
    return f"not testable, too few patients: {r.mean.n}, at least {least} are needed"


def _not_testable(c: Comparison, r: FamilyComparison, protocol: Protocol) -> str:
    ahead, n, low, high = r.ahead
    text = _too_few(r, protocol)
    if not ahead or r.mean.estimate == 0:  # then nobody is ahead in the mean
        return text
    first = c.a if r.mean.estimate > 0 else c.b
    return f"{text}; {first} is ahead in {ahead} of {n}, by {low:.3f} to {high:.3f}"
