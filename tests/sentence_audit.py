"""Reads a report's sentence back and holds it against its row: numbers, claim and scope.

It knows nothing of how a sentence is made: it takes the numbers out of the text again, compares
them with the row written to `confirmatory.csv` or `forgetting.csv`, and asks whether the claim
follows from those numbers alone, and whether 0 and the margins lie on the sides of the interval
that the p-values say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from clbench.errors import ClbenchError
from clbench.report.significance.sentences import NO_NUMBER
from clbench.report.study import Protocol

_END = r"(?:above |below )?[+-]?\d+(?:\.\d+)?"
_NUMBERS = re.compile(
    r"(?:difference|change) (?P<estimate>[+-]\d\.\d+) \((?:no interval|[\d.]+ % interval "
    rf"(?P<low>{_END}) to (?P<high>{_END}))\); adjusted p (?P<p>[=<] [\d.e-]+) of a "
    r"(?:difference|change), p (?P<q>[=<] [\d.e-]+) (?:of equivalence|against a loss of "
    r"(?P<margin>[\d.]+) Dice or more) \(m = (?P<m>\d+)\); (?P<patients>.+?) patients, "
    r"(?P<seeds>\d+) seeds?"
)
_BEYOND = re.compile(r"over new training runs (?P<low>[+-]\d\.\d+) to (?P<high>[+-]\d\.\d+)")
_FAMILY = re.compile(
    r"comparison alone, (?P<low>[+-]\d\.\d+) to (?P<high>[+-]\d\.\d+) at the level of its family"
)
_NEEDED = re.compile(r"(?:about (?P<n>\d+)|more than 1,000) patients \((?P<now>\d+) now\)")
_LIMITED = "or these training runs"
_LIMITED_DETAIL = ", and for these training runs by "


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
    _audit(text, row, protocol, own=False)


def audit_own(text: str, row: Mapping[str, str], protocol: Protocol) -> None:
    """Read a sentence about one strategy's forgetting back; its row is of `forgetting.csv`.

    Args:
        text: the sentence.
        row: the row, as text.
        protocol: level and margin.

    Raises:
        ClbenchError: a number differs from the row, or the claim does not follow from it.
    """
    if row["method"] not in text:
        raise _wrong_in(text)("another strategy", row["method"], text)
    _audit(text, row, protocol, own=True)


def _audit(text: str, row: Mapping[str, str], protocol: Protocol, *, own: bool) -> None:
    wrong, found = _wrong_in(text), _NUMBERS.search(text)
    if row["hole"]:
        if NO_NUMBER not in text or found:
            raise wrong("a number where there is a hole", NO_NUMBER, text)
        return
    if row["verdict"] == "shared":
        if "one checkpoint" not in text or found or float(row["difference"]) != 0:
            raise wrong("a comparison of one checkpoint", "one checkpoint", text)
        return
    expected = _follows(row, protocol, own=own)
    claimed = _claimed(text, protocol, own=own)
    if claimed != expected:
        raise wrong("the claim", expected, claimed)
    if expected == "not testable":
        if int(row["n"]) >= 1 - math.log2(protocol.alpha) and "Holm" not in text:
            raise wrong("patients enough for a test", row["n"], text)
        return
    if found is None:
        raise wrong("its numbers are missing", "estimate, interval, p, m, n, seeds", text)
    estimate = float(row["change" if own else "difference"])
    if abs(float(found["estimate"]) - estimate) > 0.000501:
        raise wrong("estimate", estimate, found["estimate"])
    for name in ("low", "high"):
        _compare_end(found[name], row, name, wrong)
    p_low, p_high = float(row["p_low"]), float(row["p_high"])
    second = p_low if own else max(p_low, p_high)
    for name, p in (("p", float(row["p"])), ("q", second)):
        if not _same_p(found[name], p, protocol.alpha):
            raise wrong(name, p, found[name])
    if own and found["margin"] != f"{protocol.margin:g}":
        raise wrong("the margin", protocol.margin, found["margin"])
    patients = sum(int(x.split(" ", 1)[0]) for x in found["patients"].split(" and "))
    counted = (int(row["m"]), len(row["seeds"].split()), int(row["n"]))
    if (int(found["m"]), int(found["seeds"]), patients) != counted:
        raise wrong("m, seeds or patients", counted, found[0])
    _audit_interval(row, estimate, protocol, wrong)
    _audit_scope(text, row, expected, protocol, wrong)
    _audit_needed(text, row, expected, own, wrong)


def _compare_end(
    text: str | None, row: Mapping[str, str], name: str, wrong: Callable[..., ClbenchError]
) -> None:
    """An end as printed: nan has no text, an open one says `above` or `below`."""
    value = float(row[name])
    if (text is None) != math.isnan(value):
        raise wrong(name, row[name], text)
    if text is None:
        return
    number = text.removeprefix("above ").removeprefix("below ")
    if (number != text) != (row[f"{name}_open"] == "True"):
        raise wrong(f"{name}: open or closed", row[f"{name}_open"], text)
    if abs(float(number) - value) > 0.000501:
        raise wrong(name, row[name], text)


def _same_p(text: str, p: float, alpha: float) -> bool:
    """The same number, on the same side of the level."""
    sign, number = text.split()
    if sign == "<":
        return p < float(number) <= alpha
    near = abs(float(number) - p) <= max(0.000501, 0.0501 * p)
    return near and (float(number) <= alpha) == (p <= alpha)


def _audit_interval(
    row: Mapping[str, str], estimate: float, protocol: Protocol, wrong: Callable[..., ClbenchError]
) -> None:
    """A mark lies outside the interval exactly where its p is small."""
    low, high = float(row["low"]), float(row["high"])
    if math.isnan(low):
        return
    for mark, p, above in (
        (0.0, row["p"], estimate > 0),
        (-protocol.margin, row["p_low"], True),
        (protocol.margin, row["p_high"], False),
    ):
        refuted = float(p) <= protocol.alpha and (mark != 0.0 or estimate != 0)
        if above:
            outside = low > mark or (low == mark and row["low_open"] == "True")
        else:
            outside = high < mark or (high == mark and row["high_open"] == "True")
        if outside != refuted:
            raise wrong(f"{mark:g} and the interval", f"p {p}", (low, high))


def _audit_scope(
    text: str,
    row: Mapping[str, str],
    claim: str,
    protocol: Protocol,
    wrong: Callable[..., ClbenchError],
) -> None:
    """Only three seeds and an interval over new runs on the claim's side lift the limit."""
    low, high = float(row["new_runs_low"]), float(row["new_runs_high"])
    printed = _BEYOND.search(text)
    if (printed is None) != math.isnan(low):
        raise wrong("the interval over new runs", (low, high), printed)
    if printed and max(abs(float(printed["low"]) - low), abs(float(printed["high"]) - high)) > 6e-4:
        raise wrong("the interval over new runs", (low, high), printed[0])
    low, high = float(row["scope_low"]), float(row["scope_high"])
    decides = _FAMILY.search(text)
    if decides and max(abs(float(decides["low"]) - low), abs(float(decides["high"]) - high)) > 6e-4:
        raise wrong("the interval over new runs that decides", (low, high), decides[0])
    word, margin = claim.split(",")[0], protocol.margin
    carries = {
        "better": low > 0, "gains": low > 0, "worse": high < 0, "forgets": high < 0,
        "equivalent": -margin < low and high < margin, "keeps": low > -margin,
    }.get(word, False)  # fmt: skip
    settled = len(row["seeds"].split()) >= 3 and carries
    if settled == (_LIMITED in text.replace(_LIMITED_DETAIL, "")):
        raise wrong("the scope", "no limit" if settled else "for these training runs", text)
    near, far = (low, high) if word == "better" else (-high, -low)
    detail = claim.split(", ")[1:]
    beyond = near > margin if detail == ["more"] else far < margin
    said = _LIMITED in text and word != "undecided" and len(row["seeds"].split()) >= 3
    if said != (decides is not None):
        raise wrong("the interval that limits the claim to these runs", (low, high), text)
    limited = settled and detail in (["more"], ["less"]) and not beyond
    if limited != (_LIMITED_DETAIL in text):
        raise wrong("the scope of its size", "a limit" if limited else "none", text)


