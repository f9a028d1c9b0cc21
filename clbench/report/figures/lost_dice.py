"""Where the lost Dice of one run went: causes, what voxels are called, head or body; a strip.

The strip shows cases before and after: CT, truth, masks after each structure's own step, after a
later step, and the voxels lost between. Which cases and which slice follows a rule, printed below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from clbench.data.volume import Volume
from clbench.evaluation.explained import HeadBody, LostDice
from clbench.evaluation.metrics.lost_dice import BACKGROUND
from clbench.report.figures import style
from clbench.report.figures.slices import aspect, legend, palette, panel, slice_dice
from clbench.report.figures.wrapping import width_in
from clbench.report.scores import title_of
from clbench.store.record import RunRecord

COLORS: Mapping[str, tuple[str, str]] = {
    "missed whole": ("#1d2330", ""),
    "background": ("#0072B2", ""),
    "border": ("#56B4E9", "////"),
    "confused": ("#D55E00", ""),
    "false alarm": ("#E69F00", "\\\\\\\\"),
    "mended": ("#009E73", "...."),
}
"""Cause → color and hatch, so that a gray print tells them apart."""
ROW_IN = 0.2
"""Height of a structure."""
WIDEST = 12
"""Columns of what voxels are called instead; the rest is one column."""
SMALLEST = 0.005
"""Dice, and share of voxels, below which nothing is written."""
REST = "others"
"""Name of that column."""
Masks = Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A row of the strip: one axial slice of a test case, on the grid of its file."""

    volume: Volume
    """The case."""
    word: str
    """`median` or `worst`."""
    lost: float
    """Mean Dice that its old structures lost."""
    image: NDArray[Any]
    """(rows, columns) HU, turned by `slices.axial`."""
    truth: Masks
    """Structure → (D, H)."""
    before: Masks
    """After each structure's own step."""
    after: Masks
    """After the later step."""
    missed: Masks
    """Voxels of the truth that were predicted before and are not after."""


def lost_dice_figure(
    record: RunRecord, losses: Sequence[LostDice], parts: Sequence[HeadBody] = ()
) -> Figure:
    """Causes as bars, what lost voxels are called as a matrix, and head or body as bars.

    Args:
        record: of the run.
        losses: what each old structure lost by one later step, in the order of the rows.
        parts: head and body by the same step; no panel without.
    """
    last = losses[0].step
    names = [one.structure for one in losses]
    others = _others(losses)
    wide = [2.6, max(0.9, 0.2 * len(others))] + ([1.6] if parts else [])
    names_in = max(width_in(style.name_of(n), style.TICK_PT) for n in names) + 0.15
    below_in = max(width_in(_other(o), style.TICK_PT) for o in others) + 0.15
    figure = style.new(
        max(style.PAGE_IN, names_in + sum(wide)), 0.55 + below_in + ROW_IN * len(names)
    )
    axes = figure.subplots(1, len(wide), squeeze=False, width_ratios=wide)[0]
    for ax in axes:
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_yticks(range(len(names)), [""] * len(names))
        ax.tick_params(length=0, axis="y")
    axes[0].set_yticks(range(len(names)), [style.name_of(n) for n in names])
    _bars(axes[0], [one.causes() for one in losses], COLORS)
    axes[0].plot(
        [one.lost for one in losses], range(len(losses)), "D", color="white",
        markeredgecolor="black", markersize=3.5, markeredgewidth=0.7, linestyle="none",
    )  # fmt: skip
    axes[0].set_xlabel("lost Dice")
    axes[0].set_title("cause")
    _matrix(axes[1], losses, others)
    if parts:
        _head_or_body(axes[2], losses, parts)
    style.letters([*axes])
    key = [
        Patch(facecolor=color, hatch=hatch, edgecolor="white", label=cause)
        for cause, (color, hatch) in COLORS.items()
    ]
    style.frame(
        figure,
        not record.patients,
        f"{title_of(record).split(' on the ')[0]}: {record.strategy}, seed {record.seed}, "
        f"where the Dice lost by step {last} went",
        "a: Dice after the structure's own step minus Dice after the later step, mean over test "
        "cases (diamond), divided by cause; the bars add up to it. b: of the true voxels that were "
        "right before, what is predicted there now, in % of the truth (below 0.5 % not shown)."
        + (
            " c: the loss divided between head (H) and body (B) of the model; circle: what a "
            "linear probe of the body loses."
            if parts
            else ""
        ),
        key,
    )
    return figure


def _bars(
    ax: Axes, rows: Sequence[Mapping[str, float]], looks: Mapping[str, tuple[str, str]]
) -> None:
    """Stacked bars: losses to the right, gains to the left."""
    for y, row in enumerate(rows):
        ends = {1: 0.0, -1: 0.0}
        for name, (color, hatch) in looks.items():
            value = row[name]
            side = 1 if value > 0 else -1
            ax.barh(y, value, left=ends[side], height=0.72, color=color, hatch=hatch,
                    edgecolor="white", linewidth=0)  # fmt: skip
            ends[side] += value
    ax.axvline(0, color="black", linewidth=0.6)


