"""Overlap of masks: exact Dice, the paper's Dice, volume error; all structures in one pass.

Empty masks are named cases, never silent zeros or ones: every value
travels with a status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clbench.types import Bits, Rows

Pairs = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]
"""Patterns of a prediction, patterns of the truth, and in how many voxels each two meet."""
Status = Literal["ok", "both_empty", "fp_only", "fn_only"]

VERSION = 1
"""Raised by any change that moves a number."""
IMPLEMENTATION = "clbench.metrics.overlap: exact voxel counts"
"""Goes into the record of every run scored with it."""
_SLAB_VOX = 1 << 24  # voxels compared at a time; bounds the memory of the comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Voxel counts of one structure in one case."""

    both_vox: int
    """Voxels in prediction and truth (true positives)."""
    pred_vox: int
    """Voxels in the prediction."""
    gt_vox: int
    """Voxels in the truth."""

    @property
    def status(self) -> Status:
        """Which of the four cases this is.

        `both_empty`: neither holds a voxel. `fp_only`: the truth is empty, the prediction is not.
        `fn_only`: the prediction is empty, the truth is not (a missed structure). `ok`: both hold
        voxels.
        """
        if self.gt_vox == 0:
            return "both_empty" if self.pred_vox == 0 else "fp_only"
        return "fn_only" if self.pred_vox == 0 else "ok"


def dice(counts: Counts) -> float:
    """Exact Dice: 2 |P ∩ G| / (|P| + |G|), in [0, 1].

    Empty masks: nan where the truth is empty (`both_empty`, `fp_only`), because no overlap is
    defined there; 0 where only the prediction is empty (`fn_only`), so that a forgotten structure
    counts.

    Example:
        >>> from clbench.evaluation.metrics.overlap import Counts, dice
        >>> dice(Counts(both_vox=2, pred_vox=4, gt_vox=4))
        0.5
        >>> dice(Counts(both_vox=0, pred_vox=0, gt_vox=4))  # missed
        0.0
        >>> dice(Counts(both_vox=0, pred_vox=4, gt_vox=0))  # nothing to overlap with
        nan

    Source: Dice 1945; empty masks as Metrics Reloaded (Maier-Hein & Reinke 2024) advises: report
        them apart.
    Differs: MONAI gives 1 for `both_empty` and 0 for `fp_only` with `ignore_empty=False`, nan for
        both with `ignore_empty=True`, which is ours.
    """
    if counts.gt_vox == 0:
        return float("nan")
    return 2 * counts.both_vox / (counts.pred_vox + counts.gt_vox)


def dice_paper(counts: Counts) -> float:
    """Dice as the authors compute it: 2 |P ∩ G| / (|P| + |G| + 1); nan where the truth is empty.

    A perfect match of n voxels scores 2n / (2n + 1), so small structures stay below 1.

    Example:
        >>> from clbench.evaluation.metrics.overlap import Counts, dice_paper
        >>> dice_paper(Counts(both_vox=2, pred_vox=3, gt_vox=4))  # 2 · 2 / (3 + 4 + 1)
        0.5

    Source: paper, section 5.1 (DSC), as the authors' public test code computes it; cases whose
        truth is empty are skipped there, which is nan here.
    Differs: not at all from the code; from `dice` by the 1 in the denominator.
    """
    if counts.gt_vox == 0:
        return float("nan")
    return 2 * counts.both_vox / (counts.pred_vox + counts.gt_vox + 1)


def volume_error_ml(counts: Counts, voxel_mm3: float) -> float:
    """Signed volume error in ml: predicted minus true volume; nan where the truth is empty.

    Below 0 is too small; a missed structure (`fn_only`) is off by its whole volume. False alarms
    on an empty truth are told by status and `pred_vox`, so that every strategy averages over the
    same cases.

    Example:
        >>> from clbench.evaluation.metrics.overlap import Counts, volume_error_ml
        >>> volume_error_ml(Counts(both_vox=2, pred_vox=500, gt_vox=1500), voxel_mm3=2.0)
        -2.0

    Source: absolute volume difference of Metrics Reloaded (Maier-Hein & Reinke 2024).
    Differs: keeps the sign and is not divided by the true volume, which is tiny for lesions.
    """
    if counts.gt_vox == 0:
        return float("nan")
    return (counts.pred_vox - counts.gt_vox) * voxel_mm3 / 1000


