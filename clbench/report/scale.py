"""Scale: how a Dice is written, as 0.817 or in percent as 81.7.

Room: row 5 (no torch). Only what is read changes; CSV keeps full precision, from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clbench.metrics import transfer
from clbench.report.render import EMPTY, number, signed


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A factor and its digits."""

    factor: float
    """What a number is multiplied with."""
    digits: int
    """Behind the point."""
    unit: str
    """What a title says: `Dice`, `Dice, %`."""

    def number(self, value: float) -> str:
        """A score; the dash where there is none."""
        return number(self.factor * value, self.digits)

    def signed(self, value: float) -> str:
        """A difference, always with its sign."""
        return signed(self.factor * value, self.digits)

    def over_seeds(self, values: Sequence[float]) -> str:
        """Mean ± sd over seeds; the mean alone for one seed."""
        sd = transfer.spread(values)
        text = self.number(transfer.mean(values))
        return text if math.isnan(sd) or text == EMPTY else f"{text} ± {self.number(sd)}"


SHARE = Scale(factor=1.0, digits=3, unit="Dice")
"""From 0 to 1, as the paper prints its tables."""
PERCENT = Scale(factor=100.0, digits=1, unit="Dice, %")
"""From 0 to 100, as the paper's text has it."""
