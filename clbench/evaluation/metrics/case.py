"""Metrics of one case on the file's own grid, in mm: a registry of all, each with its unit.

The prediction is read some rows at a time, so that a long scan costs its truth and a
slab. Rows named here: `dice`, `nsd_<τ>mm`, `hd95_mm`, `assd_mm`, `volume_error_ml`,
`lesion_…`, `patient_positive…`. `asd_bsp` alone is of the model's grid, and in its voxels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from clbench.errors import SettingError, did_you_mean
from clbench.evaluation.metrics import detection, overlap, surface
from clbench.evaluation.metrics.overlap import Counts, counts_of, row_pairs
from clbench.evaluation.metrics.surface import Surfaces
from clbench.spec.taxonomy import structure
from clbench.types import Bits, Rows, mask_of

DEFAULT = ("nsd", "hd95_mm", "volume_error_ml", "lesion", "patient")
"""What `clbench score` adds to Dice."""
WORDS = ("dice", *DEFAULT, "assd_mm", "asd_bsp", "nsd_sweep", "nsd_1.5mm", "patient_50vox")
"""What may be asked for; the last two stand for any number."""
SWEEP_MM = (1.0, 2.0, 3.0)
"""Tolerances of `nsd_sweep`."""
_NSD = re.compile(r"nsd_(\d+(?:\.\d+)?)mm")
_PATIENT = re.compile(r"patient(?:_(\d+)vox)?")


def parse_metrics(text: str) -> tuple[str, ...]:
    """`nsd,hd95_mm` → words, each once; `nsd_sweep` becomes its tolerances.

    Raises:
        SettingError: a metric nobody knows.

    Example:
        >>> from clbench.evaluation.metrics.case import parse_metrics
        >>> parse_metrics("dice, nsd_sweep, dice, nsd_1.50mm")
        ('dice', 'nsd_1mm', 'nsd_2mm', 'nsd_3mm', 'nsd_1.5mm')
    """
    metrics: list[str] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word == "nsd_sweep":
            metrics += [f"nsd_{t:g}mm" for t in SWEEP_MM]
        elif word in WORDS or _PATIENT.fullmatch(word):
            metrics.append(word)
        elif (tolerance := _NSD.fullmatch(word)) and float(tolerance[1]) > 0:
            metrics.append(f"nsd_{float(tolerance[1]):g}mm")
        else:
            raise _unknown(word)
    if not metrics:
        raise SettingError("no metric is named", where="--metrics", expected=", ".join(WORDS))
    return tuple(dict.fromkeys(metrics))


def _unknown(word: str) -> SettingError:
    return SettingError(
        f"there is no metric called {word!r}",
        where="--metrics",
        expected=", ".join(WORDS),
        got=word,
        next_step=did_you_mean(word, WORDS),
    )


def row_names(word: str, name: str) -> tuple[str, ...]:
    """The metrics a word stands for in the rows of structure `name`; detection is of lesions.

    Example:
        >>> from clbench.evaluation.metrics.case import row_names
        >>> row_names("nsd", "liver"), row_names("patient_50vox", "liver_tumor")
        (('nsd_2mm',), ('patient_positive_50vox',))
        >>> row_names("lesion", "liver")
        ()
    """
    return tuple(metric.name for metric in metrics_of(word, name))


def implementations(metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Which code and definition, in which version, makes the rows of these metrics.

    Example:
        >>> from clbench.evaluation.metrics.case import implementations
        >>> implementations(["dice"])
        {'dice': {'implementation': 'clbench.metrics.overlap: exact voxel counts', 'version': 1}}
    """
    versions: dict[str, dict[str, Any]] = {}
    for word in metrics:
        code = _of_word("nsd_1mm" if word == "nsd" else word)[0].code
        versions[word.split("_")[0]] = {
            "implementation": code.IMPLEMENTATION,
            "version": code.VERSION,
        }
    return versions


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseScores:
    """One structure of one case."""

    counts: Counts
    """Voxels."""
    values: Mapping[str, float]
    """Metric → value."""


