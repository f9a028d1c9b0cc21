"""Every continual-learning measure of a run by name, each a number or n/a with the reason.

Room: row 1 (no torch). The formulas are in `clbench.metrics.transfer`; here they get names, in the
order of a table, and a measure that cannot be computed says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import clbench.metrics.transfer as transfer
from clbench.metrics.transfer import Cell, Matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A number, or none with the reason."""

    value: float
    """NaN where it does not exist."""
    reason: str = ""
    """Why there is no number; empty where there is one."""

    def __post_init__(self) -> None:
        """A number needs no reason, and its absence does."""
        if math.isnan(self.value) != bool(self.reason):
            raise ValueError(f"value {self.value} with reason {self.reason!r}")


NAMES: dict[str, str] = {
    "old": "old structures, after the last step",
    "new": "new structures of the last step",
    "all": "all structures, after the last step",
    "all_by_step": "the same, every step weighing the same",
    "bwt": "backward transfer (GEM: last row)",
    "bwt_all_pairs": "backward transfer (Díaz-Rodríguez: all pairs)",
    "forgetting": "forgetting (Chaudhry: best before the last step)",
    "forgetting_first_last": "forgetting (first minus last)",
    "forgetting_mammoth": "forgetting (mammoth: best of all steps)",
    "learning": "learning accuracy, from step 2 (plasticity)",
    "learning_all": "learning accuracy, all steps",
    "average_incremental": "average incremental",
    "harmonic": "harmonic mean of old and new",
    "forward": "forward transfer",
    "intransigence": "intransigence (joint minus own step), from step 2",
    "delta_joint": "all structures, minus joint",
    "relative_joint": "all structures, relative to joint",
}
"""Name → words for readers, in the order of a table."""

ONE_STEP = "one step: nothing comes before or after"


def continual(
    r: Matrix, learned_at: Mapping[str, int], last: int, *, joint: Matrix | None = None
) -> dict[str, Quantity]:
    """All measures of one run, class-macro.

    Args:
        r: R of the run (values of `transfer.cells`).
        learned_at: structure → 1-based step.
        last: number of steps.
        joint: R of the run of joint training with the same seed, if there is one.

    Returns:
        Name (see `NAMES`) → number or reason. A score that is missing makes every measure that
        needs it n/a, never a partial mean.

    Source: each function of `clbench.metrics.transfer` names its own.
    """
    old = [c for c, s in learned_at.items() if s < last]
    new = [c for c, s in learned_at.items() if s == last]
    later = [c for c, s in learned_at.items() if s > 1]
    end = [(last, c) for c in learned_at]
    own = [(s, c) for c, s in learned_at.items()]
    path = [(t, c) for c, s in learned_at.items() for t in range(s, last + 1)]

    def known(value: float, needs: Iterable[tuple[int, str]], *, steps: bool = True) -> Quantity:
        """A number, or the first score that lacks."""
        if steps and last == 1:
            return Quantity(value=math.nan, reason=ONE_STEP)
        absent = [key for key in needs if math.isnan(r.get(key, math.nan))]
        return _quantity(value, absent, "")

    def over(values: Mapping[str, float]) -> float:
        return transfer.mean(values.values())

    now = {c: r.get((last, c), math.nan) for c in learned_at}
    kept, learned = (transfer.mean(now[c] for c in names) for names in (old, new))
    walk = [k for k in path if k[1] in old]
    found = {
        "old": known(kept, [(last, c) for c in old]),
        "new": known(learned, [(last, c) for c in new], steps=False),
        "all": known(over(now), end, steps=False),
        "all_by_step": known(
            transfer.mean(
                transfer.accuracy(r, learned_at, last, t.__eq__)
                for t in sorted(set(learned_at.values()))
            ),
            end,
            steps=False,
        ),
        "bwt": known(
            over(transfer.backward_transfer(r, learned_at, last)),
            [k for k in (*own, *end) if k[1] in old],
        ),
        "bwt_all_pairs": known(transfer.backward_transfer_all_pairs(r, learned_at, last), walk),
        "forgetting": known(over(transfer.forgetting(r, learned_at, last)), walk),
        "forgetting_first_last": known(
            over(transfer.forgetting_first_last(r, learned_at, last)),
            [k for k in (*own, *end) if k[1] in old],
        ),
        "forgetting_mammoth": known(over(transfer.forgetting_mammoth(r, learned_at, last)), walk),
        "learning": known(
            transfer.learning_accuracy(r, learned_at), [k for k in own if k[1] in later]
        ),
        "learning_all": known(transfer.learning_accuracy(r, learned_at, first=1), own, steps=False),
        "average_incremental": known(
            transfer.average_incremental(r, learned_at, last), path, steps=False
        ),
        "harmonic": known(transfer.harmonic(kept, learned), end),
        "forward": Quantity(
            value=math.nan,
            reason="class-incremental: no output exists before a structure is taught",
        ),
    }
    if joint is None:
        none = Quantity(value=math.nan, reason="there is no run of joint training with this seed")
        return found | dict.fromkeys(("intransigence", "delta_joint", "relative_joint"), none)

    def beside(value: float, keys: Iterable[tuple[int, str]], *, steps: bool = False) -> Quantity:
        """The same, when the joint run must have the scores too."""
        keys = list(keys)
        mine = known(value if not math.isnan(value) else 0.0, keys, steps=steps)
        if mine.reason:
            return mine
        return _quantity(
            value, [k for k in keys if math.isnan(joint.get(k, math.nan))], "joint training: "
        )

    top = transfer.mean(joint.get(k, math.nan) for k in end)
    return found | {
        "intransigence": beside(
            over(transfer.intransigence(r, joint, learned_at)),
            [k for k in own if k[1] in later],
            steps=True,
        ),
        "delta_joint": beside(over(transfer.relative_to_joint(r, joint, learned_at, last)), end),
        "relative_joint": Quantity(value=math.nan, reason="joint training scores 0")
        if top == 0
        else beside(over(now) / top, end),
    }


def _quantity(value: float, absent: list[tuple[int, str]], whose: str) -> Quantity:
    if not absent:
        return Quantity(value=value)
    step, name = absent[0]
    more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
    return Quantity(value=math.nan, reason=f"{whose}{name} has no score after step {step}{more}")


def domain(cells: Mapping[tuple[str, str], Cell], sources: Iterable[str]) -> dict[str, Quantity]:
    """`domain_transfer` as named quantities, such as `liver on lits`.

    Args:
        cells: what `transfer.domain_transfer` found.
        sources: source of each step.
    """
    if not cells:
        single = len(set(sources)) == 1
        reason = (
            "all steps use one source"
            if single
            else "no structure is annotated both where it is taught and in a later source"
        )
        return {"domain": Quantity(value=math.nan, reason=reason)}
    return {
        f"{name} on {source}": Quantity(value=cell.value)
        if cell.cases
        else Quantity(value=math.nan, reason="no test case contains it")
        for (name, source), cell in sorted(cells.items())
    }
