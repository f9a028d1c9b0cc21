"""Rankings: average ranks, bars over those not told apart, and how stable the order is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from clbench.report.figures import style
from clbench.report.figures.wrapping import more_lines_in, wrapped
from clbench.report.scores import Scores
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.ranking import SetRanking
from clbench.report.significance.sentences import p_text
from clbench.statistics.ranking import Comparison as Ranking

WIDTH_IN = 5.2
"""Of the diagram of average ranks."""
NAME_IN = 1.1
"""Widest line of a strategy's name."""
IN_ONE_COLUMN = 8
"""Strategies whose ranks fit into one column."""
BLOB_IN = 0.24
"""Diameter of a blob of 100 %."""
NUMBER_PT = 11
"""Distance of ranks that holds the number of a blob."""
PALE = 0.35
"""Share of its color within a blob; the rest is white."""
LINE_IN = 0.17
"""Distance of names with one line each."""


def critical_difference(study: Analysis) -> Figure:
    """Average ranks over the patients of each eval set.

    Bars join what the test of all pairs cannot tell apart; there is none where it tests no pair.

    Source: Demšar 2006 for the form; Benavoli et al. 2016 for pairwise tests instead of Nemenyi's.
    """
    e = study.dice
    shown = [r for r in study.rankings if r.pairs is not None and len(r.names) > 1]
    study.need(shown, *_needed("a ranking", e))
    k = max(len(r.names) for r in shown)
    rows = (k + 1) // 2
    bars = max(len(_bars(r.pairs)) for r in shown if r.pairs)
    names = {n: wrapped(n, NAME_IN, style.TICK_PT) for r in shown for n in r.names}
    alpha = study.protocol.alpha
    titles = [wrapped(_title(r, alpha), WIDTH_IN - 0.3, style.TITLE_PT) for r in shown]
    line = 1 + more_lines_in(names.values(), style.TICK_PT) / LINE_IN
    more_in = more_lines_in(titles, style.TITLE_PT)
    height = 0.62 + LINE_IN * line * rows + 0.09 * bars + more_in
    figure = style.new(WIDTH_IN, 0.35 + len(shown) * height)
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for ax, ranking, head in zip(axes, shown, titles, strict=True):
        _diagram(ax, ranking, names, line)
        ax.set_title(head)
    ranked = [m for m in e.strategies if any(m.label in r.names for r in shown)]
    caption = f"Blocks are patients (mean of their structures, {style.averaged(ranked)})."
    if any(r.pairs.m for r in shown if r.pairs):
        caption += (
            " Bars: no pair within is told apart "
            f"({study.protocol.ranked_by}, alpha {study.protocol.alpha:g})."
        )
    if shown[0].left_out:
        caption += "\nLeft out: " + "; ".join(shown[0].left_out) + "."
    style.frame(
        figure, e.phantom, f"{e.bench}: average rank after the last step (1 is best)", caption
    )
    return figure


def _title(ranking: SetRanking, alpha: float) -> str:
    test = ranking.friedman
    chance = ""
    if test is not None:
        chance = f"; Friedman p {p_text(test.p, alpha)}, Kendall W {test.kendall_w:.2f}"
    if ranking.pairs is not None and not ranking.pairs.m:
        chance += "; too few patients to test"
    return f"{ranking.eval_set}: {ranking.n} patients as blocks{chance}"


def _bars(pairs: Ranking) -> list[tuple[str, ...]]:
    """Strategies under one bar each; none where no pair could be tested."""
    return [c for c in pairs.cliques if len(c) > 1] if pairs.m else []


