"""What the masks look like: CT, truth and each strategy, for the median and the worst case.

Images come from the cache of preprocessed volumes, predictions
from the run folders. Which cases and which slice are shown follows a rule, printed below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from clbench.report.figures import StripOptions, style
from clbench.report.figures.slices import (
    aspect,
    axial,
    best_slice,
    masks_of,
    palette,
    panel,
    slice_dice,
)
from clbench.report.scores import Scores, StrategyScores, test_cases
from clbench.report.study import Study

if TYPE_CHECKING:
    from clbench.data.volume import Volume
    from clbench.store.record import RunRecord

Masks = dict[str, NDArray[np.bool_]]
ACROSS = 5
"""Pictures side by side."""


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
    found = []
    for name in dict.fromkeys(e.sources[:step]):
        values = _per_case(e, e.reference, name, step)
        order = sorted((v, i, p) for i, (p, v) in enumerate(values.items()) if not math.isnan(v))
        if not order:
            continue
        picks = {"median": order[(len(order) - 1) // 2], "worst": order[0]}
        for word, (value, _, case) in picks.items():
            if word == "worst" and case == picks["median"][2]:
                continue
            found.append(Shown(eval_set=name, case=case, word=word, score=value))
    return found


def _per_case(e: Scores, method: StrategyScores, eval_set: str, step: int) -> dict[str, float]:
    """Patient → mean Dice over its structures and the seeds."""
    stack = [
        cells.values.mean(axis=0)
        for c, s in e.learned_at.items()
        if s <= step and e.home(c) == eval_set
        and (cells := method.cells.get((step, eval_set, c))) is not None and not cells.hole
    ]  # fmt: skip
    if not stack:
        return {}
    table = np.array(stack)
    have = (~np.isnan(table)).sum(axis=0)
    total = np.nan_to_num(table).sum(axis=0)
    means = np.divide(total, have, out=np.full(have.shape, np.nan), where=have > 0)
    return dict(zip(e.patients[eval_set], (float(m) for m in means), strict=True))


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


def strip(study: Study, options: StripOptions) -> Figure:
    """CT, truth and the prediction of each strategy, a row per case.

    Source: the form of the paper's Fig. 6, with cases chosen by rule.
    """
    from clbench.evaluation.predictions import read_prediction

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
        (m.label, one): m.runs[m.seeds.index(seed)].folder
        / "predictions" / f"step{step}" / f"{one.eval_set}_{one.case}.npz"
        for m in e.strategies
        for one in shown
    }  # fmt: skip
    study.need(
        any(path.exists() for path in stored.values()),
        "no strategy has stored its predictions",
        "run again with --keep-predictions test",
    )
    volumes = open_volumes(options, e.reference.records[0], shown)
    known = [c for c, s in e.learned_at.items() if s <= step]
    colors = palette(known)
    heads = ["CT", "truth", *(m.label for m in e.strategies)]
    across = min(ACROSS, len(heads))
    lines = math.ceil(len(heads) / across)
    tall = max(aspect(v) for v in volumes)
    side = style.PAGE_IN / across
    figure = style.new(style.PAGE_IN, 0.35 + len(shown) * lines * (side * tall + 0.17))
    axes = figure.subplots(len(shown) * lines, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    drawn: set[str] = set()
    for i, (one, volume) in enumerate(zip(shown, volumes, strict=True)):
        wanted = [c for c in known if c in volume.annotated]
        truth = masks_of(volume.bits, volume.names, wanted)
        newest = [c for c in wanted if e.learned_at[c] == step]
        z = best_slice(truth, newest)
        drawn |= {c for c, m in truth.items() if m[:, :, z].any()}
        panels: list[tuple[str, Masks | None]] = [("CT", {}), ("truth", truth)]
        for m in e.strategies:
            path = stored[m.label, one]
            if path.exists():
                kept = read_prediction(path)
                panels.append((m.label, masks_of(kept.bits, kept.structures, wanted)))
                drawn |= {c for c, mask in (panels[-1][1] or {}).items() if mask[:, :, z].any()}
            else:
                panels.append((m.label, None))
        image = axial(volume.image, z)
        for j, (head, masks) in enumerate(panels):
            ax = axes[i * lines + j // across, j % across]
            dice = None if j < 2 or not masks else slice_dice(masks, truth, z)
            panel(ax, image, volume, masks, z, colors, dice)
            if head == "CT":
                head = f"{one.eval_set} {one.case}: {one.word} ({one.score:.2f})"
            ax.set_title(head, fontsize=6.5, pad=2)
    key = [
        Patch(facecolor=colors[c], edgecolor="black", linewidth=0.4,
              label=f"{known.index(c) + 1} {style.name_of(c)}")
        for c in known if c in drawn
    ]  # fmt: skip
    grid_mm = " x ".join(f"{mm:.3g}" for mm in np.linalg.norm(volumes[0].affine[:3, :3], axis=0))
    style.frame(
        figure,
        e,
        f"{e.bench}: masks after step {step}, seed {seed}",
        f"Cases: per data set the median (lower middle) and the worst by the mean Dice of "
        f"{e.reference.label} (in brackets). Slice: most structures in the truth, then most of the "
        "newest. Numbers: the structure; below: mean Dice within the slice. Front is up, the "
        f"patient's right on the left; grid of the network, {grid_mm} mm; window "
        f"{volumes[0].window_hu[0]:g} to "
        f"{volumes[0].window_hu[1]:g} HU.",
        key,
    )
    return figure
