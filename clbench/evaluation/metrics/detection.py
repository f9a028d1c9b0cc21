"""Tumor detection: sensitivity, PPV and F1 by lesion. Patients: `clbench.report.scores`.

Dice says how well a tumor is outlined; these say whether it was found,
and how many findings were none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from clbench.evaluation.metrics.continual import harmonic

VERSION = 1
"""Raised by any change that moves a number."""
CONNECTIVITY = 26
"""Voxels that share a corner belong to one lesion."""
MATCH = "any overlap (IoU > 0)"
"""A lesion of the truth is found, and a predicted one is true, when they share one voxel."""
IMPLEMENTATION = f"clbench.metrics.detection: {CONNECTIVITY}-connected lesions (cc3d), {MATCH}"
"""Goes into the record of every run scored with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesions:
    """Lesions of one structure in one case."""

    truth: int
    """Lesions in the truth."""
    found: int
    """Of these, touched by the prediction."""
    pred: int
    """Lesions in the prediction."""
    false: int
    """Of these, touching no truth."""
    largest_pred_vox: int
    """Size of the largest predicted lesion."""

    @property
    def sensitivity(self) -> float:
        """Found / in the truth; nan without any."""
        return self.found / self.truth if self.truth else math.nan

    @property
    def ppv(self) -> float:
        """Positive predictive value: true / predicted; nan without any prediction."""
        return (self.pred - self.false) / self.pred if self.pred else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of sensitivity and PPV; 0 where nothing was found; nan without truth."""
        if not self.truth:
            return math.nan
        return harmonic(self.sensitivity, self.ppv if self.pred else 0.0)


def lesions(pred: NDArray[Any], truth: NDArray[Any]) -> Lesions:
    """Count lesions in two masks of one shape.

    Args:
        pred: (D, H, W) bool.
        truth: (D, H, W) bool.

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.detection import lesions
        >>> truth = np.zeros((1, 1, 7), dtype=bool)
        >>> truth[..., 0:2] = truth[..., 5] = True  # two lesions
        >>> pred = np.zeros_like(truth)
        >>> pred[..., 1] = pred[..., 3] = True  # finds the first; another is false
        >>> count = lesions(pred, truth)
        >>> count
        Lesions(truth=2, found=1, pred=2, false=1, largest_pred_vox=1)
        >>> count.sensitivity, count.ppv, count.f1
        (0.5, 0.5, 0.5)

    Source: Metrics Reloaded (Maier-Hein & Reinke 2024), object detection from masks.
    Differs: 26-connected, where `scipy.ndimage.label` defaults to 6; any overlap matches, so that
        one prediction across two lesions finds both and no prediction is false twice. There is no
        lesion-level specificity: nothing counts the places where no lesion is; use false / cases.
    """
    p, n_pred = _label(pred)
    t, n_truth = _label(truth)
    both = np.asarray(pred, dtype=bool) & np.asarray(truth, dtype=bool)
    true, hit = np.unique(p[both]).size, np.unique(t[both]).size
    sizes = np.bincount(p.ravel())[1:]
    return Lesions(
        truth=n_truth,
        found=int(hit),
        pred=n_pred,
        false=n_pred - int(true),
        largest_pred_vox=int(sizes.max(initial=0)),
    )


def _label(mask: NDArray[Any]) -> tuple[NDArray[Any], int]:
    labels, count = cc3d.connected_components(
        np.ascontiguousarray(mask, dtype=bool), connectivity=CONNECTIVITY, return_N=True
    )
    return np.asarray(labels), int(count)