def _audit_needed(
    text: str, row: Mapping[str, str], claim: str, own: bool, wrong: Callable[..., ClbenchError]
) -> None:
    """Undecided comes with the number of patients that would decide."""
    second = "needed_not_worse" if own else "needed_equivalence"
    known = [float(row[k]) for k in ("needed_difference", second) if row[k]]
    known = [n for n in known if not math.isnan(n)]
    printed = _NEEDED.search(text)
    if (printed is not None) != (claim.startswith("undecided") and bool(known)):
        raise wrong("how many patients would decide", known, text)
    if printed and (
        float(printed["n"] or "inf") != min(known) or int(printed["now"]) != int(row["n"])
    ):
        raise wrong("how many patients would decide", (min(known), row["n"]), printed[0])


def _follows(row: Mapping[str, str], protocol: Protocol, *, own: bool) -> str:
    """What the numbers of a row allow to say."""
    if row["verdict"] == "not testable":
        return "not testable"
    p, p_low, p_high = (float(row[k]) for k in ("p", "p_low", "p_high"))
    low, high = float(row["low"]), float(row["high"])
    estimate = float(row["change" if own else "difference"])
    alpha, margin = protocol.alpha, protocol.margin
    if p <= alpha and estimate > 0:
        if own:
            return "gains"
        return "better" + (", more" if low > margin + 1e-9 else ", less" if p_high <= alpha else "")
    if p <= alpha and estimate < 0:
        detail = ", more" if high < -margin - 1e-9 else ", less" if p_low <= alpha else ""
        return ("forgets" if own else "worse") + detail
    if own:
        return "keeps" if p_low <= alpha else "undecided"
    if max(p_low, p_high) <= alpha:
        return "equivalent"
    rest = ", not worse" if p_low <= alpha else ", not better" if p_high <= alpha else ""
    return "undecided" + rest


def _claimed(text: str, protocol: Protocol, *, own: bool) -> str:
    """The claim as it is worded, whatever the numbers."""
    margin = f"{protocol.margin:g} Dice"
    head = re.split(r": (?:[\d.]+ and [\d.]+;|change [+-])", text)[0]
    marks = (
        {
            "forgets": " forgets",
            "gains": " gains on its old structures",
            "keeps": f" keeps its old structures; a loss of {margin} or more is ruled out",
            "undecided": " is undecided; neither a change nor that it keeps",
            "not testable": "not testable",
        }
        if own
        else {
            "better": " is better than ",
            "worse": " is worse than ",
            "equivalent": " are equivalent ",
            "undecided": " is undecided",
            "not testable": "not testable",
        }
    )
    words = [word for word, mark in marks.items() if mark in head]
    if len(words) != 1:
        return f"{len(words)} claims"
    details = {
        "more": f" by more than {margin}", "less": f", by less than {margin}",
        "not worse": f", not worse by {margin}", "not better": f", not better by {margin}",
    }  # fmt: skip
    head = head.replace(_LIMITED_DETAIL, ", by ")
    said = [name for name, mark in details.items() if mark in head]
    return ", ".join([words[0], *said])