def _others(losses: Sequence[LostDice]) -> list[str]:
    """Columns of the matrix: background, then the structures that took most, then the rest.

    Structures that took nowhere as much as is written have no column.
    """
    total: dict[str, int] = {}
    for one in losses:
        for other, voxels in one.to.items():
            if voxels >= SMALLEST * one.truth_vox:
                total[other] = total.get(other, 0) + voxels
    named = sorted((o for o in total if o != BACKGROUND), key=lambda o: -total[o])
    shown = named if len(named) < WIDEST else [*named[: WIDEST - 2], REST]
    return [BACKGROUND, *shown]


def _other(name: str) -> str:
    return name if name in (BACKGROUND, REST) else style.name_of(name)


def _matrix(ax: Axes, losses: Sequence[LostDice], others: Sequence[str]) -> None:
    shares = np.zeros((len(losses), len(others)))
    for i, one in enumerate(losses):
        for other, voxels in one.to.items():
            column = other if other in others else REST
            if column in others:
                shares[i, others.index(column)] += voxels / one.truth_vox
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto").set_clip_path(None)
    for i, j in zip(*np.nonzero(shares >= SMALLEST), strict=True):
        ax.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center_baseline", fontsize=5.6,
                color="white" if shares[i, j] > 0.5 else "black")  # fmt: skip
    ax.set_xticks(range(len(others)), [_other(o) for o in others], rotation=90)
    ax.tick_params(length=0)
    ax.set_title("called now, %")


def _head_or_body(ax: Axes, losses: Sequence[LostDice], parts: Sequence[HeadBody]) -> None:
    by_name = {one.structure: one for one in parts}
    for y, one in enumerate(losses):
        part = by_name.get(one.structure)
        if part is None:
            continue
        for value, at, letter, color in (
            (part.head, y - 0.2, "H", "#CC79A7"),
            (part.body, y + 0.2, "B", "#5f5f5f"),
        ):
            if not abs(value) >= SMALLEST:  # nor nan
                continue
            ax.barh(at, value, height=0.36, color=color)
            ax.text(max(value, 0), at, f" {letter}", va="center_baseline", fontsize=4.6)
        if not np.isnan(part.probe_lost):
            ax.plot([part.probe_lost], [y], "o", color="white", markeredgecolor="black",
                    markersize=3.5, markeredgewidth=0.7)  # fmt: skip
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_xlabel("lost Dice")
    ax.set_title("head or body")


def before_after_strip(
    record: RunRecord, shown: Sequence[BeforeAfter], structures: Sequence[str], step: int
) -> Figure:
    """CT, truth, before, after, and what was lost; a row per case.

    Args:
        record: of the run.
        shown: the cases.
        structures: the old structures, in course order; the order numbers them.
        step: the later step.
    """
    colors = palette(structures)
    heads = ("", "truth", "after own step", f"after step {step}", "right before, missed now")
    side = style.PAGE_IN / len(heads)
    tall = max(aspect(one.volume) for one in shown)
    figure = style.new(style.PAGE_IN, 0.35 + len(shown) * (side * tall + 0.17))
    axes = figure.subplots(len(shown), len(heads), squeeze=False)
    drawn: set[str] = set()
    for row, one in zip(axes, shown, strict=True):
        name = f"{one.volume.source} {one.volume.case}: {one.word} (lost {one.lost:.2f})"
        panels: list[Masks] = [{}, one.truth, one.before, one.after, one.missed]
        for j, (ax, head, masks) in enumerate(zip(row, heads, panels, strict=True)):
            ax.set_axis_off()
            dice = slice_dice(masks, one.truth) if j in (2, 3) else None
            panel(ax, one.image, one.volume, masks, colors, dice)
            ax.set_title(head or name, fontsize=6.5, pad=2)
            drawn |= {c for c, mask in masks.items() if mask.any()}
    low, high = shown[0].volume.window_hu
    style.frame(
        figure,
        not record.patients,
        f"{title_of(record).split(' on the ')[0]}: {record.strategy}, seed {record.seed}, old "
        f"structures before and after step {step}",
        "Cases: per data set the median (lower middle) and the worst by the mean Dice that old "
        "structures lost (in brackets). Slice: most structures with voxels that were right after "
        "their own step and are missed now, then most such voxels; the same of the truth where "
        "nothing was lost. Numbers: the structure; below: mean Dice within the slice. Front is up, "
        f"the patient's right on the left; window {low:g} to {high:g} HU; the CT's own grid.",
        legend(colors, drawn),
    )
    return figure
