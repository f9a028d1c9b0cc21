"""Tumor detection: sensitivity, PPV and F1 by lesion; sensitivity and specificity by patient.

Dice says how well a tumor is outlined; these say whether it was found,
and how many findings were none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from clbench.evaluation.metrics.continual import harmonic
from clbench.statistics.intervals import Interval, wilson

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


def add(parts: Iterable[Lesions]) -> Lesions:
    """Lesions of several cases together: pooled sensitivity, PPV and F1.

    Example:
        >>> from clbench.evaluation.metrics.detection import Lesions, add
        >>> one = Lesions(truth=2, found=1, pred=2, false=1, largest_pred_vox=4)
        >>> two = Lesions(truth=2, found=2, pred=2, false=0, largest_pred_vox=9)
        >>> add([one, two])
        Lesions(truth=4, found=3, pred=4, false=1, largest_pred_vox=9)
        >>> add([one, two]).sensitivity
        0.75
    """
    have = list(parts)
    return Lesions(
        truth=sum(x.truth for x in have),
        found=sum(x.found for x in have),
        pred=sum(x.pred for x in have),
        false=sum(x.false for x in have),
        largest_pred_vox=max((x.largest_pred_vox for x in have), default=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientDetection:
    """Whether patients with and without a tumor were told apart."""

    sensitivity: Interval
    """k of n patients with a tumor were called positive; Wilson 95 % interval."""
    specificity: Interval
    """k of n patients without were called negative."""
    true_positive: int
    """Patients with a tumor, called positive."""
    true_negative: int
    """Patients without, called negative."""

    @property
    def harmonic(self) -> float:
        """2 Sen Spec / (Sen + Spec); 0 where both are 0; nan where one has no patients.

        Source: the paper, Table 6.
        """
        return harmonic(self.sensitivity.estimate, self.specificity.estimate)


def by_patient(
    calls: Iterable[tuple[str, bool, bool]],
) -> list[tuple[bool, bool]]:
    """One (tumor in the truth, called positive) per patient: true where any of the cases is.

    Args:
        calls: (patient, tumor in the truth, called positive) of each case.

    Example:
        >>> from clbench.evaluation.metrics.detection import by_patient
        >>> by_patient([("A", True, False), ("A", True, True), ("B", False, False)])
        [(True, True), (False, False)]
    """
    of_patient: dict[str, tuple[bool, bool]] = {}
    for patient, truth, called in calls:
        before = of_patient.get(patient, (False, False))
        of_patient[patient] = (before[0] or truth, before[1] or called)
    return list(of_patient.values())


def patient_level(called: Iterable[tuple[bool, bool]]) -> PatientDetection:
    """Sensitivity and specificity over patients, each patient once.

    A patient is called positive when a predicted lesion reaches a smallest size, wherever it lies;
    the size is part of the row's metric name (`patient_positive` any voxel,
    `patient_positive_50vox` a lesion of at least 50) and must be chosen on validation cases.

    Args:
        called: (tumor in the truth, called positive) of each patient.

    Example:
        >>> from clbench.evaluation.metrics.detection import patient_level
        >>> called = [(True, True), (True, True), (True, False), (True, False), (False, False)]
        >>> level = patient_level(called)
        >>> level.sensitivity.estimate, level.specificity.estimate, round(level.harmonic, 4)
        (0.5, 1.0, 0.6667)
        >>> round(level.sensitivity.low, 4), round(level.sensitivity.high, 4)  # Wilson, 2 of 4
        (0.15, 0.85)

    Source: the paper, Table 6; Wilson intervals as Brown et al., Statistical Science 2001 advise.
    """
    cases = list(called)
    with_tumor = [positive for has, positive in cases if has]
    without = [positive for has, positive in cases if not has]
    hits, clear = sum(with_tumor), sum(not p for p in without)
    return PatientDetection(
        sensitivity=wilson(hits, len(with_tumor)),
        specificity=wilson(clear, len(without)),
        true_positive=hits,
        true_negative=clear,
    )
