"""`make paper`: everything a plan lists, holes with reasons, nothing stale."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from locations import ROOT
from synthetic_runs import Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import SettingError
from clbench.report.figures import FIGURES, draw
from clbench.report.paper.build import build, read_plan
from clbench.report.paper.printed import BENCH
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import FINAL, hole

PLAN = ROOT / "paper_figs" / "paper.toml"
STUDY = "[study]\nresults='r'\nseeds=[0]\nref='u'\nscoring='strict'\n"


def test_the_plan_of_the_paper_names_what_exists() -> None:
    plan = read_plan(PLAN)
    assert {(t.number, t.bench) for t in plan.table} >= set(BENCH.items())
    assert {f.name for f in plan.figure} == {"strip", "cost"} <= set(FIGURES)


def test_runs_become_files_and_what_is_missing_a_hole(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_runs(
        runs,
        {"universal": Method(), "lwf_ct": Method(seeds=(0, 1))},
        patients={"btcv": 4, "lits": 4},
    )
    out.mkdir()
    (out / "figure7.pdf").write_text("of an earlier study")
    made = {m.file: m for m in build(PLAN, out, runs)}
    assert {p.suffix for p in made["table10"].paths} == {".tex", ".md", ".csv", ".html"}
    text = (out / "table10.md").read_text()
    assert "0.466 p" in text  # the print
    assert "hole: lwf_ct has no finished run of seed 2" in text
    assert "no finished run of plop_ct" in text
    (row,) = [x for x in text.splitlines() if x.startswith("| universal")][:1]
    assert " m" in row
    holes = [x for x in text.splitlines() if x.startswith("| lwf_ct")]
    assert holes
    assert not any(" m" in x for x in holes)  # never a mean over the seeds that are there
    assert "PHANTOM" in (out / "table10.tex").read_text()
    assert "–" in (out / "table11.md").read_text()
    assert "clbench cost" in made["figure7"].hole
    assert not (out / "figure7.pdf").exists()
    for folder in runs.glob("tumor_ext/*/*"):
        (folder / "cost.csv").write_text("step,forward_macs,parameters\n1,1e9,1e6\n2,2e9,2e6\n")
    again = {m.file: m for m in build(PLAN, out, runs)}
    assert (out / "figure7.pdf").read_bytes().startswith(b"%PDF")
    assert {p.suffix for p in again["figure7"].paths} == {".pdf", ".png"}


def test_figures_are_of_the_seeds_of_the_plan(tmp_path: Path) -> None:
    """A figure of asked seeds is that of a folder with these alone; who lacks one is left out."""
    text = STUDY.replace("[0]", "[0, 1]").replace("'u'", "'universal'")
    plan = tmp_path / "plan.toml"
    plan.write_text(
        text + "".join(
            f"[[figure]]\nfile='{name}'\nname='{name}'\nbench='tumor_ext'\n"
            for name in ("plane", "heatmap", "patients")
        )
    )  # fmt: skip
    few = {"btcv": 4, "lits": 4}
    some = {"universal": Method(seeds=(0, 1)), "lwf": Method(seeds=(0, 1), kept=-0.2)}
    more = {name: replace(m, seeds=(0, 1, 2)) for name, m in some.items()}
    for name, methods in (("some", some), ("more", more)):
        make_runs(tmp_path / name, methods, patients=few)
        assert not [m.hole for m in build(plan, tmp_path / f"of_{name}", tmp_path / name) if m.hole]
    for name in ("plane.png", "heatmap.png", "patients.png"):
        same = [(tmp_path / of / name).read_bytes() for of in ("of_some", "of_more")]
        assert same[0] == same[1], name
    make_runs(tmp_path / "lacks", {**more, "mib": Method(seeds=(0,))}, patients=few)
    study = Analysis(results=tmp_path / "lacks", bench="tumor_ext").with_seeds((0, 1))
    mib = next(m for m in study.dice.strategies if m.label == "mib")
    assert hole(study.dice, mib, FINAL) == "mib: no finished run of seed 1"
    said = " ".join(re.findall(r"<!-- (.*?) -->", draw("plane", study).decode()))
    assert "Not shown, because scores are missing: mib." in said


def test_the_command_names_files_and_holes(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["paper", str(PLAN), "--results", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "table10.tex" in done.output
    assert "figure6: HOLE" in done.output


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[study", "cannot be read"),
        ("[[tabel]]\nfile = 'a'", "did you mean 'table'"),
        (
            "[study]\nresults='r'\nseeds=[0]\nref='u'\nscoring='strict'\nsed=1",
            "unknown field 'sed'",
        ),
        (
            "[study]\nresults='r'\nseeds=0\nref='u'\nscoring='strict'",
            "seeds must be a list, each a whole",
        ),
        (
            "[study]\nresults='r'\nseeds=[0]\nref='u'\nscoring='lenient'",
            "scoring must be one of strict, paper",
        ),
        (
            STUDY + "[[table]]\nfile='a'\nnumber=10\nbench='tumor_ext'\nsource='printd'",
            "source must be one of printed, measured, both",
        ),
        (
            STUDY + "[[figure]]\nfile='a'\nname='plane'\nbench='tumor_ext'\n" * 2,
            "two tables or figures have one name",
        ),
        ("[study]\nresults='r'", "an incomplete study: seeds, ref, scoring missing"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(SettingError, match=word):
        list(build(tmp_path / "p.toml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_paper_passes_the_runs_on() -> None:
    done = subprocess.run(
        ["make", "-n", "paper", "RESULTS=my_runs"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (
        "clbench paper paper_figs/paper.toml --out paper_figs/out --results my_runs" in done.stdout
    )


def test_the_plan_is_plain_toml() -> None:
    assert tomllib.loads(PLAN.read_text())["study"]["seeds"] == [0, 1, 2]


def test_a_plan_names_a_course_by_its_file_relative_to_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_runs(tmp_path / "runs", {"universal": Method()}, patients={"btcv": 4, "lits": 4})
    shutil.copytree(ROOT / "benchmarks", tmp_path / "plan" / "courses")
    plan = tmp_path / "plan" / "plan.toml"
    plan.write_text(
        '[study]\nresults = "runs"\nseeds = [0]\nref = "universal"\nscoring = "strict"\n[[figure]]\nfile = "a"\nname = "heatmap"\n'
        'bench = "courses/tumor_ext.toml"\n'
    )
    monkeypatch.chdir(tmp_path)
    (made,) = build(Path("plan/plan.toml"), tmp_path / "out", tmp_path / "runs")
    assert not made.hole, made.hole
    assert {p.suffix for p in made.paths} == {".pdf", ".png"}


def test_a_fault_leaves_what_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    item = "[[figure]]\nfile='one'\nname='plane'\nbench='tumor_ext'\n"
    plan.write_text(STUDY.replace("'u'", "'universal'") + item)
    out.mkdir()
    (out / "one.pdf").write_text("drawn before")
    make_runs(tmp_path / "runs", {"universal": Method(seeds=(0,))}, patients={"btcv": 3, "lits": 3})

    def torn(*_: object) -> None:
        raise ValueError("a fault of ours")

    with monkeypatch.context() as patched:
        patched.setattr("clbench.report.figures.draw_kinds", torn)
        with pytest.raises(ValueError, match="of ours"):
            list(build(plan, out, tmp_path / "runs"))
    assert (out / "one.pdf").read_text() == "drawn before"
    (out / "one.b.pdf").write_text("of another name")
    (out / "one.tex").write_text("of a table that has no such name any more")
    (made,) = build(plan, out, tmp_path / "runs")
    assert sorted(p.name for p in out.iterdir()) == ["one.b.pdf", "one.pdf", "one.png"]
    assert not made.hole
