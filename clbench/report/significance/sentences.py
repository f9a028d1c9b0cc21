"""Verdicts: each comparison, and each strategy's forgetting, as one sentence."""

from __future__ import annotations

import math

from clbench.report.significance.confirmatory import Comparison
from clbench.report.significance.forgetting import Own
from clbench.report.study import Protocol

NO_NUMBER = "no number"
_WHEN = {
    "final": "after the last step (mean Dice of all structures)",
    "kept": "in what is kept (change in Dice of the old structures)",
    "new": "in what is learned (mean Dice of the new structures, each right after its own step)",
}


def p_text(p: float, *, sign: bool = True) -> str:
    """`= 0.012`, `< 0.0001`; without the equals sign for cells."""
    if math.isnan(p):
        return ""
    if p < 1e-4:
        return "< 0.0001"
    text = f"{p:.2g}" if p < 0.1 else f"{p:.3f}"
    return f"= {text}" if sign else text


def sentence(c: Comparison, protocol: Protocol) -> str:
    """One comparison in words; Dice differences with three decimals."""
    when = _WHEN[c.endpoint.name]
    if c.hole or c.verdict is None or c.interval is None or c.test is None:
        return f"{c.a} against {c.b} {when}: {NO_NUMBER} ({c.hole})."
    scope = f", {c.verdict.scope}" if c.verdict.scope else ""
    word, margin = c.verdict.word, f"{protocol.margin:g}"
    if word == "not testable":
        claim = f"Whether {c.a} and {c.b} differ {when} is not testable at this n"
    elif word in ("better", "worse"):
        small = " by less than the equivalence margin" if c.p_equivalent <= protocol.alpha else ""
        claim = f"{c.a} is {word} than {c.b}{small} {when}{scope}"
    elif word == "equivalent":
        claim = f"{c.a} and {c.b} are equivalent within {margin} Dice {when}{scope}"
    else:
        claim = (
            f"{c.a} against {c.b} {when} is inconclusive{scope}: neither a difference nor "
            f"equivalence within {margin} Dice was shown"
        )
    return f"{claim}: {_numbers(c, protocol)}"


def _numbers(c: Comparison, protocol: Protocol) -> str:
    assert c.interval is not None  # noqa: S101  # for the type checker: `sentence` asked
    assert c.test is not None  # noqa: S101
    low, high = c.interval.low, c.interval.high
    interval = (
        "no interval at this n"
        if math.isnan(low)
        else f"{protocol.level:.0%} interval {low:+.3f} to {high:+.3f}".replace("%", " %")
    )
    n = " and ".join(f"{k} {name}" for name, k in (c.patients or {}).items())
    parts = [
        f"{c.mean_a:.3f} and {c.mean_b:.3f}, difference {c.interval.estimate:+.3f} ({interval})",
        f"adjusted p {p_text(c.p_holm)} (m = {c.m})",
        f"{n} patients",
        f"{len(c.seeds)} seed{'s' if len(c.seeds) > 1 else ''}",
    ]
    if c.verdict is not None and c.verdict.word == "equivalent":
        parts.insert(1, f"equivalence p {p_text(c.p_equivalent)}")
    if c.verdict is not None and c.verdict.word == "not testable":
        parts.insert(1, f"smallest attainable p {p_text(c.test.smallest_p)}")
    if c.verdict is not None and c.verdict.word == "inconclusive" and not math.isnan(c.detectable):
        parts.append(f"differences from about {c.detectable:.3f} on would be found with power 0.8")
    return ", ".join(parts) + "."


def own_sentence(o: Own, protocol: Protocol) -> str:
    """One strategy's forgetting in words."""
    if o.interval is None:
        return f"{o.method}, kept: {NO_NUMBER} ({o.hole})."
    margin = f"{protocol.margin:g}"
    scope = f"{o.scope}, " if o.scope else ""
    claim = {
        "forgets": "forgets",
        "forgets, less than the margin": f"forgets, but less than {margin} Dice",
        "gains": "gains on its old structures",
        "keeps": f"keeps its old structures: a loss of {margin} Dice or more is ruled out",
        "inconclusive": f"may or may not forget: neither a change nor a loss below {margin} Dice "
        "was shown",
        "not testable": "cannot be tested for forgetting at this n",
    }[o.word]
    low, high = o.interval.low, o.interval.high
    interval = "no interval" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
    return (
        f"{_capital(scope)}{o.method} {claim} (change {o.interval.estimate:+.3f}, {interval}; "
        f"adjusted p {p_text(o.p_changed_holm)} for a change, adjusted p "
        f"{p_text(o.p_not_worse_holm)} against a loss of {margin} Dice or more, m = {o.m}, "
        f"{len(o.seeds)} seed{'s' if len(o.seeds) > 1 else ''})."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
