"""How figures look: sizes of a journal column, colors safe for the color-blind, equal bytes.

A strategy is told by color, marker and line, or by the filling of its marker where there is no
line; no two of forty share marker and line, or marker and filling, so that a figure survives a gray
print.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from clbench.report.figures.wrapping import FONT, more_lines_in, width_in, wrapped
from clbench.report.scores import PHANTOM, StrategyScores
from clbench.spec.taxonomy import structure as taxon
from clbench.statistics.intervals import Interval

Fill = Literal["full", "none", "left", "bottom", "top"]
COLUMN_IN, PAGE_IN = 3.54, 7.48
"""Width of one and of two columns (90 and 190 mm)."""
DPI = 300
"""Of the PNG."""
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette for the color-blind, without yellow (too faint on white) and black (the
reference)."""
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (7, 2)))
_FILLS: tuple[Fill, ...] = ("full", "none", "left", "bottom", "top")
"""Which part of a marker is filled, the rest is white; one for each line."""
GRAY = "#5f5f5f"
TITLE_PT, LABEL_PT, TICK_PT = 7.5, 7, 6.5
"""Font size of the title of a panel, of an axis, and of what stands along it."""
_HEAD_PT, _KEY_PT = 8, 6.5
_SMALL_PT = 5.8
_RC: dict[Any, Any] = {
    "font.family": FONT, "font.size": 7, "axes.titlesize": TITLE_PT,
    "axes.labelsize": LABEL_PT, "xtick.labelsize": TICK_PT, "ytick.labelsize": TICK_PT,
    "legend.fontsize": _KEY_PT, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "lines.linewidth": 1.1, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42, "hatch.linewidth": 0.5,
    "svg.hashsalt": "clbench", "svg.fonttype": "path", "figure.constrained_layout.use": True,
    "savefig.facecolor": "white", "axes.grid": False, "axes.titlelocation": "left",
    "hatch.color": "#9a9a9a", "axes.titley": 1.0,  # no search for tick labels above the panel
    "text.parse_math": False,  # a label may hold `$`, as the options of a strategy do
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    """How one strategy is drawn."""

    color: str
    marker: str
    dash: Any
    fill: Fill

    def line(self) -> dict[str, Any]:
        """Keywords of a line with markers."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash}

    def point(self) -> dict[str, Any]:
        """Keywords of a marker without a line."""
        hollow = self.fill == "none"  # of white, else what lies below would be seen through it
        return {
            "color": self.color, "marker": self.marker, "linestyle": "none",
            "fillstyle": "full" if hollow else self.fill,
            "markerfacecolor": "white" if hollow else self.color,
            "markerfacecoloralt": "white", "markeredgecolor": self.color, "markeredgewidth": 0.7,
        }  # fmt: skip


def pens(names: Sequence[str]) -> dict[str, Pen]:
    """A pen per strategy; the first is the reference: black, round, solid, filled.

    Variants of one method share a color (`lwf`, `lwf_ct`); marker and line, or marker and filling,
    tell them apart, and methods that come after the colors are used up. Eight markers and five
    lines and fillings go round at once, so that forty pairs of them pass before one comes again.
    """
    colors: dict[str, str] = {}
    drawn = {names[0]: Pen(color="#000000", marker="o", dash="-", fill="full")}
    for count, name in enumerate(names[1:]):
        drawn[name] = Pen(
            color=colors.setdefault(family_of(name), _COLORS[len(colors) % len(_COLORS)]),
            marker=_MARKERS[count % len(_MARKERS)],
            dash=_DASHES[(count + 1) % len(_DASHES)],
            fill=_FILLS[count % len(_FILLS)],
        )
    return drawn


def family_of(name: str) -> str:
    """The method that a strategy is a variant of: `lwf` of `lwf_ct` and of `lwf (alpha=2)`."""
    method = re.match(r"(?:softmax_)?[^\W_]+", name)
    return method[0].removeprefix("softmax_") if method else name


def ranks_shown(count: int) -> range:
    """Ranks from 1 that are written along an axis: at most twelve, evenly spaced."""
    return range(1, count + 1, math.ceil(count / 12))


@contextmanager
def look() -> Iterator[None]:
    """The settings above, for the figures made inside."""
    with mpl.rc_context(_RC):
        yield


def new(width_in: float, height_in: float) -> Figure:
    """An empty figure; no global state, no window."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as `pdf`, `png` or `svg`, without date and software."""
    out = io.BytesIO()
    metadata: dict[str, Any] = {
        "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }[kind]
    with look():
        _settle(figure)
        if kind == "svg":  # `savefig` would draw twice, once for a layout that is settled
            figure.set_dpi(DPI)
            FigureCanvasSVG(figure).print_svg(out, metadata=metadata)  # type: ignore[no-untyped-call]
        else:
            figure.savefig(out, format=kind, dpi=DPI, metadata=metadata)
    return out.getvalue()


def _settle(figure: Figure) -> None:
    """Lay the panels out once and round their places.

    The solver's last digits depend on the order of its equations in memory, and the names of clip
    paths on every digit.
    """
    engine = figure.get_layout_engine()
    if engine is None:
        return
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if not axis.get_label_text():  # else the place of the empty text is searched each time
                axis.set_label_coords(0, 0)
    engine.execute(figure)
    figure.set_layout_engine("none")
    for ax in figure.axes:
        x, y, width, height = (round(v, 5) for v in ax.get_position(original=True).bounds)
        ax.set_position((x, y, width, height))


def name_of(structure: str) -> str:
    """A structure in words."""
    return taxon(structure).prompt.capitalize().replace(
        "Portal vein and splenic vein", "Portal & splenic vein"
    )  # fmt: skip


def key(pens_: Mapping[str, Pen], *, lines: bool) -> list[Line2D]:
    """Legend entries of some strategies."""
    return [
        Line2D([], [], label=name, linewidth=1.1, **{"markersize": 4, **p.line()} if lines
               else {"markersize": 4.6, **p.point()})
        for name, p in pens_.items()
    ]  # fmt: skip


def frame(
    figure: Figure, phantom: bool, subject: str, small: str, entries: Sequence[Artist] = ()
) -> None:
    """Title above; legend and small print (definitions, n, what is missing) below.

    The figure grows by what stands below, so that the panels keep their size.

    Args:
        figure: to write on; its size changes.
        phantom: whether the data are the phantom, not patients; the title says so.
        subject: the title.
        small: small print; newlines part lines.
        entries: artists of the legend, with their labels.
    """
    width, height = figure.get_size_inches()
    lines = [part for line in small.split("\n") for part in wrap(line, int(width * 23))]
    print_in = len(lines) * _SMALL_PT * 1.25 / 72 + 0.08
    longest = max((len(str(e.get_label())) for e in entries), default=0)
    across = max(1, min(len(entries), int(width * 14 / (longest + 6))))
    legend_in = math.ceil(len(entries) / across) * 0.135 + 0.06 if entries else 0.0
    title = subject + (f"\n{PHANTOM}" if phantom else "")
    head = wrapped(title, width - 0.15, _HEAD_PT, "bold")
    more_in = more_lines_in([head], _HEAD_PT) - more_lines_in([title], _HEAD_PT)
    height += print_in + legend_in + more_in
    figure.set_size_inches(width, height)
    figure.suptitle(head, x=0.01, ha="left", fontsize=_HEAD_PT, fontweight="bold")
    figure.text(0.01, 0.03 / height, "\n".join(lines), fontsize=_SMALL_PT, color=GRAY, va="bottom",
                linespacing=1.25)  # fmt: skip
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)  # noqa: S101  # `new` made it
    share = (print_in + legend_in) / height
    engine.set(rect=(0, share, 1, 1 - share))
    if entries:
        widest = max(width_in(str(e.get_label()), _KEY_PT) for e in entries)
        legend = figure.legend(
            fontsize=_KEY_PT * min(1.0, (width / across - 0.6) / widest) if widest else _KEY_PT,
            handles=list(entries), loc="lower center", bbox_to_anchor=(0.5, print_in / height),
            ncols=across, handlelength=2.6, columnspacing=1.0, borderaxespad=0, borderpad=0.2,
            labelspacing=0.3,
        )  # fmt: skip
        legend.set_in_layout(False)


def panels(
    figure: Figure, count: int, across: int, **shared: Any
) -> tuple[NDArray[Any], list[tuple[Axes, bool, bool]]]:
    """So many panels, in rows; what is left of the last row stays empty.

    Args:
        figure: to draw in.
        count: panels.
        across: in a row.
        shared: axes, as `Figure.subplots` takes them.

    Returns:
        All axes; and of each panel its axes, whether it is the first of its row, and whether it is
        the lowest of its column.
    """
    axes = figure.subplots(math.ceil(count / across), across, squeeze=False, **shared)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return axes, [
        (ax, i % across == 0, i + across >= count) for i, ax in enumerate(axes.flat[:count])
    ]


def grid(ax: Axes, axis: Literal["both", "x", "y"]) -> None:
    """Thin lines behind the data.

    Args:
        ax: the panel.
        axis: across which of its axes.
    """
    ax.grid(True, axis=axis, linewidth=0.3, color="#d9d9d9")
    ax.set_axisbelow(True)


def over(methods: Sequence[StrategyScores]) -> str:
    """What intervals of strategies go over, in words: seeds only where there are several.

    Args:
        methods: those that are drawn.
    """
    alone = [m.label for m in methods if len(m.seeds) == 1]
    if not alone:
        return "patients and seeds"
    if len(alone) == len(methods):
        return "patients, of one training run each"
    return f"patients and seeds; of {', '.join(alone)}, one seed, over patients"


def averaged(methods: Sequence[StrategyScores]) -> str:
    """What a caption says of the training runs behind one number of a patient.

    Args:
        methods: those that are drawn.
    """
    return "1 seed" if max(len(m.seeds) for m in methods) == 1 else "seeds averaged"


def reach(interval: Interval) -> list[list[float]]:
    """How far an interval goes below and above its estimate, as error bars; 0 where it has none."""
    ends = (interval.estimate - interval.low, interval.high - interval.estimate)
    return [[0.0 if math.isnan(end) else max(0.0, end)] for end in ends]


def error_bars(
    ax: Axes,
    at: Sequence[tuple[float, float]],
    colors: Sequence[str],
    *,
    x: Sequence[Interval] = (),
    y: Sequence[Interval] = (),
    alpha: float | None = None,
) -> None:
    """Intervals of many points as bars with caps: an artist per direction, not several per point.

    Args:
        ax: the panel.
        at: (x, y) of each point.
        colors: of each point.
        x: interval of each point along x; empty: none is drawn.
        y: the same along y.
        alpha: opacity.
    """
    for axis, intervals in enumerate((x, y)):
        if not intervals:
            continue
        ends = np.repeat(np.array(at, dtype=float)[:, None], 2, axis=1)
        ends[:, :, axis] += [(-below, above) for (below,), (above,) in map(reach, intervals)]
        ax.add_collection(
            LineCollection(list(ends), colors=colors, linewidths=0.8, alpha=alpha, zorder=2)
        )
        across, up = ends.reshape(-1, 2).T
        ax.scatter(
            across, up, s=3**2, marker="|_"[axis], c=np.repeat(colors, 2),
            linewidths=1.0, alpha=alpha, zorder=2,
        )  # fmt: skip


def rules_between_steps(
    ax: Axes, structures: Sequence[str], learned_at: Mapping[str, int], **line: Any
) -> None:
    """A line above the first structure of each further step.

    Args:
        ax: the panel, a row per structure.
        structures: top to bottom.
        learned_at: structure → step.
        line: how it looks.
    """
    for row, (before, after) in enumerate(pairwise(structures)):
        if learned_at[before] != learned_at[after]:
            ax.axhline(row + 0.5, **line)


def letters(axes: Sequence[Axes]) -> None:
    """a, b, c … on several panels."""
    for ax, letter in zip(axes, "abcdefghijklmnop", strict=False):
        ax.set_title(f"{letter}  {ax.get_title(loc='left')}", loc="left")