def _diagram(ax: Axes, ranking: SetRanking, wrapped_names: Mapping[str, str], line: float) -> None:
    """Draw the axis of ranks, the names, and the bars.

    Args:
        ax: where.
        ranking: of one eval set.
        wrapped_names: strategy → its name in lines.
        line: height of a name, in lines.
    """
    pairs = ranking.pairs
    assert pairs is not None  # noqa: S101  # for the type checker: the caller chose such
    names, ranks, k = list(pairs.names), pairs.average_ranks, len(pairs.names)
    half = (k + 1) // 2
    step = line
    bars = _bars(pairs)
    top = 0.55 * len(bars) + 0.5
    ax.plot([1, k], [0, 0], color="black", linewidth=0.8)
    ax.vlines(range(1, k + 1), 0, 0.22, color="black", linewidth=0.8, capstyle="projecting")
    for tick in style.ranks_shown(k):
        ax.text(tick, 0.4, str(tick), ha="center", va="bottom", fontsize=6.5)
    reach = (k - 1) * 0.06 + 0.1
    leads = []
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        left = i < half
        y = -top - step * (i if left else k - 1 - i)
        x = 1 - reach if left else k + reach
        leads.append([(rank, 0), (rank, y), (x, y)])
        text = wrapped_names[name]
        label = f"{text}  {rank:.2f}" if left else f"{rank:.2f}  {text}"
        ax.text(x + (-0.02 if left else 0.02) * k, y, label, ha="right" if left else "left",
                va="center", fontsize=6.5)  # fmt: skip
    ax.add_artist(LineCollection(leads, colors="black", linewidths=0.6, joinstyle="miter",
                                 capstyle="projecting"))  # fmt: skip
    ax.plot(ranks, np.zeros(k), "o", color="black", markersize=2.6, clip_on=False)
    at = dict(zip(names, ranks, strict=True))
    for j, clique in enumerate(bars):
        inside = [at[n] for n in clique]
        y = -0.42 - 0.55 * j
        pad = 0.02 * k
        ax.plot([min(inside) - pad, max(inside) + pad], [y, y], color="black", linewidth=2.6,
                solid_capstyle="butt")  # fmt: skip
    ax.set_xlim(1 - reach - 0.42 * k, k + reach + 0.42 * k)
    ax.set_ylim(-top - step * half + 0.3, 1.15)
    ax.set_axis_off()


def _needed(what: str, e: Scores, least: str = "two strategies") -> tuple[str, str]:
    """The words of the error where too few strategies can be ranked, and what helps.

    Args:
        what: the figure.
        e: the runs.
        least: how many strategies it needs.
    """
    holes = e.holes()
    told = f" ({'; '.join(holes[:2])}{'; …' if holes[2:] else ''})" if holes else ""
    next_step = (
        "finish incomplete runs, and where no test case holds a structure, name test cases that do "
        "with --split"
    )
    return f"{what} needs {least} without holes{told}", next_step


