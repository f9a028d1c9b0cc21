"""What the masks look like: CT, truth and each strategy, for the median and the worst case.

CT and truth are read from their files and shown on the file's own grid; predictions come from the
run folders and are brought there by nearest neighbor, as for the scores. Which cases and which
slice are shown follows a rule, printed below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clbench.report.figures import StripOptions, style
from clbench.report.figures.slices import (
    areas,
    aspect,
    axial,
    best_slice,
    legend,
    masks_of,
    palette,
    panel,
    slice_dice,
)
from clbench.report.figures.wrapping import more_lines_in, wrapped
from clbench.report.scores import Scores, StrategyScores, mean_over_have, test_cases
from clbench.report.study import Study
from clbench.store.run_folder import prediction_path

if TYPE_CHECKING:
    from pathlib import Path

    from clbench.data.volume import Volume
    from clbench.store.record import RunRecord

Masks = dict[str, NDArray[np.bool_]]
ACROSS = 5
"""Pictures side by side."""
HEAD_PT = 6.5
"""Font size above a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One row of the strip."""

    eval_set: str
    """Source of the case."""
    case: str
    """Case id."""
    word: str
    """`median` or `worst`."""
    score: float
    """The reference's mean Dice of the structures of this case."""


def choose(e: Scores, step: int) -> list[Shown]:
    """Per eval set the case in which the reference's mean Dice is the median, and the lowest.

    The mean is over the structures taught from this set so far that the case holds, seeds averaged;
    of an even number of cases the lower middle one is the median; a tie goes to the first.
    """
    rows = []
    for name in dict.fromkeys(e.sources[:step]):
        values = _per_case(e, e.reference, name, step)
        order = sorted((v, i, p) for i, (p, v) in enumerate(values.items()) if not math.isnan(v))
        if not order:
            continue
        picks = {"median": order[(len(order) - 1) // 2], "worst": order[0]}
        for word, (value, _, case) in picks.items():
            if word == "worst" and case == picks["median"][2]:
                continue
            rows.append(Shown(eval_set=name, case=case, word=word, score=value))
    return rows


def _per_case(e: Scores, method: StrategyScores, eval_set: str, step: int) -> dict[str, float]:
    """Patient → mean Dice over its structures and the seeds."""
    stack = [
        cells.values.mean(axis=0)
        for c, s in e.learned_at.items()
        if s <= step and e.home(c) == eval_set
        and (cells := method.cells.get((step, eval_set, c))) is not None and not cells.hole
    ]  # fmt: skip
    means = mean_over_have(np.array(stack), axis=0).tolist() if stack else []
    return dict(zip(e.patients[eval_set], means, strict=bool(stack)))


def case_of(e: Scores, eval_set: str, patient: str) -> str:
    """The first test case of a patient.

    Args:
        e: the runs.
        eval_set: source of the case.
        patient: whose case; a case id where the source has one case per patient.
    """
    tests = test_cases(e.record)[eval_set]
    return next(c for c in tests if e.patient_of.get(f"{eval_set}/{c}", c) == patient)


def open_volumes(options: StripOptions, record: RunRecord, shown: Sequence[Shown]) -> list[Volume]:
    """The cases as the run saw them, whatever the profile of that name says today.

    Args:
        options: where images and cache are.
        record: `run.json` of one of the runs.
        shown: which cases.

    Raises:
        StoreError: the data at hand are not those of the run.
    """
    from clbench.run.record import catalog_of

    catalog = catalog_of(record, data=options.data, cache=options.cache)
    return [
        catalog.cache.get(
            catalog.files[s.eval_set][s.case],
            catalog.benchmark.source(s.eval_set),
            catalog.preprocessing,
        )
        for s in shown
    ]


def predicted(path: Path, volume: Volume, z: int, wanted: Sequence[str]) -> Masks:
    """A slice of a stored prediction on the grid of the file.

    Args:
        path: where the prediction is stored, on the grid of the network.
        volume: its case.
        z: which axial slice of the file.
        wanted: structures to unpack.

    Returns:
        Structure → (D, H).

    Raises:
        StoreError: it cannot be read, or lies on another grid than the case.
    """
    from clbench.evaluation.predictions import read_prediction, refuse_other_grid
    from clbench.evaluation.scoring import to_native

    stored = read_prediction(path)
    refuse_other_grid(path, stored, volume)
    axis0, axis1, axis2 = volume.native_axes()
    flat = to_native(stored.bits, (axis0, axis1, axis2[z : z + 1]))[:, :, 0]
    return masks_of(flat, stored.structures, wanted)


def _voxels(shown: Sequence[Shown], volumes: Sequence[Volume]) -> str:
    """Voxel sizes of the files; with the cases where they differ."""
    from clbench.data.nifti import spacing_of

    cases: dict[str, list[str]] = {}
    for one, volume in zip(shown, volumes, strict=True):
        mm = " x ".join(f"{v:.3g}" for v in spacing_of(volume.native_affine))
        cases.setdefault(f"{mm} mm", []).append(f"{one.eval_set} {one.case}")
    if len(cases) == 1:
        return next(iter(cases))
    return ", ".join(f"{mm} ({', '.join(names)})" for mm, names in cases.items())


def strip(study: Study, options: StripOptions) -> Figure:
    """CT, truth and the prediction of each strategy, a row per case.

    Source: the form of the paper's Fig. 6, with cases chosen by rule.
    """
    e = study.dice
    step = options.step or e.last
    study.need(1 <= step <= e.last, f"there is no step {step}", f"choose 1 to {e.last}")
    shown = choose(e, step)
    study.need(shown, "the reference has no scored case", "finish its runs")
    shown = [replace(s, case=case_of(e, s.eval_set, s.case)) for s in shown]
    seeds = set.intersection(*(set(m.seeds) for m in e.strategies))
    study.need(seeds, "the strategies have no seed in common", "run all with one seed")
    seed = min(seeds)
    stored = {
        (m.label, one): prediction_path(
            m.runs[m.seeds.index(seed)].folder, step, one.eval_set, one.case
        )
        for m in e.strategies
        for one in shown
    }  # fmt: skip
    having = [m for m in e.strategies if any(stored[m.label, one].exists() for one in shown)]
    study.need(
        having,
        "no strategy has stored its predictions",
        "run again with --keep-predictions test",
    )
    # a method from outside, which may be the reference, has no grid of its own
    volumes = open_volumes(options, having[0].records[0], shown)
    known = [c for c, s in e.learned_at.items() if s <= step]
    colors = palette(known)
    across = min(ACROSS, 2 + len(e.strategies))
    lines = math.ceil((2 + len(e.strategies)) / across)
    tall = max(aspect(v) for v in volumes)
    side = style.PAGE_IN / across
    heads = {one: _heads(e, one, side * 0.9) for one in shown}
    more_in = more_lines_in([h for row in heads.values() for h in row], HEAD_PT)
    figure = style.new(style.PAGE_IN, 0.35 + len(shown) * lines * (side * tall + 0.17 + more_in))
    axes = figure.subplots(len(shown) * lines, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    drawn: set[str] = set()
    for i, (one, volume) in enumerate(zip(shown, volumes, strict=True)):
        paths = [stored[m.label, one] for m in e.strategies]
        image, pictures = _pictures(e, step, volume, paths)
        for j, (head, masks) in enumerate(zip(heads[one], pictures, strict=True)):
            ax = axes[i * lines + j // across, j % across]
            dice = None if j < 2 or not masks else slice_dice(masks, pictures[1] or {})
            panel(ax, image, volume, masks, colors, dice)
            drawn |= {c for c, mask in (masks or {}).items() if mask.any()}
            ax.set_title(head, fontsize=HEAD_PT, pad=2)
    style.frame(
        figure,
        e.phantom,
        f"{e.bench}: masks after step {step}, seed {seed}, on the CT's own grid",
        _caption(e.reference.label, shown, volumes),
        legend(colors, drawn),
    )
    return figure


def _heads(e: Scores, one: Shown, width_in: float) -> list[str]:
    """What stands above the pictures of a case: CT, truth, and each strategy's."""
    first = f"{one.eval_set} {one.case}: {one.word} ({one.score:.2f})"
    words = (first, "truth", *(m.label for m in e.strategies))
    return [wrapped(head, width_in, HEAD_PT) for head in words]


def _caption(reference: str, shown: Sequence[Shown], volumes: Sequence[Volume]) -> str:
    """How cases and slices were chosen, and what is drawn of them."""
    low, high = volumes[0].window_hu
    return (
        f"Cases: per data set the median (lower middle) and the worst by the mean Dice of "
        f"{reference} (in brackets). Slice: most structures in the truth, then most of the "
        "newest. Numbers: the structure; below: mean Dice within the slice. Front is up, the "
        f"patient's right on the left; window {low:g} to {high:g} HU. Grid: the CT's own, "
        f"voxels of {_voxels(shown, volumes)}; predictions are brought there by nearest neighbor, "
        "as for the scores."
    )


def _pictures(
    e: Scores, step: int, volume: Volume, paths: Sequence[Path]
) -> tuple[NDArray[Any], list[Masks | None]]:
    """The slice of a case that is shown, and the masks of each picture.

    Args:
        e: the runs.
        step: after which it looks.
        volume: the case.
        paths: where each strategy's prediction is stored, if it is.

    Returns:
        The CT, turned; no masks, the truth, and the prediction of each strategy or None.
    """
    from clbench.data.labels import read_image
    from clbench.data.nifti import grid

    wanted = [c for c, s in e.learned_at.items() if s <= step and c in volume.annotated]
    bits = volume.native_bits()
    newest = [c for c in wanted if e.learned_at[c] == step]
    z = best_slice(areas(bits, volume.names, wanted), newest)
    hu = read_image(volume.files.image, grid(volume.files.image), volume.table.rescale)
    masks = [predicted(p, volume, z, wanted) if p.exists() else None for p in paths]
    return axial(hu[:, :, z]), [{}, masks_of(bits[:, :, z], volume.names, wanted), *masks]
