"""Figures: what they show is what the runs say; equal runs give equal bytes; holes are words."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from nifti_files import packed, put
from synthetic_runs import THREE_STEPS, Method, add_external, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.volume import Volume, preprocess
from clbench.errors import ClbenchError, StoreError, UnknownName
from clbench.evaluation.predictions import write_prediction
from clbench.evaluation.scoring import native_rows
from clbench.report import figures as figures_room
from clbench.report import scores as scores_room
from clbench.report.figures import FIGURES, StripOptions, draw, save, style
from clbench.report.figures import strip as strip_room
from clbench.report.figures.heatmap import mean_of
from clbench.report.figures.paired import per_patient
from clbench.report.figures.slices import areas, axial, best_slice, outline, slice_dice
from clbench.report.figures.strip import Shown, choose
from clbench.report.figures.style import pens
from clbench.report.figures.wrapping import width_in, wrapped
from clbench.report.scores import Run
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.tables import ranking_table
from clbench.report.study import Protocol
from clbench.report.tables.costs import read_costs
from clbench.spec.benchmark import Preprocessing, Source
from clbench.store import run_folder

METHODS = {
    "universal": Method(kept=-0.02),
    "finetune": Method(kept=-0.5),
    "joint": Method(own_step1=True),
    "mib": Method(kept=-0.1, drop=[(2, "btcv/103")]),
}
# what has no runs or volumes of its own in `runs`: drawn below
MADE = sorted(set(FIGURES) - {"cost", "strip", "external"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("figures")
    make_runs(results, METHODS, patients={"btcv": 6, "lits": 6})
    return results


@pytest.fixture(scope="module")
def study(runs: Path) -> Analysis:
    return Analysis(results=runs, bench="tumor_ext")


@pytest.mark.parametrize("name", MADE)
def test_every_figure_is_drawn_says_phantom_and_is_the_same_every_time(
    study: Analysis, runs: Path, name: str
) -> None:
    svg = draw(name, study)
    assert svg.startswith(b"<?xml")
    assert b"PHANTOM, not patients" in svg  # matplotlib writes each text beside its outline
    if name in ("forest", "rank-stability"):
        assert draw(name, study) == svg
    assert b"Date" not in svg.split(b"<defs")[0]


def test_vectors_and_pixels_are_saved_whole(study: Analysis, tmp_path: Path) -> None:
    pdf, png = save("plane", study, tmp_path / "out")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"CreationDate" not in pdf.read_bytes()
    first = pdf.read_bytes(), png.read_bytes()
    save("plane", study, tmp_path / "out")
    assert (pdf.read_bytes(), png.read_bytes()) == first


def test_a_gallery_holds_what_can_be_drawn_and_the_reason_for_the_rest(
    study: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.report import figures

    few = {name: FIGURES[name] for name in ("cost", "plane", "strip")}
    monkeypatch.setattr(figures, "FIGURES", few)
    pictures, absent = figures.gallery(study, "png")
    assert list(pictures) == ["plane"]
    assert pictures["plane"].startswith(b"\x89PNG")
    assert "clbench cost" in absent["cost"]
    assert "--keep-predictions" in absent["strip"]


def test_three_steps_and_one_seed(tmp_path: Path) -> None:
    make_runs(
        tmp_path, {"universal": Method(seeds=(0,)), "joint": Method(seeds=(0,), kept=-0.1)},
        bench="body_ext", steps=THREE_STEPS, patients=dict.fromkeys(("jhh_organ", "jhh_gastro", "jhh_cardiac"), 5),
        phantom=False,
    )  # fmt: skip
    study = Analysis(results=tmp_path, bench="body_ext")
    for name in ("heatmap", "forgetting", "patients"):
        svg = draw(name, study)
        assert b"PHANTOM" not in svg
    assert b"(1 seed)" in draw("heatmap", study)


def test_captions_name_seeds_only_where_there_are_several(tmp_path: Path) -> None:
    def said(name: str, methods: dict[str, Method]) -> str:
        out = tmp_path / "_".join(f"{k}{len(m.seeds)}" for k, m in methods.items())
        if not out.exists():
            for folder in make_runs(out, methods, patients={"btcv": 4, "lits": 4}):
                lines = ["step,forward_macs,parameters", "1,1e9,1e6", "2,2e9,2e6", ""]
                (folder / "cost.csv").write_text("\n".join(lines))
        svg = draw(name, Analysis(results=out, bench="tumor_ext")).decode()
        return " ".join(re.findall(r"<!-- (.*?) -->", svg))

    one, three = Method(seeds=(0,)), Method()
    for name in ("plane", "forgetting", "cost"):
        assert "95 % over patients and seeds (t)" in said(name, {"universal": three, "lwf": three})
        assert "over patients, of one training run each (t)" in said(
            name, {"universal": one, "lwf": one}
        )
        assert "over patients and seeds; of lwf, one seed, over patients (t)" in said(
            name, {"universal": three, "lwf": one}
        )


def test_the_heatmap_holds_the_numbers_of_the_tables(study: Analysis) -> None:
    for m in study.dice.strategies:
        for c, s in study.dice.learned_at.items():
            for t in range(s, 3):
                table = m.over_seeds(t, [c])[0]
                assert mean_of(study.dice, m, t, c) == pytest.approx(table, nan_ok=True)
    assert math.isnan(mean_of(study.dice, study.dice.strategies[-1], 2, "spleen"))  # the hole


def test_a_patients_line_by_hand(study: Analysis) -> None:
    m = study.dice.reference
    data = per_patient(study.dice, m)["btcv"]
    own = [np.nanmean([m.cells[1, "btcv", c].values[:, 0].mean() for c in
                       ("spleen", "right_kidney", "liver", "pancreas")])]  # fmt: skip
    assert data[0, 0] == pytest.approx(own[0])
    assert data.shape == (6, 2)  # the last patient lacks one structure, not its line
    assert not np.isnan(data).any()


def test_holes_are_named_not_drawn(study: Analysis) -> None:
    assert b"Not shown, because scores are missing: mib" in draw("forgetting", study)
    assert b"against mib: hole" in draw("forest", study)
    assert b"mib: spleen after step 2, seed 0: 1 of" in draw("critical-difference", study)
    assert b"hole:" in draw("patients", study)


MANY = [
    "universal",
    "universal_onehot",
    "universal_v1",
    "universal_mbs",
    "finetune",
    "softmax_finetune",
    "joint",
    "independent",
    "lwf",
    "lwf_ct",
    "ilt",
    "ilt_ct",
    "plop",
    "plop_ct",
    "mib",
    "mbs",
    "decoder_growth",
    "frozen",
    "frozen_softmax",
    "lora",
    "vista_finetune",
    "replay",
    "ewc",
    "der",
    "derpp",
    "agem",
    "mas",
    "universal+plop",
]
"""As many as there are reference runs of."""


def test_strategies_are_told_by_more_than_color() -> None:
    drawn = pens(MANY)
    # without any color, as in a gray print
    assert len({(p.marker, str(p.dash)) for p in drawn.values()}) == len(MANY) == 28
    assert drawn["universal"].color == "#000000"
    assert drawn["lwf"].color == drawn["lwf_ct"].color  # variants of one method
    assert drawn["finetune"].color == drawn["softmax_finetune"].color
    assert drawn["universal_v1"].color == drawn["universal_mbs"].color
    assert style.family_of("lwf (alpha=2)") == "lwf"


@pytest.mark.parametrize("names", [MANY, [f"m{chr(97 + i % 26)}{i}" for i in range(40)]])
def test_points_without_lines_are_told_by_marker_and_filling(names: list[str]) -> None:
    drawn = pens(names)
    assert len({(p.marker, p.fill) for p in drawn.values()}) == len(names)
    assert len({(p.marker, str(p.dash)) for p in drawn.values()}) == len(names)
    looks = {_look(Line2D([0], [0], **p.point())) for p in drawn.values()}
    assert len(looks) == len(names)


def _look(line: Line2D) -> tuple[object, ...]:
    """What a gray print shows of a marker: its form, and which part of it is white."""
    return line.get_marker(), line.get_fillstyle(), line.get_markerfacecolor() == "white"


@pytest.mark.parametrize("name", ["plane", "cost"])
def test_the_key_of_points_tells_all_strategies_apart(many: Analysis, name: str) -> None:
    with style.look():
        figure = figures_room._figure(name, many, None)
    entries = figure.legends[0].legend_handles
    assert len(entries) == len({_look(e) for e in entries if isinstance(e, Line2D)}) == len(MANY)
    points = [p for ax in figure.axes for p in ax.get_lines() if len(p.get_xdata()) == 1]
    assert {_look(p) for p in points} == {_look(e) for e in entries if isinstance(e, Line2D)}


def test_the_key_of_patients_shows_the_markers_that_are_drawn(tmp_path: Path) -> None:
    sets = ("jhh_organ", "jhh_gastro", "jhh_cardiac")
    make_runs(tmp_path, {"universal": Method(seeds=(0,))}, bench="body_ext", steps=THREE_STEPS,
              patients=dict.fromkeys(sets, 3))  # fmt: skip
    with style.look():
        study = Analysis(results=tmp_path, bench="body_ext")
        figure = figures_room._figure("patients", study, None)
    (ax, *_) = figure.axes
    points = [p for p in ax.get_lines() if p.get_linestyle() == "None"]
    entries = [e for e in figure.legends[0].legend_handles if isinstance(e, Line2D)]
    assert [_look(p) for p in points] == [_look(e) for e in entries]
    assert len({_look(p)[1:] for p in points}) == 2  # the last set teaches nothing old


def _linear(color: str) -> np.ndarray:
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                     for c in to_rgb(color)])  # fmt: skip


# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]]
)  # fmt: skip
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def _contrast(color: str, background: str = "white") -> float:
    """WCAG contrast, the lower one of normal vision and deuteranopia; the eye in gray sees it."""
    ratios = []
    for seen in (np.eye(3), DEUTERANOPIA):
        light, dark = sorted(
            (float(LUMINANCE @ (seen @ _linear(c)).clip(0, 1)) for c in (color, background)),
            reverse=True,
        )
        ratios.append((light + 0.05) / (dark + 0.05))
    return min(ratios)


def test_colors_stand_out_from_white_and_from_each_other_without_green() -> None:
    colors = dict.fromkeys(p.color for p in pens(MANY).values())
    assert all(_contrast(color) >= 2 for color in colors)
    for one, other in itertools.combinations(colors, 2):
        seen = [(DEUTERANOPIA @ _linear(c)).clip(0, 1) for c in (one, other)]
        assert np.abs(np.sqrt(seen[0]) - np.sqrt(seen[1])).max() > 0.1, (one, other)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    results = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    methods = {
        name: Method(kept=-0.8 if "finetune" in name else -0.05 * rng.random(), seeds=(0,),
                     new=0.2 * rng.random())
        for name in MANY
    }  # fmt: skip
    for folder in make_runs(results, methods, patients={"btcv": 7, "lits": 7}):
        (folder / "cost.csv").write_text("step,forward_macs,parameters\n1,1e9,2e6\n2,2e9,2e6\n")
    add_external(results, "clinic", ["spleen", "liver"], dict.fromkeys(methods, -0.05))
    protocol = Protocol(draws=200, rank_resamples=50)
    return Analysis(results=results, bench="tumor_ext", protocol=protocol)


@pytest.mark.parametrize(
    "name", [*MADE, "cost", "strip", "external", "heatmap-clinic", "forgetting-clinic"]
)
def test_no_text_lies_on_another_with_many_strategies(
    many: Analysis, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "strip":
        shown = choose(many.dice, 2)
        volumes = _volumes(tmp_path, shown)
        monkeypatch.setattr(strip_room, "case_of", lambda e, eval_set, patient: patient)
        monkeypatch.setattr(strip_room, "open_volumes", lambda options, record, shown: volumes)
        _stored(many, shown, volumes)
    drawn = {key: (figure, of) for key, figure, of in figures_room.due(many)}
    with style.look():
        figure = figures_room._figure(*drawn[name], None)
        style._settle(figure)
        figure.set_dpi(100)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        page, beyond = figure.bbox, _beyond_the_ends(figure)
        shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        texts = [
            (t.get_text(), t.get_window_extent(canvas.get_renderer()).padded(-0.5))
            for t in shown
            if t not in beyond
        ]
        assert _worst_contrast(canvas, [t for t in shown if t not in beyond]) >= 3
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for _, box in texts)
    for (a, one), (b, other) in itertools.combinations(texts, 2):
        assert not one.overlaps(other), (a, b)


def _worst_contrast(canvas: FigureCanvasAgg, texts: list[Text]) -> float:
    """Lowest contrast of a text with what is drawn beneath it: a cell of a map, a mark, the page.

    Args:
        canvas: with the figure, drawn; its texts are hidden afterwards.
        texts: those to be read.
    """
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts]
    for text in texts:
        text.set_alpha(0)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
    worst = math.inf
    for text, box in zip(texts, boxes, strict=True):
        x0, x1 = math.floor(max(box.x0, 0)), math.ceil(box.x1)
        y0, y1 = math.floor(max(box.y0, 0)), math.ceil(box.y1)
        beneath = np.median(pixels[y0:y1, x0:x1].reshape(-1, 3), axis=0)
        around = [effect._gc["foreground"] for effect in text.get_path_effects()]  # its halo
        worst = min(worst, _contrast(to_hex(text.get_color()), to_hex(*around or [beneath])))
    return worst


def _beyond_the_ends(figure: Figure) -> set[Text]:
    """Labels of ticks beyond the ends of an axis: matplotlib keeps them and does not draw them."""
    beyond: set[Text] = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9 or not tick.label1.get_visible():
                    beyond |= {tick.label1, tick.label2}
    return beyond


def test_a_dollar_in_a_label_is_no_formula(tmp_path: Path) -> None:
    few = {"btcv": 3, "lits": 3}
    odd = {"class": "Reg", "train": "^head$|^neck_$"}
    make_runs(tmp_path, {"universal": Method(seeds=(0,)),
                         "reg": Method(seeds=(0,), identity={"strategy": odd})},
              patients=few)  # fmt: skip
    plain = {"class": "Reg", "train": "all"}
    make_runs(tmp_path, {"reg": Method(seeds=(0,), kept=-0.1, identity={"strategy": plain})},
              patients=few)  # fmt: skip
    add_external(tmp_path, "clinic", ["spleen", "liver"], {"universal": 0.0, "reg": 0.1})
    for folder in tmp_path.glob("tumor_ext/*/*"):
        (folder / "cost.csv").write_text("step,forward_macs,parameters\n1,1e9,2e6\n2,2e9,2e6\n")
    study = Analysis(
        results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=100, rank_resamples=20)
    )
    assert "reg (train=^head$|^neck_$)" in [m.label for m in study.dice.strategies]
    for name in (*MADE, "cost", "external"):
        assert draw(name, study).startswith(b"<?xml")


def test_too_few_patients_have_no_bar_of_equality(tmp_path: Path) -> None:
    methods = {"universal": Method(), "mib": Method(), "finetune": Method(kept=-0.5)}
    make_runs(tmp_path, methods, patients={"btcv": 3, "lits": 12})
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=100))
    few, enough = study.rankings
    assert few.pairs is not None
    assert (few.pairs.m, enough.n) == (0, 11)
    with style.look():
        figure = figures_room._figure("critical-difference", study, None)
    bars = [[p for p in ax.get_lines() if p.get_linewidth() == 2.6] for ax in figure.axes]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [bool(own) for own in bars] == [False, True]
    assert ["too few patients to test" in title for title in titles] == [True, False]
    said = " ".join(t.get_text() for t in figure.texts)
    assert "no pair within is told apart" in said
    assert "differ" not in said
    (note,) = (n for n in ranking_table(study).notes if n.startswith("btcv: too"))
    assert note == "btcv: too few patients to test any pair."


def test_the_diamond_lies_within_its_axis(tmp_path: Path) -> None:
    names = ("universal", "a", "b", "c", "d")
    make_runs(tmp_path, {name: Method(noise=0.09) for name in names},
              patients={"btcv": 5, "lits": 5})  # fmt: skip
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=500))
    with style.look():
        figure = figures_room._figure("forest", study, None)
    drawn = 0
    for ax in figure.axes:
        for diamond in (p for p in ax.patches if len(p.get_path().vertices) == 5):
            ends = diamond.get_path().vertices[:, 0]
            if diamond.get_facecolor()[:3] == to_rgb("#0072B2"):
                low, high = ax.get_xlim()
                assert low <= ends.min() <= ends.max() <= high
                drawn += 1
    assert drawn == 4


def test_one_strategy_on_an_external_set_has_no_tau_and_the_key_no_more_than_lines(
    tmp_path: Path,
) -> None:
    shifts = {"universal": 0.0, "lwf": 0.0}
    make_runs(tmp_path, {"universal": Method(), "lwf": Method(drop=[(2, "btcv/101")])})
    add_external(tmp_path, "clinic", ["spleen", "liver"], shifts)
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=100))
    with style.look():
        figure = figures_room._figure("external", study, None)
    (ax,) = figure.axes
    assert "tau" not in ax.get_title(loc="left") + ax.get_title()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["universal"]
    assert "scores are missing: lwf" in " ".join(figure.texts[-1].get_text().split())


def test_a_caption_of_one_seed_says_so(tmp_path: Path) -> None:
    def said(name: str, seeds: tuple[int, ...]) -> str:
        out = tmp_path / str(len(seeds))
        if not out.exists():
            methods = {"universal": Method(seeds=seeds), "lwf": Method(seeds=seeds, kept=-0.1)}
            make_runs(out, methods, patients={"btcv": 6, "lits": 6})
            add_external(out, "clinic", ["spleen", "liver"], dict.fromkeys(methods, 0.0))
        study = Analysis(results=out, bench="tumor_ext", protocol=Protocol(draws=100))
        with style.look():
            figure = figures_room._figure(name, study, None)
        return " ".join(" ".join(t.get_text() for t in figure.findobj(Text)).split())

    for name in ("critical-difference", "forest", "patients", "external"):
        assert "1 seed" in said(name, (0,)), name
        assert "seeds" not in said(name, (0,)), name
        assert "1 seed" not in said(name, (0, 1)), name
        assert "seeds" in said(name, (0, 1)), name
    assert "seeds" not in said("heatmap", (0,))


# ------------------------------------------------------------------------------------------- cost


def test_without_counted_operations_the_next_step_is_named(study: Analysis) -> None:
    with pytest.raises(StoreError, match="recorded its operations") as err:
        draw("cost", study)
    assert "clbench cost" in str(err.value)


def test_cost_against_score(tmp_path: Path) -> None:
    folders = make_runs(tmp_path, {"universal": Method(), "joint": Method(), "finetune": Method()},
                        patients={"btcv": 6, "lits": 6})  # fmt: skip
    for i, folder in enumerate(folders[:6]):  # finetune has none
        lines = [f"{s},{(1 + i // 3) * 1e9 * s:.0f},{1e6 * s:.0f}" for s in (1, 2)]
        (folder / "cost.csv").write_text("\n".join(["step,forward_macs,parameters", *lines]) + "\n")
    costs = read_costs(Run.read(folders[3]))
    assert (costs[2]["forward_macs"], costs[2]["parameters"]) == (4e9, 2e6)
    assert costs[2]["train_s"] == 60.0  # from run.json
    svg = draw("cost", Analysis(results=tmp_path, bench="tumor_ext"))
    assert b"finetune." in svg  # in the small print: nothing was counted
    assert b"parameters, 2 million" in svg
    (folders[0] / "cost.csv").write_text("step,forward_macs\n1,many\n")
    with pytest.raises(StoreError, match="cannot be read"):
        draw("cost", Analysis(results=tmp_path, bench="tumor_ext"))


def test_costs_are_means_over_seeds_and_one_without_is_a_hole(tmp_path: Path) -> None:
    folders = make_runs(tmp_path, {"universal": Method(seeds=(0, 1)), "lora": Method(seeds=(0, 1))},
                        patients={"btcv": 4, "lits": 4})  # fmt: skip
    for folder, parameters in zip(folders, (2e6, 6e6, 1e6, 0), strict=True):
        line = f"2,{1e3 * parameters:.0f},{parameters:.0f}" if parameters else ""
        (folder / "cost.csv").write_text(f"step,forward_macs,parameters\n{line}\n")
    for folder in folders:
        record = run_folder.read_record(folder)
        for step in record["cost"].values():
            del step["train"]["parameters"]
        run_folder.write_record(folder, record)
    with style.look():
        figure = figures_room._figure("cost", Analysis(results=tmp_path, bench="tumor_ext"), None)
    (point,) = (p for p in figure.axes[0].get_lines() if p.get_marker() == "o")
    assert point.get_xdata() == [4.0]  # 10^9 MACs, of 2 and 6
    small = " ".join(figure.texts[-1].get_text().split())
    assert "parameters, 4 million, means over seeds" in small
    assert "operations are missing: lora" in small


# ------------------------------------------------------------------------------------------ strip


def test_the_median_and_the_worst_case_by_rule(study: Analysis) -> None:
    e = study.dice
    shown = choose(e, 2)
    means = {
        p: np.nanmean([e.reference.cells[2, "btcv", c].values[:, i].mean() for c in
                       ("spleen", "right_kidney", "liver", "pancreas")])
        for i, p in enumerate(e.patients["btcv"])
    }  # fmt: skip
    order = sorted(means, key=lambda p: means[p])
    got = {(s.eval_set, s.word): s.case for s in shown}
    assert got["btcv", "worst"] == order[0]
    assert got["btcv", "median"] == order[2]  # the lower middle of six
    assert got["lits", "worst"] == "200"  # its tumor is missed by all
    assert "205" not in got.values()  # has no tumor, so no score
    assert {s.eval_set for s in choose(e, 1)} == {"btcv"}


def test_a_patient_with_two_scans_is_shown_by_the_first(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()}, patients={"btcv": 2, "lits": 2}, scans=2)
    e = Analysis(results=tmp_path, bench="tumor_ext").dice
    assert strip_room.case_of(e, "btcv", "101") == "101_0"
    assert strip_room.case_of(e, "lits", "200") == "200_0"


def areas_of(**masks: np.ndarray) -> dict[str, np.ndarray]:
    bits = sum(m.astype(np.uint8) << k for k, m in enumerate(masks.values()))
    found = areas(np.asarray(bits, dtype=np.uint8), list(masks), list(masks))
    assert {c: a.tolist() for c, a in found.items()} == {
        c: m.sum(axis=(0, 1)).tolist() for c, m in masks.items()
    }
    return found


def test_the_slice_by_rule() -> None:
    a, b = np.zeros((2, 4, 4, 5), dtype=bool)
    a[:, :, 1] = a[:2, :2, 3] = a[0, 0, 4] = True
    b[0, :2, 3] = b[0, 0, 4] = True
    assert best_slice(areas_of(liver=a), []) == 1
    assert best_slice(areas_of(liver=a, liver_tumor=b), ["liver_tumor"]) == 3
    assert best_slice(areas_of(liver=a, liver_tumor=~b), ["liver_tumor"]) == 1


def test_dice_within_a_slice() -> None:
    a, b = np.zeros((2, 2, 2), dtype=bool)
    a[0], b[0, 0] = True, True
    assert slice_dice({"liver": a}, {"liver": a}) == 1.0
    assert slice_dice({"liver": a}, {"liver": b}) == pytest.approx(2 / 3)
    assert slice_dice({}, {"liver": a, "spleen": ~a & a}) == 0.0


def test_outlines_follow_the_voxels() -> None:
    flat = np.zeros((3, 3), dtype=bool)
    flat[1, 1:] = True
    edges = {tuple(map(tuple, e)) for e in outline(flat)}
    assert len(edges) == 6  # two voxels in a row have six outer edges
    assert ((0.5, 0.5), (0.5, 1.5)) in edges
    assert ((1.5, 0.5), (1.5, 1.5)) not in edges  # between the two


def test_a_slice_is_turned_as_radiologists_look() -> None:
    volume = np.zeros((3, 2))
    volume[2, 1] = 1  # right front
    assert axial(volume).shape == (2, 3)
    assert axial(volume)[0, 0] == 1  # top left


NAMES = ("spleen", "right_kidney", "liver", "pancreas", "liver_tumor")
FILE_MM, NETWORK_MM = (2.0, 3.0, 5.0), (4.0, 6.0, 10.0)


def _volumes(folder: Path, shown: list[Shown]) -> list[Volume]:
    """Cases in files of 2 x 3 x 5 mm, on a network's grid of twice that."""
    found = []
    for one in shown:
        mine = NAMES[:4] if one.eval_set == "btcv" else ("liver", "liver_tumor")
        source = Source(name=one.eval_set, title="", layout="lits",
                        labels={k + 1: c for k, c in enumerate(mine)})  # fmt: skip
        label = np.zeros((24, 20, 12), dtype=np.uint8)
        for k in range(len(mine)):
            label[4 * k + 3 : 4 * k + 8, 5:13, 4:9] = k + 1
        image = np.full(label.shape, -1000, dtype=np.int16)
        image[1:-1, 1:-1, 1:-1] = 40
        place = np.diag([*FILE_MM, 1.0])
        files = CaseFiles(
            case=one.case,
            image=put(folder, f"{one.eval_set}_{one.case}_i", packed(image, place)),
            label=put(folder, f"{one.eval_set}_{one.case}_l", packed(label, place)),
        )
        pre = Preprocessing(spacing_mm=NETWORK_MM)
        found.append(preprocess(read_case(files, source), source, pre))
    return found


