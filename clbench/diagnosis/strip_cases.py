"""Which cases and slices of a run are shown before and after, and their masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.catalog import Catalog, exam_cases
from clbench.data.labels import read_image
from clbench.data.nifti import grid
from clbench.data.volume import Volume
from clbench.evaluation.explained import TOTAL, LostDiceRow
from clbench.evaluation.metrics.continual import mean
from clbench.evaluation.scoring import to_native
from clbench.report.figures.lost_dice import BeforeAfter
from clbench.report.figures.slices import areas, axial, best_slice, masks_of
from clbench.types import Bits

Axes = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
Predicted = tuple[Bits, Sequence[str]]
"""(D, H, W) bit patterns on the model's grid, and the names of their bits."""


def choose(rows: Iterable[LostDiceRow], step: int) -> dict[tuple[str, str], tuple[str, float]]:
    """(eval set, case) → word and mean lost Dice: per eval set the median and the worst case.

    Of an even number of cases the lower middle one is the median; of equal ones the first by id is
    the worst. A case may be both: "median and worst".

    Args:
        rows: of a run.
        step: the later step.
    """
    lost: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.part == TOTAL and row.step == step:
            lost[row.eval_set][row.case].append(row.dice)
    chosen = {}
    for eval_set, cases in lost.items():
        means = {case: mean(cases[case]) for case in sorted(cases)}
        order = sorted(means, key=lambda case: means[case])
        worst = max(means, key=lambda case: means[case])
        median = order[(len(order) - 1) // 2]
        chosen[eval_set, worst] = ("worst", means[worst])
        both = " and worst" * (median == worst)
        chosen[eval_set, median] = (f"median{both}", means[median])
    return dict(sorted(chosen.items(), key=lambda item: (item[0][0], item[1][0])))


def strip_cases(
    catalog: Catalog,
    predict: Callable[[int, Volume], Predicted],
    rows: Sequence[LostDiceRow],
    step: int,
) -> list[BeforeAfter]:
    """The chosen cases, each as the slice in which most was lost.

    Args:
        catalog: the data of the run.
        predict: step, test case → what the model predicts.
        rows: where the lost Dice went.
        step: the later step.
    """
    chosen = choose(rows, step)
    number_of = {(source, case): number for number, source, case in exam_cases(catalog)}
    taught = {(r.eval_set, r.case, r.structure): r.learned_at for r in rows if r.step == step}
    shown = []
    for (source, case), (word, lost) in chosen.items():
        volume = catalog.open(number_of[source, case], case, "test")
        own = {n: at for (s, c, n), at in taught.items() if (s, c) == (source, case)}
        shown.append(_shown(volume, own, predict, step, word, lost))
    return shown


def _shown(
    volume: Volume,
    taught: Mapping[str, int],
    predict: Callable[[int, Volume], Predicted],
    step: int,
    word: str,
    lost: float,
) -> BeforeAfter:
    truth = volume.native_bits()
    axes = volume.native_axes()
    native = {t: _native(predict(t, volume), axes) for t in {*taught.values(), step}}

    def missed(name: str) -> NDArray[np.bool_]:
        real = masks_of(truth, volume.names, [name])[name]
        then, now = (masks_of(*native[t], [name])[name] for t in (taught[name], step))
        gone: NDArray[np.bool_] = real & then & ~now
        return gone

    area = {name: np.count_nonzero(missed(name), axis=(0, 1)).astype(np.int64) for name in taught}
    if not any(slices.any() for slices in area.values()):
        area = areas(truth, volume.names, [*taught])
    z = best_slice(area, [])

    def flat(bits: NDArray[Any], names: Sequence[str], name: str) -> NDArray[np.bool_]:
        return masks_of(bits[:, :, z], names, [name])[name]

    hu = read_image(volume.files.image, grid(volume.files.image), volume.table.rescale)
    return BeforeAfter(
        volume=volume,
        word=word,
        lost=lost,
        image=axial(hu[:, :, z]),
        truth={n: flat(truth, volume.names, n) for n in taught},
        before={n: flat(*native[t], n) for n, t in taught.items()},
        after={n: flat(*native[step], n) for n in taught},
        missed={n: missed(n)[:, :, z] for n in taught},
    )


def _native(predicted: Predicted, axes: Axes) -> Predicted:
    bits, names = predicted
    native: Bits = to_native(bits, axes)
    return native, names
