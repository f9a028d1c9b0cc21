"""Past images: which images of earlier steps a run was taught from, and of which level.

The ledger of `run.json` is the source; `clbench.training.past_data` and the catalog enforce it
while a run goes on.
"""

from __future__ import annotations

from clbench.store.record import RunRecord

LISTED = 20
"""So many ids are written out."""


def past_opened(record: RunRecord) -> tuple[set[str], set[str]]:
    """(cases of other steps that training opened, training cases of all earlier steps)."""
    opened: set[str] = set()
    trains = [set(cases) for cases in record.course.train]
    for step, by_purpose in record.ledger.items():
        for purpose in ("train", "pseudo"):
            opened |= set(by_purpose.get(purpose, ())) - trains[int(step) - 1]
    return opened, set().union(*trains[:-1]) - trains[-1]


def past_card(record: RunRecord) -> str:
    """`none (enforced)`, `stored cases: n of m (…)` or `all n`.

    `images` is declared by strategies that may see all; how many of them they saw is counted.
    """
    if record.external:
        return "not known, the predictions were made elsewhere"
    opened, there = past_opened(record)
    if not opened:
        return "none (enforced)"
    if there and opened >= there and record.past in (None, "images"):
        return f"all {len(opened)}"
    ids = ", ".join(sorted(opened)[:LISTED]) + (", …" if len(opened) > LISTED else "")
    kind = "stored cases: " if record.past == "cases" else ""
    return f"{kind}{len(opened)} of {len(there)} ({ids})"