def _stored(study: Analysis, shown: list[Shown], volumes: list[Volume]) -> None:
    """The truth on the network's grid as everybody's prediction, but joint's: it has none."""
    for m in study.dice.strategies:
        if m.label == "joint":
            continue
        for one, volume in zip(shown, volumes, strict=True):
            path = m.runs[0].folder / "predictions" / "step2" / f"{one.eval_set}_{one.case}.npz"
            write_prediction(path, volume.bits, volume.names, volume.affine)


def test_a_strip_from_stored_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_runs(tmp_path, {"universal": Method(), "finetune": Method(kept=-0.5), "joint": Method()},
              patients={"btcv": 4, "lits": 4})  # fmt: skip
    study = Analysis(results=tmp_path, bench="tumor_ext")
    shown = choose(study.dice, 2)
    volumes = _volumes(tmp_path, shown)
    monkeypatch.setattr(strip_room, "open_volumes", lambda options, record, shown: volumes)
    with pytest.raises(StoreError, match="stored its predictions") as err:
        draw("strip", study)
    assert "--keep-predictions" in str(err.value)
    _stored(study, shown, volumes)
    images: list[tuple[int, ...]] = []
    real = strip_room.panel
    monkeypatch.setattr(
        strip_room,
        "panel",
        lambda ax, image, *rest: (images.append(image.shape), real(ax, image, *rest)),
    )
    svg = draw("strip", study)
    assert set(images) == {(20, 24)}  # the file's own, not the network's (10, 12)
    assert b"on the CT's own grid" in svg
    assert b"voxels of 2 x 3 x 5 mm" in svg.replace(b"\n", b" ")
    assert b"no prediction stored" in svg
    for one in shown:
        assert f"{one.eval_set} {one.case}: {one.word}".encode() in svg
    assert draw("strip", study) == svg
    with pytest.raises(StoreError, match="no step 3"):
        draw("strip", study, strip=StripOptions(step=3))


