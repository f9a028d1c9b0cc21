"""Every metric of one case on the file's own grid, in mm: words in, named numbers out.

The prediction is read some rows at a time, so that a long scan costs its truth and a
slab. Rows named here: `dice`, `nsd_<τ>mm`, `hd95_mm`, `volume_error_ml`, `lesion_…`,
`patient_positive…`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import SettingError, closest
from clbench.evaluation.metrics import detection, overlap, surface
from clbench.evaluation.metrics.overlap import Counts, counts_of, merge_pairs, pattern_pairs
from clbench.evaluation.metrics.surface import Rows, Surfaces
from clbench.spec.taxonomy import structure
from clbench.types import Bits

DEFAULT = ("nsd", "hd95_mm", "volume_error_ml", "lesion", "patient")
"""What `clbench score` adds to Dice."""
WORDS = ("dice", *DEFAULT, "nsd_sweep", "nsd_1.5mm", "patient_50vox")
"""What may be asked for; the last two stand for any number."""
SWEEP_MM = (1.0, 2.0, 3.0)
"""Tolerances of `nsd_sweep`."""
_NSD = re.compile(r"nsd_(\d+(?:\.\d+)?)mm")
_PATIENT = re.compile(r"patient_(\d+)vox")
_SLAB_VOX = 1 << 24  # voxels compared at a time


def parse_words(text: str) -> tuple[str, ...]:
    """`nsd,hd95_mm` → words, each once; `nsd_sweep` becomes its tolerances.

    Raises:
        SettingError: a metric nobody knows.

    Example:
        >>> from clbench.evaluation.metrics.case import parse_words
        >>> parse_words("dice, nsd_sweep, dice, nsd_1.50mm")
        ('dice', 'nsd_1mm', 'nsd_2mm', 'nsd_3mm', 'nsd_1.5mm')
    """
    found: list[str] = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word == "nsd_sweep":
            found += [f"nsd_{t:g}mm" for t in SWEEP_MM]
        elif word in WORDS or _PATIENT.fullmatch(word):
            found.append(word)
        elif (tolerance := _NSD.fullmatch(word)) and float(tolerance[1]) > 0:
            found.append(f"nsd_{float(tolerance[1]):g}mm")
        else:
            guess = closest(word, WORDS)
            raise SettingError(
                f"there is no metric called {word!r}",
                where="--metrics",
                expected=", ".join(WORDS),
                got=word,
                next_step=f"did you mean {guess!r}?" if guess else None,
            )
    if not found:
        raise SettingError("no metric is named", where="--metrics", expected=", ".join(WORDS))
    return tuple(dict.fromkeys(found))


def row_names(word: str, name: str) -> tuple[str, ...]:
    """The metrics a word stands for in the rows of structure `name`; detection is of lesions.

    Example:
        >>> from clbench.evaluation.metrics.case import row_names
        >>> row_names("nsd", "liver"), row_names("patient_50vox", "liver_tumor")
        (('nsd_2mm',), ('patient_positive_50vox',))
        >>> row_names("lesion", "liver")
        ()
    """
    lesion = structure(name).kind in ("tumor", "cyst")
    if word == "nsd":
        return (f"nsd_{structure(name).tolerance_mm:g}mm",)
    if word == "lesion":
        return LESION_ROWS if lesion else ()
    if word == "patient" or _PATIENT.fullmatch(word):
        return (f"patient_positive{word.removeprefix('patient')}",) if lesion else ()
    return (word,)


LESION_ROWS = (
    "lesion_truth", "lesion_found", "lesion_pred", "lesion_false",
    "lesion_sensitivity", "lesion_f1",
)  # fmt: skip
"""Four counts, which pool over cases (`detection.add`), and two scores of the case. A PPV
per case would exist or not depending on the strategy, which breaks pairs; it is pooled."""


def implementations(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Which code and definition, in which version, makes the rows of these words.

    Example:
        >>> from clbench.evaluation.metrics.case import implementations
        >>> implementations(["dice"])
        {'dice': {'implementation': 'clbench.metrics.overlap: exact voxel counts', 'version': 1}}
    """
    made: dict[str, dict[str, Any]] = {}
    for word in words:
        family = word.split("_")[0]
        room: Any = {
            "nsd": surface, "hd95": surface, "lesion": detection, "patient": detection,
        }.get(family, overlap)  # fmt: skip
        made[family] = {"implementation": room.IMPLEMENTATION, "version": room.VERSION}
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
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
    words: Sequence[str],
) -> dict[str, Found]:
    """All metrics of one case.

    Args:
        rows: reads rows of the prediction on the grid of `truth`.
        truth: (D, H, W) bit patterns.
        spacing_mm: voxel size of this grid.
        bits: structure → (its bit in the prediction, its bit in the truth).
        words: metrics asked for, see `parse_words`.

    Returns:
        Structure → counts and values. Where the truth is empty every score is nan, whatever the
        prediction (the status tells which); where only the prediction is empty, Dice, surface
        Dice, sensitivity and F1 are 0, HD95 is the diagonal of the image, and the volume error is
        the whole volume. Counts of lesions and the patient's call are numbers in every case.

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
    shape = truth.shape
    step = max(1, _SLAB_VOX // max(1, shape[1] * shape[2]))
    pairs = merge_pairs(
        pattern_pairs(rows(a, min(a + step, shape[0])), truth[a : a + step])
        for a in range(0, shape[0], step)
    )
    counts = dict(zip(bits, counts_of(pairs, list(bits.values())), strict=True))
    edges: tuple[Surfaces, Surfaces] | None = None
    if any(not w.startswith(("dice", "volume")) for w in words):
        edges = (
            surface.surfaces(rows, shape),
            surface.surfaces(lambda a, b: truth[a:b], shape),
        )
    found = {}
    for name, (p_bit, t_bit) in bits.items():
        case = _Case(rows, truth, spacing_mm, counts[name], p_bit, t_bit, edges)
        found[name] = Found(
            counts=counts[name],
            values={
                row: value
                for word in words
                for row, value in zip(row_names(word, name), case.values(word, name), strict=True)
            },
        )
    return found


class _Case:
    """One structure of one case; what several metrics need is made once."""

    def __init__(
        self,
        rows: Rows,
        truth: Bits,
        spacing_mm: Sequence[float],
        counts: Counts,
        p_bit: int,
        t_bit: int,
        edges: tuple[Surfaces, Surfaces] | None,
    ) -> None:
        self.rows, self.truth, self.spacing_mm = rows, truth, [float(s) for s in spacing_mm]
        self.counts, self.p_bit, self.t_bit, self.edges = counts, p_bit, t_bit, edges
        self._distances: surface.Distances | None = None
        self._lesions: detection.Lesions | None = None

    def values(self, word: str, name: str) -> Iterator[float]:
        """One number per row name of the word."""
        counts = self.counts
        for row in row_names(word, name):
            if row == "dice":
                yield overlap.dice(counts)
            elif row == "volume_error_ml":
                yield overlap.volume_error_ml(counts, math.prod(self.spacing_mm))
            elif row.startswith("lesion_"):
                yield float(getattr(self.lesions(), row.removeprefix("lesion_")))
            elif row.startswith("patient_positive"):
                size = _PATIENT.fullmatch(word)
                needed = max(1, int(size[1])) if size else 1
                yield float(self.lesions().largest_pred_vox >= needed)
            elif counts.gt_vox == 0:
                yield math.nan
            elif counts.pred_vox == 0:
                missed = row == "hd95_mm"
                yield surface.diagonal_mm(self.truth.shape, self.spacing_mm) if missed else 0.0
            elif row == "hd95_mm":
                yield surface.hd95(self.distances())
            else:
                tolerance = _NSD.fullmatch(row)
                assert tolerance is not None  # noqa: S101  # parse_words let nothing else through
                yield surface.surface_dice(self.distances(), float(tolerance[1]))

    def distances(self) -> surface.Distances:
        if self._distances is None:
            assert self.edges is not None  # noqa: S101  # made for every word that comes here
            pred, truth = self.edges
            self._distances = surface.distances(
                pred.of(self.p_bit), truth.of(self.t_bit), pred.shape, self.spacing_mm
            )
        return self._distances

    def lesions(self) -> detection.Lesions:
        if self._lesions is None:
            assert self.edges is not None  # noqa: S101  # made for every word that comes here
            pred, truth = self.edges
            index = np.concatenate([pred.of(self.p_bit), truth.of(self.t_bit)])
            if index.size == 0:
                empty = np.zeros((1, 1, 1), dtype=bool)
                self._lesions = detection.lesions(empty, empty)
            else:  # a structure lies within the box of its surface
                at = np.unravel_index(index, pred.shape)
                a, b, c = (slice(int(x.min()), int(x.max()) + 1) for x in at)
                self._lesions = detection.lesions(
                    _mask(self.rows(a.start, a.stop)[:, b, c], self.p_bit),
                    _mask(self.truth[a, b, c], self.t_bit),
                )
        return self._lesions


def _mask(bits: Bits, bit: int) -> NDArray[np.bool_]:
    return (bits >> bits.dtype.type(bit) & 1).astype(bool)