def measure(
    rows: Rows,
    truth: Bits,
    spacing_mm: Sequence[float],
    bits: Mapping[str, tuple[int, int]],
    metrics: Sequence[str],
    *,
    model_grid: tuple[Bits, Bits] | None = None,
) -> dict[str, CaseScores]:
    """All metrics of one case.

    Args:
        rows: reads rows of the prediction on the grid of `truth`.
        truth: (D, H, W) bit patterns.
        spacing_mm: voxel size of this grid.
        bits: structure → (its bit in the prediction, its bit in the truth).
        metrics: metrics asked for, see `parse_metrics`.
        model_grid: prediction and truth on the model's grid, with the same bits; `asd_bsp` alone
            looks at them.

    Raises:
        SettingError: `asd_bsp` is asked for, and there is no model grid.

    Returns:
        Structure → counts and values. Where the truth is empty every score is nan, whatever the
        prediction (the status tells which); where only the prediction is empty, Dice, surface
        Dice, sensitivity and F1 are 0, HD95 is the diagonal of the image, ASSD is nan (a table
        counts missed cases beside it), and the volume error is the whole volume. Counts of lesions
        and the patient's call are numbers in every case.

    Example:
        >>> import numpy as np
        >>> from clbench.evaluation.metrics.case import measure
        >>> truth = np.zeros((4, 4, 4), dtype=np.uint8)
        >>> truth[1:3, 1:3, 1:3] = 1  # 8 voxels of the structure at bit 0
        >>> pred = truth.copy()
        >>> pred[1] = 0  # half of it is missed
        >>> scores = measure(
        ...     lambda first, end: pred[first:end],
        ...     truth,
        ...     (2.0, 1.0, 1.0),
        ...     {"spleen": (0, 0)},
        ...     ("dice", "volume_error_ml", "hd95_mm"),
        ... )
        >>> scores["spleen"].counts
        Counts(both_vox=4, pred_vox=4, gt_vox=8)
        >>> {name: round(value, 4) for name, value in scores["spleen"].values.items()}
        {'dice': 0.6667, 'volume_error_ml': -0.008, 'hd95_mm': 2.0}
    """
    masks = _Masks(rows, truth, [float(s) for s in spacing_mm], model_grid)
    scores = {}
    for name, counts in counts_of(row_pairs(rows, truth), bits).items():
        case = _Case(masks, counts, *bits[name])
        computed = [metric for word in metrics for metric in metrics_of(word, name)]
        scores[name] = CaseScores(
            counts=counts, values={metric.name: metric.compute(case) for metric in computed}
        )
    return scores


class _Masks:
    """Prediction and truth of one case; their surfaces are made when a metric first asks."""

    def __init__(
        self,
        rows: Rows,
        truth: Bits,
        spacing_mm: list[float],
        model_grid: tuple[Bits, Bits] | None,
    ) -> None:
        self.rows, self.truth, self.spacing_mm = rows, truth, spacing_mm
        self.model_grid = model_grid

    @cached_property
    def surfaces(self) -> tuple[Surfaces, Surfaces]:
        """Of the prediction and of the truth, all structures."""
        return (
            surface.surfaces(self.rows, self.truth.shape),
            surface.surfaces(lambda a, b: self.truth[a:b], self.truth.shape),
        )


class _Case:
    """One structure of one case; what several metrics need is made once."""

    def __init__(self, masks: _Masks, counts: Counts, p_bit: int, t_bit: int) -> None:
        self.masks, self.counts, self.p_bit, self.t_bit = masks, counts, p_bit, t_bit

    def by_distance(self, score: Callable[[surface.Distances], float], missed: float) -> float:
        """A score of two surfaces; nan where the truth is empty, `missed` where the other is."""
        if self.counts.gt_vox == 0:
            return math.nan
        return missed if self.counts.pred_vox == 0 else score(self.distances)

    @cached_property
    def distances(self) -> surface.Distances:
        pred, truth = self.masks.surfaces
        return surface.distances(
            pred.of(self.p_bit), truth.of(self.t_bit), pred.shape, self.masks.spacing_mm
        )

    @cached_property
    def lesions(self) -> detection.Lesions:
        pred, truth = self.masks.surfaces
        index = np.concatenate([pred.of(self.p_bit), truth.of(self.t_bit)])
        if index.size == 0:
            empty = np.zeros((1, 1, 1), dtype=bool)
            return detection.lesions(empty, empty)
        # a structure lies within the box of its surface
        at = np.unravel_index(index, pred.shape)
        a, b, c = (slice(int(x.min()), int(x.max()) + 1) for x in at)
        return detection.lesions(
            mask_of(self.masks.rows(a.start, a.stop)[:, b, c], self.p_bit),
            mask_of(self.masks.truth[a, b, c], self.t_bit),
        )


# ------------------------------------------------------------------------------------ the registry


class Metric(NamedTuple):
    """One metric of one structure of one case, with the facts a table or a test needs."""

    name: str
    """Name in `scores.csv`."""
    unit: Literal["share", "mm", "voxels", "ml", "lesions", "yes or no"]
    """Unit of the value; a share lies in [0, 1], yes is 1."""
    higher_is_better: bool | None
    """None: neither, as of a signed error or a count of the truth."""
    code: ModuleType
    """The module whose `IMPLEMENTATION` and `VERSION` a run records."""
    compute: Callable[[_Case], float]
    """The value."""

    @property
    def of_lesions(self) -> bool:
        """Only tumors and cysts have it."""
        return self.code is detection