def test_the_grid_of_a_strip_is_that_of_the_stored_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference comes from outside: it stores no prediction and knows no spacing."""
    outside = Method(record={"external": True})
    make_runs(tmp_path, {"nnunet": outside, "universal": Method()},
              patients={"btcv": 4, "lits": 4})  # fmt: skip
    study = Analysis(results=tmp_path, bench="tumor_ext", reference="nnunet")
    shown = choose(study.dice, 2)
    volumes = _volumes(tmp_path, shown)
    native = next(m for m in study.dice.strategies if m.label == "universal")
    for one, volume in zip(shown, volumes, strict=True):
        path = native.runs[0].folder / "predictions" / "step2" / f"{one.eval_set}_{one.case}.npz"
        write_prediction(path, volume.bits, volume.names, volume.affine)
    asked = []
    monkeypatch.setattr(
        strip_room,
        "open_volumes",
        lambda options, record, shown: asked.append(record.strategy) or volumes,
    )
    assert b"no prediction stored" in draw("strip", study)
    assert asked == ["universal"]


def test_a_prediction_is_shown_as_it_was_scored(tmp_path: Path) -> None:
    """The picture's masks are the slice of the volume that the scores are made of."""
    (volume,) = _volumes(tmp_path, [Shown(eval_set="btcv", case="1", word="", score=0)])
    path = tmp_path / "p.npz"
    write_prediction(path, volume.bits, volume.names, volume.affine)
    whole = native_rows(volume.bits, volume)(0, volume.native_shape[0])
    for z in (0, 4, 7, 11):
        flat = strip_room.predicted(path, volume, z, NAMES)
        for k, name in enumerate(volume.names):
            assert np.array_equal(flat[name], (whole[:, :, z] >> k) & 1)
    assert strip_room.predicted(path, volume, 6, ["liver"])["liver"].any()
    write_prediction(path, volume.bits[1:], volume.names, volume.affine)
    with pytest.raises(StoreError, match="not of this case"):
        strip_room.predicted(path, volume, 4, NAMES)