def rank_stability(study: Analysis) -> Figure:
    """Share of resamples in which each strategy takes each rank: the area of a blob."""
    e = study.dice
    ranked = study.stable.stability
    study.need(ranked, *_needed("rank stability", e))
    assert ranked is not None  # noqa: S101  # for the type checker: need() refused it
    order = np.argsort(ranked.full_ranks, kind="stable")
    k = len(order)
    labels = [wrapped(ranked.names[i], NAME_IN, style.TICK_PT) for i in order]
    row_in = max(0.27, 0.12 + more_lines_in(labels, style.TICK_PT))
    width_in = style.COLUMN_IN if k <= IN_ONE_COLUMN else style.PAGE_IN
    figure = style.new(width_in, 0.85 + row_in * k)
    ax = figure.subplots()
    pens = style.pens([m.label for m in e.strategies])
    cell_pt = min(BLOB_IN, 0.9 * (width_in - NAME_IN - 0.3) / k) * 72
    blobs = []
    for y, i in enumerate(order):
        color = pens[ranked.names[i]].color
        for rank, share in enumerate(ranked.rank_share[i], 1):
            if share < 0.005:
                continue
            blobs.append((rank, y, share * cell_pt**2, color))
            if share >= 0.095 and cell_pt >= NUMBER_PT:
                ax.text(rank, y, f"{100 * share:.0f}", ha="center", va="center_baseline",
                        fontsize=5.6)  # fmt: skip
    xs, ys, areas, colors = zip(*blobs, strict=True)
    # pale within, for the numbers are wider than small blobs and must be read on every color
    pale = 1 - PALE * (1 - to_rgba_array(colors)[:, :3])
    ax.scatter(xs, ys, s=areas, c=pale, edgecolors=colors, linewidth=0.8)
    ax.scatter(ranked.full_ranks[order], range(k), s=(1.12 * cell_pt) ** 2, facecolors="none",
               edgecolors="black", linewidth=0.7)  # fmt: skip
    ax.set_yticks(range(k), labels)
    ax.set_xticks(style.ranks_shown(k))
    ax.set_xlim(0.5, k + 0.5)
    ax.set_ylim(k - 0.5, -0.5)
    ax.set_xlabel("rank after the last step (1 is best)")
    style.grid(ax, "x")
    tau = f"{ranked.kendall_tau:.2f}" if not np.isnan(ranked.kendall_tau) else "n/a"
    style.frame(
        figure,
        e.phantom,
        f"{e.bench}: how stable is the ranking?",
        f"Blobs: % of {ranked.draws} resamples of {ranked.n} patients and {ranked.n_seeds} seed"
        f"{'s' if ranked.n_seeds > 1 else ''}. Ring: rank from all of them. Mean Kendall tau {tau}."
        + "".join(f" Left out: {why}." for why in study.stable.left_out),
    )
    return figure


def external(study: Analysis) -> Figure:
    """A panel per external test set: each strategy from its internal to its external mean."""
    e = study.dice
    study.need(
        e.external,
        "the course has no external test sets",
        "name sources that are only tested on in `[[external]]` of a course file",
    )
    found = study.external_rankings
    pens = style.pens([m.label for m in e.strategies])
    width = min(style.PAGE_IN, style.COLUMN_IN * len(found))
    figure = style.new(width, 2.9)
    _, panels = style.panels(figure, len(found), len(found), sharey=True)
    for (ax, first, _), one in zip(panels, found, strict=True):
        shown = {k for p in one.shown(study.protocol.alpha) for k in (p.first, p.second)}
        for k, (label, a, b) in enumerate(zip(one.labels, one.internal, one.external, strict=True)):
            ax.plot([0, 1], [a, b], linewidth=1.7 if k in shown else 0.9, markersize=4,
                    **pens[label].line())  # fmt: skip
        ax.set_xlim(-0.2, 1.2)
        ax.set_xticks([0, 1], ["internal", one.eval_set])
        n_in, n_out = one.patients
        tau = one.reversals.kendall_tau
        said = "" if np.isnan(tau) else f", tau {tau:+.2f}"
        ax.set_title(f"{n_in} and {n_out} patients{said}", fontsize=6.5)
        style.grid(ax, "y")
        if first:
            ax.set_ylabel("Dice after the last step")
    drawn = [m for m in e.strategies if any(m.label in one.labels for one in found)]
    study.need(drawn, *_needed("the figure of external test sets", e, least="a strategy"))
    over = "1 seed" if max(len(m.seeds) for m in drawn) == 1 else "mean over seeds"
    caption = (
        f"Mean over the structures that the external test set annotates; {over}. Lines that "
        "cross: pairs in another order (Kendall's tau); thick: a reversal is shown "
        f"(p ≤ {study.protocol.alpha:g}, all pairs on both test sets tested together)."
    )
    if missing := [m.label for m in e.strategies if any(m.label not in x.labels for x in found)]:
        caption += f" Not everywhere, because scores are missing: {', '.join(missing)}."
    style.frame(figure, e.phantom, f"{e.bench}: internal and external test sets", caption,
                style.key({m.label: pens[m.label] for m in drawn}, lines=True))  # fmt: skip
    return figure