def _lesion(part: str, unit: Literal["share", "lesions"], higher_is_better: bool | None) -> Metric:
    return Metric(
        f"lesion_{part}", unit, higher_is_better, detection,
        lambda case: float(getattr(case.lesions, part)),
    )  # fmt: skip


def _volume_error_ml(case: _Case) -> float:
    return overlap.volume_error_ml(case.counts, math.prod(case.masks.spacing_mm))


def _hd95_mm(case: _Case) -> float:
    diagonal = surface.diagonal_mm(case.masks.truth.shape, case.masks.spacing_mm)
    return case.by_distance(surface.hd95, diagonal)


def _asd_bsp(case: _Case) -> float:
    if case.masks.model_grid is None:
        raise SettingError(
            "asd_bsp is computed on the grid of the model, and these predictions are on that of "
            "the file alone",
            where="--metrics",
            got="asd_bsp",
            next_step="assd_mm is the average surface distance on the grid of the file, in mm",
        )
    pred, truth = case.masks.model_grid
    return surface.asd_bsp(mask_of(pred, case.p_bit), mask_of(truth, case.t_bit))


LESION = (
    _lesion("truth", "lesions", None),
    _lesion("found", "lesions", True),
    _lesion("pred", "lesions", None),
    _lesion("false", "lesions", False),
    _lesion("sensitivity", "share", True),
    _lesion("f1", "share", True),
)
"""Four counts, which are summed over cases, and two scores of the case. A PPV
per case would exist or not depending on the strategy, which breaks pairs; it is pooled."""

METRICS = {
    metric.name: metric
    for metric in (
        Metric("dice", "share", True, overlap, lambda case: overlap.dice(case.counts)),
        Metric("volume_error_ml", "ml", None, overlap, _volume_error_ml),
        Metric("hd95_mm", "mm", False, surface, _hd95_mm),
        Metric("assd_mm", "mm", False, surface, lambda c: c.by_distance(surface.assd, math.nan)),
        Metric("asd_bsp", "voxels", False, surface, _asd_bsp),
        *LESION,
    )
}
"""Name → metric; `nsd_<τ>mm` and `patient_positive…` carry a number and are made on demand."""


def _nsd(name: str, tolerance_mm: float) -> Metric:
    def compute(case: _Case) -> float:
        return case.by_distance(lambda d: surface.surface_dice(d, tolerance_mm), 0.0)

    return Metric(name, "share", True, surface, compute)


def _patient_positive(name: str, least_vox: int) -> Metric:
    def compute(case: _Case) -> float:
        return float(case.lesions.largest_pred_vox >= max(1, least_vox))

    # right or wrong by the patient, so neither: they are counted
    return Metric(name, "yes or no", None, detection, compute)


def metrics_of(word: str, name: str) -> tuple[Metric, ...]:
    """The metrics a word stands for on structure `name`; none where they are of lesions alone.

    Raises:
        SettingError: a metric nobody knows.

    Example:
        >>> from clbench.evaluation.metrics.case import metrics_of
        >>> (nsd,) = metrics_of("nsd", "liver")
        >>> nsd.name, nsd.unit, nsd.higher_is_better
        ('nsd_2mm', 'share', True)
        >>> metrics_of("lesion", "liver")
        ()
    """
    facts = structure(name)
    metrics = _of_word(f"nsd_{facts.tolerance_mm:g}mm" if word == "nsd" else word)
    lesion = facts.kind in ("tumor", "cyst")
    return tuple(metric for metric in metrics if lesion or not metric.of_lesions)


def word_of(name: str) -> str:
    """The word of `clbench score --metrics` that gives the metric `name` of `scores.csv`.

    Raises:
        SettingError: a metric nobody knows.

    Example:
        >>> from clbench.evaluation.metrics.case import word_of
        >>> word_of("lesion_f1"), word_of("patient_positive_50vox"), word_of("nsd_2mm")
        ('lesion', 'patient_50vox', 'nsd_2mm')
    """
    if any(name == metric.name for metric in LESION):
        return "lesion"
    word = name.replace("patient_positive", "patient")
    _of_word(word)  # must be one
    return word


def _of_word(word: str) -> tuple[Metric, ...]:
    if word == "lesion":
        return LESION
    if size := _PATIENT.fullmatch(word):
        return (_patient_positive(word.replace("patient", "patient_positive"), int(size[1] or 1)),)
    if tolerance := _NSD.fullmatch(word):
        return (_nsd(word, float(tolerance[1])),)
    if word not in METRICS:
        raise _unknown(word)
    return (METRICS[word],)
