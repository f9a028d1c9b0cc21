"""Reads a report's sentence back and holds it against its row: numbers, claim and scope.

It knows nothing of how a sentence is made: it takes the numbers out of the text again, compares
them with the row written to `confirmatory.csv` or `forgetting.csv`, and asks whether the claim
follows from those numbers alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from clbench.errors import ClbenchError
from clbench.report.significance.sentences import NO_NUMBER
from clbench.report.study import Protocol
from clbench.statistics.corrections import SEEDS_TO_GENERALIZE

_NUMBERS = re.compile(
    r"difference (?P<estimate>[+-]\d\.\d+) \((?:no interval at this n|\d+ % interval "
    r"(?P<low>[+-]\d\.\d+) to (?P<high>[+-]\d\.\d+))\).*adjusted p (?P<p>[=<] [\d.e-]+) "
    r"\(m = (?P<m>\d+)\), (?P<patients>.+?) patients, (?P<seeds>\d+) seeds?"
)


def _wrong_in(text: str) -> Callable[[str, object, object], ClbenchError]:
    def wrong(what: str, expected: object, got: object) -> ClbenchError:
        return ClbenchError(
            f"a sentence of the report contradicts its numbers: {what}",
            where=text,
            expected=expected,
            got=got,
            next_step="report this as a bug of clbench, with the run folders",
        )

    return wrong


def audit(text: str, row: Mapping[str, str], protocol: Protocol) -> None:
    """Read a sentence back and hold it against its row of `confirmatory.csv`.

    Args:
        text: the sentence.
        row: the row, as text.
        protocol: level and margin.

    Raises:
        ClbenchError: a number differs from the row, or the claim does not follow from it.
    """
    wrong = _wrong_in(text)
    if row["a"] not in text or row["b"] not in text:
        raise wrong("other strategies", f"{row['a']} and {row['b']}", text)
    if row["hole"]:
        if NO_NUMBER not in text or _NUMBERS.search(text):
            raise wrong("a number where there is a hole", NO_NUMBER, text)
        return
    found = _NUMBERS.search(text)
    if found is None:
        raise wrong("its numbers are missing", "difference, interval, p, m, n, seeds", text)
    for name, column in (("estimate", "difference"), ("low", "low"), ("high", "high")):
        value = float(row[column])
        if (found[name] is None) != math.isnan(value) or (
            found[name] is not None and abs(float(found[name]) - value) > 0.000501
        ):
            raise wrong(name, row[column], found[name])
    p, m = float(row["p_holm"]), int(row["m"])
    if not _same_p(found["p"], p):
        raise wrong("p", p, found["p"])
    patients = sum(int(x.split(" ", 1)[0]) for x in found["patients"].split(" and "))
    if (int(found["m"]), int(found["seeds"]), patients) != (
        m,
        len(row["seeds"].split()),
        int(row["n"]),
    ):
        raise wrong("m, seeds or patients", (m, row["seeds"], row["n"]), found[0])
    expected = _follows(row, protocol)
    claimed = _claimed(text)
    if claimed != expected:
        raise wrong("the claim", expected, claimed)
    limited = "for these training runs" in text
    if expected in ("better", "worse", "equivalent", "inconclusive") and not limited:
        sides = (float(row["seed_low"] or "nan"), float(row["seed_high"] or "nan"))
        if len(row["seeds"].split()) < 5 or not (sides[0] > 0 or sides[1] < 0):
            raise wrong("the scope", "for these training runs", "no limit")


def _same_p(text: str, p: float) -> bool:
    sign, number = text.split()
    if sign == "<":
        return p < float(number)
    return abs(float(number) - p) <= max(0.000501, 0.0501 * p)


def _follows(row: Mapping[str, str], protocol: Protocol) -> str:
    """What the numbers of a row allow to say."""
    if float(row["smallest_p"]) * int(row["m"]) > protocol.alpha:
        return "not testable"
    if float(row["p_holm"]) <= protocol.alpha:
        return "better" if float(row["difference"]) > 0 else "worse"
    return "equivalent" if float(row["p_equivalent"]) <= protocol.alpha else "inconclusive"


def _claimed(text: str) -> str:
    head = text.split(": ")[0]
    words = [
        word
        for word, mark in (
            ("not testable", "is not testable at this n"),
            ("better", " is better than "),
            ("worse", " is worse than "),
            ("equivalent", " are equivalent within "),
            ("inconclusive", " is inconclusive"),
        )
        if mark in head
    ]
    return words[0] if len(words) == 1 else f"{len(words)} claims"


_OWN_NUMBERS = re.compile(
    r"\(change (?P<change>[+-]\d\.\d+), (?:no interval|(?P<low>[+-]\d\.\d+) to "
    r"(?P<high>[+-]\d\.\d+)); adjusted p (?P<p>[=<] [\d.e-]+) for a change, adjusted p "
    r"(?P<q>[=<] [\d.e-]+) against a loss of (?P<margin>[\d.]+) Dice or more, m = (?P<m>\d+), "
    r"(?P<seeds>\d+) seeds?\)"
)
_OWN_CLAIMS = {
    "forgets, less than the margin": " forgets, but less than ",
    "forgets": " forgets (",
    "gains": " gains on its old structures (",
    "keeps": " keeps its old structures: ",
    "inconclusive": " may or may not forget: ",
    "not testable": " cannot be tested for forgetting at this n (",
}


def audit_own(text: str, row: Mapping[str, str], protocol: Protocol) -> None:
    """Read a sentence about one strategy's forgetting back; its row is of `forgetting.csv`.

    Args:
        text: the sentence.
        row: the row, as text.
        protocol: level and margin.

    Raises:
        ClbenchError: a number differs from the row, or the claim does not follow from it.
    """
    wrong = _wrong_in(text)
    if row["method"] not in text:
        raise wrong("another strategy", row["method"], text)
    found = _OWN_NUMBERS.search(text)
    if row["hole"]:
        if NO_NUMBER not in text or found:
            raise wrong("a number where there is a hole", NO_NUMBER, text)
        return
    if found is None:
        raise wrong("its numbers are missing", "change, interval, p, m, seeds", text)
    for name in ("change", "low", "high"):
        value = float(row[name])
        if (found[name] is None) != math.isnan(value) or (
            found[name] is not None and abs(float(found[name]) - value) > 0.000501
        ):
            raise wrong(name, row[name], found[name])
    for name, column in (("p", "p_changed_holm"), ("q", "p_not_worse_holm")):
        if not _same_p(found[name], float(row[column])):
            raise wrong(column, row[column], found[name])
    seeds = len(row["seeds"].split())
    if (int(found["m"]), int(found["seeds"])) != (int(row["m"]), seeds):
        raise wrong("m or seeds", (row["m"], row["seeds"]), found[0])
    if found["margin"] != f"{protocol.margin:g}":
        raise wrong("the margin", protocol.margin, found["margin"])
    expected = _own_follows(row, protocol)
    claimed = [word for word, mark in _OWN_CLAIMS.items() if mark in text]
    if claimed != [expected]:
        raise wrong("the claim", expected, claimed)
    low, high = float(row["low"]), float(row["high"])
    agrees = {"forgets": high < 0, "gains": low > 0, "keeps": low > -protocol.margin}
    settled = seeds >= SEEDS_TO_GENERALIZE and agrees.get(expected, False)
    if expected != "not testable" and not settled and "or these training runs, " not in text:
        raise wrong("the scope", "for these training runs", "no limit")


def _own_follows(row: Mapping[str, str], protocol: Protocol) -> str:
    """What the numbers of a row of `forgetting.csv` allow to say."""
    p, q, change = (float(row[k]) for k in ("p_changed_holm", "p_not_worse_holm", "change"))
    if math.isnan(p) or float(row["smallest_p"]) * int(row["m"]) > protocol.alpha:
        return "not testable"
    small = q <= protocol.alpha
    if p <= protocol.alpha and change < 0:
        return "forgets, less than the margin" if small else "forgets"
    if p <= protocol.alpha and change > 0:
        return "gains"
    return "keeps" if small else "inconclusive"
