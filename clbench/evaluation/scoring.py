"""Scoring a case: Dice and other metrics of every structure learned so far.

One prediction per case, by sliding window, serves both scorings: `strict` (the file's own grid,
exact Dice) and `paper` (1.5 mm grid, the authors' Dice).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume
from clbench.errors import SettingError
from clbench.evaluation.metrics.case import CaseScores, measure, row_names
from clbench.evaluation.metrics.overlap import (
    Counts,
    counts_of,
    dice,
    dice_paper,
    pattern_pairs,
    row_pairs,
)
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.spec.benchmark import Benchmark
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score
from clbench.types import Bits, Rows

# ---------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreContext:
    """What the rows of one examination share."""

    benchmark: Benchmark
    """Whose structures are scored."""
    strategy: str
    """Name, as in the results folder."""
    seed: int
    """Seed of the run."""
    step: int
    """The last step that was taught."""


def score_case(
    bits: Bits,
    structures: Sequence[str],
    volume: Volume,
    context: ScoreContext,
) -> list[Score]:
    """Score every learned structure of one case, as `strict` and as `paper` scoring has it.

    `strict` takes masks back to the file's grid by nearest neighbor, for an exact Dice; `paper`
    stays on the model grid and adds 1 to the denominator.

    A structure the case does not annotate gets a row with status `not_annotated`: its background
    proves nothing, so neither its hits nor its false positives are counted.

    Args:
        bits: (D, H, W) prediction on the model grid, bit k = structures[k].
        structures: every structure learned so far.
        volume: the case, with its truth.
        context: what all rows share.

    Returns:
        One row per structure and scoring (metric `dice`); with `strict` one more of metric
        `dice_ceiling`: the truth itself taken to the model grid and back. No model that works on
        this grid is expected to score above it.

    Raises:
        SettingError: prediction and volume have different shapes.

    Source: see `clbench.evaluation.metrics.overlap`.
    """
    if bits.shape != volume.bits.shape:
        raise SettingError(
            "the prediction does not lie on the volume's grid",
            where=f"case {volume.source}/{volume.case}",
            expected=volume.bits.shape,
            got=bits.shape,
        )
    places = bit_pairs(structures, volume, structures)
    rows: list[Score] = []

    def add(scoring: str, metric: str, counts: Mapping[str, Counts]) -> None:
        value_of = dice_paper if scoring == "paper" else dice
        scores = {name: (value_of(c), c) for name, c in counts.items()}
        rows.extend(score_rows(scores, structures, volume, scoring, metric, context))

    truth = volume.native_bits()
    add("strict", "dice", counts_of(row_pairs(native_rows(bits, volume), truth), places))
    same = {name: (true_bit, true_bit) for name, (_, true_bit) in places.items()}
    ceiling = row_pairs(native_rows(volume.bits, volume), truth)
    add("strict", "dice_ceiling", counts_of(ceiling, same))
    add("paper", "dice", counts_of(pattern_pairs(bits, volume.bits), places))
    return rows


def mean_dice(values: Mapping[str, Sequence[float]]) -> float:
    """Mean over structures of the mean Dice over the cases that hold them; nan of none.

    Args:
        values: structure → its Dice in each case, as of `structure_dice`.
    """
    return float(np.mean([np.mean(v) for v in values.values()])) if values else float("nan")


def structure_dice(
    server: VolumePredictor,
    volumes: Iterable[Volume],
    structures: Sequence[str],
    *,
    postprocess: bool = False,
) -> dict[str, list[float]]:
    """Structure → its Dice in each case that annotates and holds it, on the model grid.

    Args:
        server: answers for at least these structures.
        volumes: cases with their truth.
        structures: the structures asked for; one that no case holds is absent.
        postprocess: apply the rules of the authors' pseudo-label code to the predictions.
    """
    values: dict[str, list[float]] = {}
    for volume in volumes:
        places = bit_pairs(server.structures, volume, structures)
        bits = server.predict(volume, postprocess=postprocess)
        for name, counts in counts_of(pattern_pairs(bits, volume.bits), places).items():
            if counts.gt_vox:
                values.setdefault(name, []).append(dice(counts))
    return values


def bit_pairs(
    predicted: Sequence[str], volume: Volume, names: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """Structure → (its bit in the prediction, its bit in the truth), where it is annotated.

    Args:
        predicted: structures of the prediction, in the order of its bits.
        volume: the case.
        names: the structures asked for, in the order of the result.
    """
    return {
        name: (predicted.index(name), volume.names.index(name))
        for name in names
        if name in volume.annotated and name in volume.names
    }


def score_rows(
    scores: Mapping[str, tuple[float, Counts]],
    structures: Sequence[str],
    volume: Volume,
    scoring: str,
    metric: str,
    context: ScoreContext,
) -> Iterator[Score]:
    """One row per structure learned so far; those without an entry are `not_annotated`.

    Args:
        scores: structure → (value, counts) of what the case annotates.
        structures: every structure learned so far.
        volume: the case.
        scoring: `strict` or `paper`.
        metric: name of the value.
        context: what all rows share.
    """
    for name in structures:
        value, counts = scores.get(name, (float("nan"), None))
        yield Score(
            bench=context.benchmark.name,
            bench_version=context.benchmark.version,
            strategy=context.strategy,
            seed=context.seed,
            step=context.step,
            eval_set=volume.source,
            case=volume.case,
            structure=name,
            learned_at=context.benchmark.learned_at(name),
            scoring=scoring,
            metric=metric,
            value=value,
            gt_vox=None if counts is None else counts.gt_vox,
            pred_vox=None if counts is None else counts.pred_vox,
            status="not_annotated" if counts is None else counts.status,
        )


def to_native(
    bits: NDArray[Any], axes: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
) -> NDArray[Any]:
    """Take a bit pattern array back to the native grid by nearest neighbor.

    Args:
        bits: (D, H, W) on the model grid.
        axes: per native axis the nearest model index of each voxel, -1 outside the model grid;
            what `Volume.native_axes` returns.

    Returns:
        (len(axes[0]), len(axes[1]), len(axes[2])) of the same type; 0 outside.
    """
    out = np.zeros(tuple(len(a) for a in axes), dtype=bits.dtype)
    inside = [np.flatnonzero(a >= 0) for a in axes]
    if any(i.size == 0 for i in inside):
        return out
    # one axis after the other, widest rows first: the gather stays in cache
    for axis in range(3):
        bits = np.take(bits, axes[axis][inside[axis]], axis=axis)
    # the inside of an axis is one stretch, so this is a plain block
    block = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in inside)
    if out[block].shape == bits.shape:
        out[block] = bits
    else:
        out[np.ix_(*inside)] = bits
    return out


def native_rows(bits: NDArray[Any], volume: Volume) -> Rows:
    """Reads rows of a prediction on the model grid as they lie on the file's grid."""
    axis0, axis1, axis2 = volume.native_axes()

    def rows(first: int, stop: int) -> Bits:
        native: Bits = to_native(bits, (axis0[first:stop], axis1, axis2))
        return native

    return rows


