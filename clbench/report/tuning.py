"""How settings of runs were chosen, by their records: by which rule, on what, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clbench.store.record import RunRecord

# What has to be equal for strategies to be tuned equally.
_EQUAL = {
    "rule": "rule",
    "budget": "budget",
    "unit": "unit of the budget",
    "bench": "course",
    "data_fingerprint": "data",
    "profile": "profile",
    "search": "search",
}


def tuned_card(record: RunRecord) -> str:
    """How the settings of one run were chosen, in a line."""
    if (t := record.tuned) is None:
        return "not known" if record.external else "not by `clbench tune`"
    label = t["rule"] if t["realistic"] else f"{t['rule']}, UNREALISTIC (the end of this course)"
    best = " ".join(t["settings"]) or "the defaults"
    data = "patients" if t["patients"] else "the phantom"
    return (
        f"rule {label}, on validation cases of steps 1 to {t['steps']} of {t['bench']} ({data}, "
        f"profile {t['profile']}): {best}; {t['trials']} trials of seed {t['seed']}, "
        f"{t['updates']:,} updates, {t['seconds'] / 60:.1f} minutes, budget {t['budget']:,g} "
        f"{t['unit']}"
    )


def tuned_equally(by_label: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """Whether all strategies were tuned by one rule, at one budget, without test data.

    Args:
        by_label: label of a strategy → its runs.

    Returns:
        An answer that begins with `yes` or `**no**`; None: no run was tuned.
    """
    records = {label: [r for r in of if not r.external] for label, of in by_label.items()}
    everything = [r for of in records.values() for r in of]
    tuned = [t for r in everything if (t := r.tuned) is not None]
    if not tuned:
        return None
    problems = []
    if untuned := [label for label, of in by_label.items() if any(r.tuned is None for r in of)]:
        problems.append(f"not tuned: {', '.join(untuned)}")
    problems += [
        f"different {what}: {', '.join(sorted(values))}"
        for name, what in _EQUAL.items()
        if len(values := {str(t[name]) for t in tuned}) > 1
    ]
    if unrealistic := [k for k, of in records.items() if any(_oracle(r.tuned) for r in of)]:
        problems.append(f"tuned on the end of this course, UNREALISTIC: {', '.join(unrealistic)}")
    tests = {case for r in everything for case in r.course.test_cases}
    seen = {case for t in tuned for cases in t["opened"].values() for case in cases}
    if both := sorted(tests & seen):
        problems.append(f"test cases seen in tuning: {', '.join(both)}")
    if problems:
        return f"**no**: {'; '.join(problems)}"
    t = tuned[0]
    return (
        f"yes: rule {t['rule']} on {t['bench']}, {t['budget']:,g} {t['unit']} each; no test case "
        "opened (records)"
    )


def _oracle(tuned: Mapping[str, Any] | None) -> bool:
    return tuned is not None and not tuned["realistic"]