# --------------------------------------------------------------------------------- long names


LONG = {
    "universal": "universal (vectors=a_table_of_text_embeddings, weights 0123abcd)",
    "finetune": "finetune (learning_rate=0.0001, schedule=warm_up_then_cosine)",
    "joint": "joint_training_on_all_sources_of_the_course_at_once_with_no_end",
}


def _boxes(figure: Figure) -> tuple[list[tuple[str, Bbox]], list[tuple[str, Bbox]]]:
    """Every text of a drawn figure, and the titles of its panels, each with its place."""
    figure.set_dpi(style.DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # numbers along an axis: matplotlib keeps those beyond its ends too, and does not draw them
    texts = [
        t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip("−.0123456789 ")
    ]
    heads = [t for ax in figure.axes for t in (ax.title, ax._left_title) if t.get_text()]
    return tuple(
        [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in some]
        for some in (texts, heads)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("name", [*MADE, "cost", "strip", "external"])
def test_long_names_are_neither_cut_nor_run_into_each_other(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_runs(tmp_path, {"universal": Method(), "finetune": Method(), "joint": Method()},
                        patients={"btcv": 5, "lits": 5})  # fmt: skip
    for folder in folders:
        (folder / "cost.csv").write_text("step,forward_macs,parameters\n1,1e9,2e6\n2,2e9,2e6\n")
    if name == "external":
        names = ("universal", "finetune", "joint")
        add_external(tmp_path, "clinic", ["spleen", "liver"], dict.fromkeys(names, -0.05))
    monkeypatch.setattr(scores_room, "labelled", _long_labels)
    study = Analysis(results=tmp_path, bench="tumor_ext")
    assert sorted(m.label for m in study.dice.strategies) == sorted(LONG.values())
    shown = [replace(s, case=f"{s.case}_a_case_id_of_a_registry_with_site_and_date")
             for s in choose(study.dice, 2)]  # fmt: skip
    if name == "strip":
        volumes = _volumes(tmp_path, shown)
        monkeypatch.setattr(strip_room, "choose", lambda e, step: shown)
        monkeypatch.setattr(strip_room, "case_of", lambda e, eval_set, patient: patient)
        monkeypatch.setattr(strip_room, "open_volumes", lambda options, record, shown: volumes)
        _stored(study, shown, volumes)
    with style.look():
        figure = figures_room._figure(name, study, None)
        texts, heads = _boxes(figure)
    page = figure.bbox
    for words, box in texts:
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, (words, box, page)  # noqa: PT018
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, (words, box, page)  # noqa: PT018
    for (a, one), (b, other) in itertools.combinations(heads, 2):
        assert not one.overlaps(other), (a, b)


def _long_labels(runs: Mapping[int, Run]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, run in runs.items():
        found.setdefault(LONG[run.record.strategy], []).append(i)
    return found


def test_lines_are_broken_at_spaces_and_at_marks_within_a_name() -> None:
    text = "universal left_upper_lobe/of-the-lung"
    lines = wrapped(text, 0.7, 7).split("\n")
    assert lines[0] == "universal left_"
    assert "".join(lines) == text
    assert all(width_in(line, 7) <= 0.7 for line in lines)
    assert "".join(wrapped("m" * 40, 0.5, 7).split("\n")) == "m" * 40
    assert wrapped("a\nb", 1, 7) == "a\nb"


# ---------------------------------------------------------------------------------------- command


def test_the_command_draws_what_it_can_and_names_the_rest(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.report import figures

    def fake(name: str, study: Analysis, out: Path, strip: StripOptions) -> list[Path]:
        if name == "cost":
            raise StoreError("no run has recorded its operations", next_step="clbench cost")
        return [out / name]

    monkeypatch.setattr(figures, "save", fake)
    words = ["--results", str(runs), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["figure", "all", *words])
    assert done.exit_code == 1
    assert all(str(tmp_path / name) in done.output for name in FIGURES if name != "cost")
    assert "cost: no run has recorded its operations" in done.output
    assert CliRunner().invoke(app, ["figure", "forest", *words]).exit_code == 0


def test_unknown_figures_and_empty_folders(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["figure", "forrest", "--results", str(tmp_path)])
    assert isinstance(done.exception, UnknownName)
    assert "did you mean 'forest'" in str(done.exception)
    done = CliRunner().invoke(app, ["figure", "forest", "--results", str(tmp_path)])
    assert isinstance(done.exception, ClbenchError)
    assert "clbench run" in str(done.exception)
    listed = CliRunner().invoke(app, ["figure", "list"]).output
    assert all(name in listed for name in FIGURES)