def context_of(record: RunRecord, benchmark: Benchmark, step: int) -> ScoreContext:
    """What rows of a finished run share.

    Args:
        record: of the run.
        benchmark: what it was taught.
        step: the last step that was taught.
    """
    return ScoreContext(benchmark=benchmark, strategy=record.strategy, seed=record.seed, step=step)


def measure_on_file(
    bits: Bits,
    structures: Sequence[str],
    volume: Volume,
    truth: Bits,
    metrics: Sequence[str],
    *,
    among: Sequence[str] | None = None,
) -> dict[str, CaseScores]:
    """Measure metrics of one case on the grid of its file.

    Args:
        bits: (D, H, W) prediction on the model grid, bit k = structures[k].
        structures: what the prediction speaks of.
        volume: the case.
        truth: its `native_bits`, read once for many predictions.
        metrics: metrics, as `clbench.evaluation.metrics.case.parse_metrics` gives them.
        among: what is measured of `structures`; None: all.
    """
    return measure(
        native_rows(bits, volume),
        truth,
        spacing_of(volume.native_affine).tolist(),
        bit_pairs(structures, volume, structures if among is None else among),
        metrics,
        model_grid=(bits, volume.bits),
    )


def metric_rows(
    scores: Mapping[str, CaseScores],
    structures: Sequence[str],
    volume: Volume,
    metrics: Sequence[str],
    context: ScoreContext,
) -> list[Score]:
    """Rows of metrics, for the structures each of them is of.

    Args:
        scores: structure → voxel counts and metric values; one that is absent is not annotated.
        structures: canonical names, in the order of the rows.
        volume: the case that was scored.
        metrics: metrics, see `clbench.evaluation.metrics.case.parse_metrics`.
        context: what all rows of the step share.
    """
    of: dict[str, dict[str, None]] = {}
    for name in structures:
        for word in metrics:
            for metric in row_names(word, name):
                of.setdefault(metric, {})[name] = None
    return [
        row
        for metric, names in of.items()
        for row in score_rows(
            {n: (scores[n].values[metric], scores[n].counts) for n in names if n in scores},
            list(names), volume, "strict", metric, context,
        )
    ]  # fmt: skip
