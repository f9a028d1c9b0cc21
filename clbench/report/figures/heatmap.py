"""The whole result in one figure: every structure after every step, and how it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import TransformedPatchPath

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, width_in, wrapped
from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.analysis import Analysis

ACROSS = 5
"""Strategies side by side."""
CELL_IN, ROW_IN = 0.30, 0.165
NARROWEST_CELL_IN = 0.2
"""A number of three characters fits."""
BARS_IN = 0.75
"""Width of the two color bars."""
_Cell = tuple[float, int, float, str]
"""x, row, value and what is written: one colored square."""
_CORNERS = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])


def heatmap(study: Analysis) -> Figure:
    """R[step, structure] and R[last] - R[own step] per strategy; hatched: a hole, blank: N/A."""
    e = study.dice
    structures = sorted(e.learned_at, key=lambda c: e.learned_at[c])
    columns = e.last + 1
    names_in = max(1.35, max(width_in(style.name_of(c), style.TICK_PT) for c in structures) + 0.1)
    room_in = style.PAGE_IN - names_in - BARS_IN
    most = max(1, int(room_in / (columns * NARROWEST_CELL_IN + 0.12)))
    across = min(ACROSS, len(e.strategies), most)
    down = math.ceil(len(e.strategies) / across)
    panel_in = columns * CELL_IN + 0.12
    if across > 1:
        panel_in = min(panel_in, room_in / across)
    titles = [wrapped(_title(m), panel_in - 0.12, style.TITLE_PT) for m in e.strategies]
    figure = style.new(
        max(style.COLUMN_IN, names_in + across * panel_in + BARS_IN),
        0.6 + down * (len(structures) * ROW_IN + 0.55 + more_lines_in(titles, style.TITLE_PT)),
    )
    axes, panels = style.panels(figure, len(e.strategies), across)
    score, change = mpl.colormaps["cividis"], mpl.colormaps["RdBu"]
    to_score, to_change = Normalize(0, 1), Normalize(-0.5, 0.5)
    for (ax, first, _), m, title in zip(panels, e.strategies, titles, strict=True):
        ax.set_title(title)
        _panel(ax, e, m, structures, (score, to_score), (change, to_change))
        ax.set_yticks([])
        if first:
            ax.set_yticks(range(len(structures)), [style.name_of(c) for c in structures])
    for color, norm, label in ((score, to_score, "Dice"), (change, to_change, "change")):
        bar = figure.colorbar(
            ScalarMappable(norm, color), ax=axes[:, -1].tolist(), aspect=22,
            shrink=0.6 if down == 1 else 0.35, pad=0.05,
            extend="both" if label == "change" else "neither",
        )  # fmt: skip
        bar.set_label(label)
        bar.outline.set_linewidth(0.4)
    over = "seeds and cases" if any(len(m.seeds) > 1 for m in e.strategies) else "cases"
    style.frame(
        figure,
        e.phantom,
        f"{e.heading}: {e.scoring} Dice after each step, mean over {over}",
        "Δ: after the last step minus after the structure's own step. "
        + (
            f"Framed: the step that teaches it from {e.on}; before it, what other domains taught. "
            if e.on in e.domains
            else "Blank: not taught yet. "
        )
        + "Hatched: a hole (runs or cases are missing).",
    )
    return figure


def _panel(
    ax: Axes,
    e: Scores,
    method: StrategyScores,
    structures: list[str],
    score: tuple[Colormap, Normalize],
    change: tuple[Colormap, Normalize],
) -> None:
    scores: list[_Cell] = []
    changes: list[_Cell] = []
    for row, c in enumerate(structures):
        own = e.learned_at[c]
        values = [mean_of(e, method, t, c) for t in range(1, e.last + 1)]
        for t, value in enumerate(values, 1):
            if t >= own or not math.isnan(value):
                scores.append((t - 1, row, value, f"{value:.2f}".lstrip("0") or "0"))
        if own < e.last:
            d = values[-1] - values[own - 1]
            text = ".00" if abs(d) < 0.005 else f"{d:+.2f}".replace("0.", ".").replace("-", "−")
            changes.append((e.last + 0.12, row, d, text))
    _cells(ax, scores, *score)
    if e.on in e.domains:
        for row, c in enumerate(structures):
            ax.add_artist(Rectangle((e.learned_at[c] - 1.5, row - 0.5), 1, 1, fill=False,
                                    edgecolor="black", linewidth=1.0, zorder=4))  # fmt: skip
    _cells(ax, changes, *change)
    ax.set_xlim(-0.5, e.last + 0.62)
    ax.set_ylim(len(structures) - 0.5, -0.5)
    ax.set_xticks([*range(e.last), e.last + 0.12], [*(f"S{t}" for t in range(1, e.last + 1)), "Δ"])
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    style.rules_between_steps(ax, structures, e.learned_at, color="black", linewidth=0.7)


def _title(method: StrategyScores) -> str:
    return method.label + ("" if len(method.seeds) > 1 else " (1 seed)")


def mean_of(e: Scores, method: StrategyScores, step: int, structure: str) -> float:
    """R of one cell over all seeds and patients; NaN for a hole.

    Args:
        e: the runs of a benchmark.
        method: one strategy of it.
        step: 1-based step after which it was examined.
        structure: canonical name, on the test cases of the source that taught it.
    """
    cells = method.cells.get((step, e.home(structure), structure))
    if cells is None or cells.hole or np.isnan(cells.values).all():
        return math.nan
    return float(np.nanmean(cells.values))


def _cells(ax: Axes, cells: Sequence[_Cell], colors: Colormap, norm: Normalize) -> None:
    # `add_artist`: the limits are set by hand; a number lies within its cell, so that the layout
    # need not ask how large it is. One collection and one clip path: an artist of its own per cell
    # took half of the drawing time.
    known = [cell for cell in cells if not math.isnan(cell[2])]
    for x, y, value, _ in cells:
        if math.isnan(value):
            ax.add_artist(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white",
                                    edgecolor="#9a9a9a", hatch="////", linewidth=0))  # fmt: skip
    if not known:
        return
    faces = colors(norm(np.array([value for _, _, value, _ in known])))
    squares = np.array([(x, y) for x, y, _, _ in known])[:, None] + _CORNERS
    ax.add_artist(
        PolyCollection(squares, facecolors=faces, edgecolors="white", linewidths=0.4,
                       joinstyle="miter")
    )  # fmt: skip
    clip = TransformedPatchPath(ax.patch)
    dark = faces[:, :3] @ (0.299, 0.587, 0.114) < 0.5
    for (x, y, _, text), light_text in zip(known, dark, strict=True):
        number = ax.text(
            x, y, text, ha="center", va="center_baseline", fontsize=5.6,
            color="white" if light_text else "black", clip_path=clip,
        )  # fmt: skip
        number.set_in_layout(False)