def pattern_pairs(pred: Bits, truth: Bits) -> Pairs:
    """How often each pair (pattern in `pred`, pattern in `truth`) occurs.

    Reads both arrays once. Neighbors mostly agree, so runs of equal pairs are counted, not voxels.

    Args:
        pred: bit patterns, any shape.
        truth: bit patterns, same shape.

    Returns:
        Three arrays of one length: patterns of `pred`, patterns of `truth`, number of voxels.
        Every pair of patterns stands once.

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.overlap import pattern_pairs
        >>> pred, truth = np.array([0, 1, 1, 3], np.uint8), np.array([0, 1, 0, 3], np.uint8)
        >>> [array.tolist() for array in pattern_pairs(pred, truth)]
        [[0, 1, 1, 3], [0, 0, 1, 3], [1, 1, 1, 1]]
    """
    if pred.shape != truth.shape:
        raise ValueError(f"shapes differ: {pred.shape} and {truth.shape}")
    pred, truth = np.atleast_1d(pred), np.atleast_1d(truth)
    return row_pairs(lambda first, stop: pred[first:stop], truth)


def row_pairs(rows: Rows, truth: Bits) -> Pairs:
    """`pattern_pairs` of a prediction that is read some rows at a time.

    Args:
        rows: rows of the prediction, from the first index to before the second.
        truth: bit patterns, of the shape of all rows together.

    Returns:
        As `pattern_pairs`.

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.overlap import row_pairs
        >>> pred, truth = np.array([0, 1, 1, 3], np.uint8), np.array([0, 1, 0, 3], np.uint8)
        >>> pairs = row_pairs(lambda first, stop: pred[first:stop], truth)
        >>> [array.tolist() for array in pairs]
        [[0, 1, 1, 3], [0, 0, 1, 3], [1, 1, 1, 1]]
    """
    step = max(1, _SLAB_VOX // max(1, truth[:1].size))
    return _merged(
        _runs(rows(low, min(low + step, len(truth))), truth[low : low + step])
        for low in range(0, len(truth), step)
    )


def _merged(parts: Iterable[tuple[Bits, Bits, NDArray[np.int64]]]) -> Pairs:
    """One table of pairs of patterns out of several, sorted by the patterns."""
    total: dict[tuple[int, int], int] = {}
    for p, t, n in parts:
        p_values, p_index = np.unique(p, return_inverse=True)
        t_values, t_index = np.unique(t, return_inverse=True)
        code = p_index * len(t_values) + t_index  # fits: both factors are below the run count
        codes, place = np.unique(code, return_inverse=True)
        # add.at on int64, not bincount's float weights: counts stay exact
        voxels = np.zeros(len(codes), dtype=np.int64)
        np.add.at(voxels, place, n)
        for c, v in zip(codes.tolist(), voxels.tolist(), strict=True):
            key = (int(p_values[c // len(t_values)]), int(t_values[c % len(t_values)]))
            total[key] = total.get(key, 0) + v
    keys = sorted(total)
    return (
        np.array([k[0] for k in keys], dtype=np.uint64),
        np.array([k[1] for k in keys], dtype=np.uint64),
        np.array([total[k] for k in keys], dtype=np.int64),
    )


def _runs(pred: Bits, truth: Bits) -> tuple[Bits, Bits, NDArray[np.int64]]:
    """Run-length encoding of the pairs, in C order: patterns, patterns, lengths."""
    p, t = np.ravel(pred), np.ravel(truth)
    if p.size == 0:
        return p, t, np.zeros(0, dtype=np.int64)
    change = p[1:] != p[:-1]
    change |= t[1:] != t[:-1]
    first = np.concatenate(([0], np.flatnonzero(change) + 1))
    length = np.diff(first, append=p.size)
    return p[first], t[first], length


def counts_of(
    pairs: Pairs,
    places: Mapping[str, tuple[int, int]],
) -> dict[str, Counts]:
    """Structure → its voxel counts.

    Args:
        pairs: what `pattern_pairs` returns.
        places: structure → (bit in the prediction, bit in the truth).

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.overlap import counts_of, pattern_pairs
        >>> pred, truth = np.array([0, 1, 1, 3], np.uint8), np.array([0, 1, 0, 3], np.uint8)
        >>> counts_of(pattern_pairs(pred, truth), {"liver": (0, 0)})
        {'liver': Counts(both_vox=2, pred_vox=3, gt_vox=2)}
    """
    p, t, n = pairs
    one = np.uint64(1)
    counts = {}
    for name, (p_bit, t_bit) in places.items():
        in_pred = (p >> np.uint64(p_bit) & one).astype(bool)
        in_truth = (t >> np.uint64(t_bit) & one).astype(bool)
        counts[name] = Counts(
            both_vox=int(n[in_pred & in_truth].sum()),
            pred_vox=int(n[in_pred].sum()),
            gt_vox=int(n[in_truth].sum()),
        )
    return counts
