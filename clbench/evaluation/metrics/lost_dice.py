"""Where the lost Dice went: the new errors of an old structure, by what is predicted there instead.

One structure of one case, predicted once after the step that taught it (`a`) and once after a later
step (`b`). T is the truth, P the prediction, E = P △ T the wrong voxels. A voxel that is right at a
and wrong at b is a new error; one that is wrong at a and right at b is a mended one:

    |E_b| − |E_a| = new errors − mended errors.

K = P_b ∩ T is what is left of the structure, τ the width of the border, d the distance between
voxel centers in mm. `others` are the structures that count as different ones: not the structure
itself and none that contains it (of a tumor in the liver, liver is background).

| part | voxels |
|---|---|
| `missed_whole` | new, in T, no other predicted there at b; K is empty |
| `absorbed` | new, in T, no other predicted there at b; neither of the parts above and below |
| `eroded` | new, in T, at most τ from the nearest voxel outside T and at most τ from K |
| `confused` | new, in T, not eroded; another structure is predicted there at b |
| `regained` | mended, in T; counted below 0 |
| `grown` | new, outside T, at most τ from K |
| `claimed` | new, outside T, not grown; another structure is there in truth |
| `false_alarm` | new, outside T, not grown; no other structure is there in truth |
| `removed` | mended, outside T; counted below 0 |

The first four and `grown`, `claimed`, `false_alarm` divide the new errors: each voxel is in one
part, and all parts add up to |E_b| − |E_a| exactly. Erosion is a thin layer: a voxel near the
border of a structure of which nothing near is left was not eroded, so a thin vessel that is lost
for half its length counts as absorbed. `other` says, for eroded, confused and grown, claimed
voxels, which structure; of several the innermost, then the one learned last.

Dice = 2 (T − m) / (2 T − m + f), with m missed and f false voxels, is no sum over voxels. Its loss
is divided by the Shapley value of the two players m and f (the mean over the two orders in which
they may change), which has a closed form per voxel (`dice_per_voxel`), so the parts add up to
Dice_a − Dice_b up to rounding, also where m or f does not change in number.

Source: Shapley 1953 for the division; τ as in surface Dice, but never below one voxel of the
model's grid with its corners, since no prediction moves by less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clbench.spec.taxonomy import ancestors, structure
from clbench.types import Bits, mask_of

MISSED = ("missed_whole", "absorbed", "eroded", "confused", "regained")
"""Parts of the change in missed voxels."""
FALSE = ("grown", "claimed", "false_alarm", "removed")
"""Parts of the change in false voxels."""
PARTS = (*MISSED, *FALSE)
"""Every part."""
MENDED = ("regained", "removed")
"""Parts that are counted below 0."""
BACKGROUND = "background"
"""`other` where there is no other structure."""
CAUSES: Mapping[str, tuple[str, ...]] = {
    "missed whole": ("missed_whole",),
    "background": ("absorbed",),
    "border": ("eroded", "grown"),
    "confused": ("confused", "claimed"),
    "false alarm": ("false_alarm",),
    "mended": MENDED,
}
"""What a reader is told → its parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCounts:
    """Voxels of one structure in one case that are wrong."""

    missed_vox: int
    """In the truth and not predicted."""
    false_vox: int
    """Predicted and not in the truth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """Where the change between two predictions of one structure in one case lies."""

    truth_vox: int
    """Voxels of the truth."""
    before: ErrorCounts
    """After the step that taught the structure."""
    after: ErrorCounts
    """After the later step."""
    voxels: Mapping[tuple[str, str], int]
    """(part, other) → voxels; mended errors below 0; nothing that is 0."""

    @property
    def dice(self) -> tuple[float, float]:
        """Dice before and after; nan where the truth is empty."""
        return _dice(self.truth_vox, self.before), _dice(self.truth_vox, self.after)

    def lost_dice(self) -> dict[tuple[str, str], float]:
        """(part, other) → its share of Dice before − after; below 0: a gain."""
        missed, false = dice_per_voxel(self.truth_vox, self.before, self.after)
        return {k: n * (missed if k[0] in MISSED else false) for k, n in self.voxels.items()}


def _dice(truth_vox: int, errors: ErrorCounts) -> float:
    if truth_vox == 0:
        return math.nan
    both = truth_vox - errors.missed_vox
    return 2 * both / (truth_vox + both + errors.false_vox)


def dice_per_voxel(truth_vox: int, before: ErrorCounts, after: ErrorCounts) -> tuple[float, float]:
    """What one more missed voxel and one more false voxel cost in Dice, between two predictions.

    With S(m, f) = 2 T − m + f the two costs are the means over both orders:

        missed: ½ Σ over f in (f_a, f_b) of 2 (T + f) / (S(m_a, f) S(m_b, f))
        false:  ½ Σ over m in (m_a, m_b) of 2 (T − m) / (S(m, f_a) S(m, f_b))

    and Dice_a − Dice_b = missed · (m_b − m_a) + false · (f_b − f_a).

    Args:
        truth_vox: voxels of the truth, above 0.
        before: wrong voxels of the earlier prediction.
        after: wrong voxels of the later one.

    Example:
        >>> from clbench.evaluation.metrics.lost_dice import ErrorCounts, dice_per_voxel
        >>> right = ErrorCounts(missed_vox=0, false_vox=0)
        >>> half = ErrorCounts(missed_vox=4, false_vox=0)
        >>> missed, _ = dice_per_voxel(8, right, half)
        >>> round(4 * missed, 4)  # 1 − 2 · 4 / (8 + 4)
        0.3333
    """
    m, f = (before.missed_vox, after.missed_vox), (before.false_vox, after.false_vox)

    def size(missed: int, false: int) -> int:
        return 2 * truth_vox - missed + false

    return (
        sum((truth_vox + x) / (size(m[0], x) * size(m[1], x)) for x in f),
        sum((truth_vox - x) / (size(x, f[0]) * size(x, f[1])) for x in m),
    )


def border_mm(name: str, model_mm: Sequence[float]) -> float:
    """τ of a structure: its tolerance in surface Dice, or one voxel's diagonal if that is more.

    Args:
        name: canonical name.
        model_mm: voxel size of the grid on which the model predicts.

    Example:
        >>> from clbench.evaluation.metrics.lost_dice import border_mm
        >>> [round(border_mm("spleen", (mm, mm, mm)), 2) for mm in (1.0, 1.5)]
        [2.0, 2.6]
    """
    from clbench.evaluation.metrics.surface import SLACK_MM  # brings scipy, too

    return max(structure(name).tolerance_mm, math.hypot(*model_mm)) + SLACK_MM


def attribute(
    name: str,
    before: tuple[Bits, Sequence[str]],
    after: tuple[Bits, Sequence[str]],
    truth: tuple[Bits, Sequence[str]],
    *,
    spacing_mm: Sequence[float],
    border: float,
) -> Attribution:
    """Divide the change between two predictions of a structure as the module says.

    Args:
        name: the structure.
        before: (D, H, W) bit patterns after the step that taught it, and the names of their bits.
        after: the same after the later step.
        truth: the same of the truth; names the case does not annotate are "".
        spacing_mm: voxel size of this grid.
        border: τ in mm, see `border_mm`.

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.lost_dice import attribute
        >>> truth = np.zeros((8, 8, 8), dtype=np.uint8)
        >>> truth[2:6, 2:6, 2:6] = 1  # spleen
        >>> later = truth.copy()
        >>> later[2:4, 2:6, 2:6] = 2  # half of it is called liver
        >>> names = ("spleen", "liver")
        >>> found = attribute(
        ...     "spleen", (truth, names), (later, names), (truth, names),
        ...     spacing_mm=(1.0, 1.0, 1.0), border=1.0,
        ... )
        >>> found.voxels  # of the layer next to what is left, 12 voxels lie at the border
        {('eroded', 'liver'): 12, ('confused', 'liver'): 20}
    """
    then, now, real = (mask_of(bits, names.index(name)) for bits, names in (before, after, truth))
    right = real & now
    near = _within(~right, spacing_mm, border) if right.any() else np.zeros_like(right)
    rim = near & (_within(real, spacing_mm, border) | ~real)
    excluded = {name, *ancestors(name)}
    lost, false = real & then & ~now, ~real & ~then & now
    voxels: dict[tuple[str, str], int] = {}

    def count(
        where: NDArray[np.bool_], by: tuple[Bits, Sequence[str]], parts: Sequence[str]
    ) -> None:
        at_border, to_other, to_none = parts
        others = _innermost(by, where, excluded, truth if by is after else None, name)
        edge = rim[where]
        for other, chosen in others.items():
            plain = to_none if other == BACKGROUND else to_other
            for part, vox in ((at_border, chosen & edge), (plain, chosen & ~edge)):
                if n := int(np.count_nonzero(vox)):
                    voxels[part, other] = n

    count(lost, after, ("eroded", "confused", "absorbed" if right.any() else "missed_whole"))
    count(false, truth, ("grown", "claimed", "false_alarm"))
    for part, mended in (("regained", real & ~then & now), ("removed", ~real & then & ~now)):
        if n := int(np.count_nonzero(mended)):
            voxels[part, ""] = -n
    return Attribution(
        truth_vox=int(np.count_nonzero(real)),
        before=_errors(then, real),
        after=_errors(now, real),
        voxels=voxels,
    )


def _errors(predicted: NDArray[np.bool_], real: NDArray[np.bool_]) -> ErrorCounts:
    return ErrorCounts(
        missed_vox=int(np.count_nonzero(real & ~predicted)),
        false_vox=int(np.count_nonzero(predicted & ~real)),
    )


def _within(
    mask: NDArray[np.bool_], spacing_mm: Sequence[float], reach: float
) -> NDArray[np.bool_]:
    """Voxels of a mask at most `reach` mm from the nearest voxel outside; none if all are in it."""
    from scipy.ndimage import distance_transform_edt  # reports need the names of the parts alone

    if mask.all():
        return np.zeros_like(mask)
    near: NDArray[np.bool_] = mask & (distance_transform_edt(mask, sampling=spacing_mm) <= reach)
    return near


def _innermost(
    by: tuple[Bits, Sequence[str]],
    where: NDArray[np.bool_],
    excluded: set[str],
    truth: tuple[Bits, Sequence[str]] | None,
    name: str,
) -> dict[str, NDArray[np.bool_]]:
    """Other → which of the voxels `where` it has; `BACKGROUND` has the rest.

    A structure that is rightly predicted there beside the lost one took nothing from it, unless it
    lies inside it: liver that is called tumor is no liver any more.

    Args:
        by: bit patterns that say what is there, and the names of their bits.
        where: (D, H, W) the voxels asked for, n of them.
        excluded: names that are no others.
        truth: of a prediction, what is truly there.
        name: the structure.
    """
    bits, names = by
    left = np.ones(int(np.count_nonzero(where)), dtype=bool)
    innermost: dict[str, NDArray[np.bool_]] = {}
    patterns = bits[where]
    order = sorted(
        (len(ancestors(other)), k, other)
        for k, other in enumerate(names)
        if other and other not in excluded
    )
    for *_, other in reversed(order):
        here = left & mask_of(patterns, names.index(other))
        if truth is not None and other in truth[1] and name not in ancestors(other):
            here &= ~mask_of(truth[0][where], truth[1].index(other))
        if here.any():
            innermost[other] = here
            left &= ~here
    return {**innermost, BACKGROUND: left}
