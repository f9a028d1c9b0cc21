"""The report: one page without network, sentences that are held against numbers, holes by name."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from locations import TESTS
from synthetic_runs import THREE_STEPS, Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import StoreError
from clbench.report.page.calibration import CLAIM, COVERED, SETTLED, calibration_table, rates
from clbench.report.page.matrix import matrix_of
from clbench.report.page.page import Report, make_report, other_tables, write_report
from clbench.report.page.provenance import _backbone_weights
from clbench.report.paper.table import paper_table
from clbench.report.significance.analysis import Analysis
from clbench.report.study import Protocol
from clbench.statistics.macro_estimate import ONE_RUN
from clbench.store import run_folder

QUICK = Protocol(draws=2000)


def study_of(results: Path, bench: str = "tumor_ext") -> Analysis:
    return Analysis(results=results, bench=bench, protocol=QUICK)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    make_runs(out, {"universal": Method(), "joint": Method(new=0.1), "finetune": Method(kept=-0.4)})
    return out


@pytest.fixture(scope="module")
def made(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(study_of(results), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(made: Report) -> str:
    return made.files[0].read_text(encoding="utf-8")


def test_the_page_asks_no_network_for_anything(html: str) -> None:
    found = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert found
    assert {f.split(":")[0] if ":" in f else f[0] for f in found} <= {"data", "#"}
    assert "default-src 'none'" in html
    assert "@import" not in html


def test_the_page_says_that_the_phantom_is_no_patient(html: str, results: Path) -> None:
    title = re.search(r"<title>(.*?)</title>", html)
    assert title is not None
    assert "PHANTOM, not patients" in title[1]


def test_the_sections_are_there_and_the_last_says_what_cannot_be_shown(html: str) -> None:
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert headings[0] == "Answer"
    assert {"Verdicts", "Tables", "Figures", "Provenance"} <= set(headings)
    assert headings[-1].lower() == "what this cannot show"
    last = html[html.rindex(headings[-1]) :]
    claims = [r for r in rates().itertuples() if r.question == CLAIM]
    for seeds in (1, 3, 5):  # the calibration's lesson, however many seeds this report has
        said = [f"{r.rate:.1%} at {r.seed_sd:g}" for r in claims if r.seeds == seeds]
        assert [s.split()[-1] for s in said] == ["0", "0.01", "0.02"]
        assert f"with {seeds} seed(s) in {', '.join(said)}" in last


def test_every_figure_the_runs_allow_is_embedded(html: str) -> None:
    assert html.count("data:image/svg+xml;base64,") >= 6
    assert "The figure `strip`" in html or "strip" in html  # synthetic runs hold no prediction


def test_verdicts_stand_on_the_page(html: str) -> None:
    text = re.sub(r"<[^>]+>", "", html)
    assert "universal is better than finetune by more than 0.02 Dice after the last step" in text


def test_the_terminal_prints_the_matrix_and_three_sentences(made: Report) -> None:
    matrix, _, *sentences, where = made.lines
    assert {"universal (reference)", "joint", "finetune"} <= {
        line.split("  ")[0] for line in matrix.splitlines()
    }
    assert 1 <= len(sentences) <= 3
    assert where == f"Report: {made.files[0]}"
    assert max(map(len, matrix.split("\n\nfinal")[0].splitlines())) <= 120


def test_a_column_says_what_it_is_of_and_shared_cells_are_repeated(html: str) -> None:
    table = html[html.index('id="table10"') :]
    head = re.findall(r'<span class="over">(.*?)</span> Step 1', table[: table.index("</thead>")])
    assert {"Spleen", "Liver", "Liver tumor"} & set(head)
    assert len(head) == len(set(head)) > 5
    assert 'class="best' in table


def test_a_hole_keeps_the_strategy_s_name(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "lwf_ct": Method(drop=((2, "btcv/103"),))})
    made = make_report(study_of(tmp_path), tmp_path / "r")
    text = next(p for p in made.files if p.name == "report.md").read_text()
    said = [line for line in text.splitlines() if line.startswith("- ") and "no number" in line]
    assert said
    assert all(
        "1 of 12 test cases missing (btcv/103)" in line and "(lwf_ct: " in line for line in said
    )
    assert "\n○ lwf_ct: spleen after step 2, seed 0: 1 of 12 test cases missing" in made.lines[0]
    assert 'class="badge hole"' in made.files[0].read_text(encoding="utf-8")


def test_a_figure_and_a_table_that_fail_are_holes_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(study: object) -> None:
        raise KeyError("a fault of ours")

    make_runs(tmp_path, {"universal": Method(seeds=(0,)), "lwf_ct": Method(seeds=(0,))})
    monkeypatch.setattr("clbench.report.figures.heatmap.heatmap", broken)
    monkeypatch.setattr("clbench.report.tables.costs.cost_table", broken)
    made = make_report(study_of(tmp_path), tmp_path / "r")
    page = made.files[0].read_text(encoding="utf-8")
    assert "The figure <code>heatmap</code>: KeyError:" in page
    assert "The table <code>cost</code>: KeyError:" in page
    assert 'id="figure-forest"' in page
    assert 'id="summary"' in page


def test_a_course_without_groups_has_every_table(tmp_path: Path) -> None:
    for folder in make_runs(tmp_path, {"universal": Method(seeds=(0,)), "mib": Method(seeds=(0,))}):
        record = run_folder.read_record(folder)
        record["course"]["groups"] = {}
        run_folder.write_record(folder, record)
    study = study_of(tmp_path)
    tables, absent = other_tables(study)
    assert not [line for line in absent if "Error" in line]
    assert {"summary", "distances", "table10"} <= set(tables)
    assert "Mean (5)" in tables["distances"].over
    (column,) = {c for c in paper_table(11, study, source="measured").over if c}
    assert column == "Mean"


def test_what_holds_for_every_verdict_is_said_once(tmp_path: Path) -> None:
    make_runs(
        tmp_path, {k: Method(seeds=(0,)) for k in ("universal", "joint", "lwf_ct")},
        patients={"btcv": 8, "lits": 8},
    )  # fmt: skip
    made = make_report(study_of(tmp_path), tmp_path / "r")
    html = made.files[0].read_text(encoding="utf-8")
    assert html.count(f"<li>For each of them: {ONE_RUN}</li>") == 1
    assert f"<li>{ONE_RUN}</li>" not in html
    text = next(p for p in made.files if p.name == "report.md").read_text()
    assert text.count("For each of them: ") == html.count("For each of them: ") == 1


def test_the_limits_are_one_line_each(made: Report) -> None:
    text = next(p for p in made.files if p.name == "report.md").read_text()
    last = text[text.index("## What this cannot show") :].strip().splitlines()[2:]
    assert all(line.startswith("- ") for line in last)
    assert any("The figure `strip`" in line for line in last)


def test_tables_are_stored_at_full_precision(made: Report) -> None:
    names = {p.name for p in made.files}
    assert {"index.html", "report.md", "checklist.md", "confirmatory.csv", "summary.csv"} <= names
    path = next(p for p in made.files if p.name == "confirmatory.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6  # three endpoints, two other strategies


def test_every_table_is_on_the_page_and_on_disk(made: Report, html: str) -> None:
    stems = {p.stem for p in made.files if p.suffix == ".csv"}
    assert stems == {p.stem for p in made.files if p.suffix == ".tex"}
    assert stems == {
        "matrix", "confirmatory", "forgetting", "structures", "eval_sets", "ranking", "summary", "learning",
        "continual", "distances", "detection", "cost", "table10", "calibration",
    }  # fmt: skip
    assert all(f'id="{stem}"' in html for stem in stems)  # the matrix too, with its CSV


def test_without_a_tumor_there_is_no_table_of_detection(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,))}, bench="body_ext", steps=THREE_STEPS)
    tables, absent = other_tables(study_of(tmp_path, bench="body_ext"))
    assert "summary" in tables
    assert "detection" not in tables
    assert not [words for words in absent if "detection" in words]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
def test_every_table_compiles_as_latex(made: Report, tmp_path: Path) -> None:
    inputs = "".join(rf"\input{{{p}}}\clearpage " for p in made.files if p.suffix == ".tex")
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}"
        r"\usepackage{booktabs,multirow,graphicx}\usepackage[table]{xcolor}"
        rf"\begin{{document}}{inputs}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"], cwd=tmp_path,
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_label_of_any_text_breaks_no_row(tmp_path: Path) -> None:
    odd = ("a|b<i>c", "l1\nl2")
    make_runs(tmp_path / "runs", {"universal": Method(seeds=(0,))})
    for kept, train in zip((-0.1, -0.2), odd, strict=True):
        own = {"strategy": {"class": "Reg", "train": train}}
        make_runs(tmp_path / "runs", {"reg": Method(seeds=(0, 1), kept=kept, identity=own)})
    study = Analysis(results=tmp_path / "runs", bench="tumor_ext", protocol=Protocol(draws=200))
    write_report(study, tmp_path / "out", matrix=matrix_of(study), command="c")
    for name in ("report.md", "checklist.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "<i>" not in text
        assert "\nl2" not in text
        assert "a\\|b&lt;i>c" in text
        bars = 0
        for line in text.splitlines():
            if line.startswith("|"):
                now = len(re.findall(r"(?<!\\)\|", line))
                assert now == (bars or now), line
                bars = now
            else:
                bars = 0


def test_the_checklist_answers_or_says_missing(made: Report) -> None:
    text = next(p for p in made.files if p.name == "checklist.md").read_text()
    assert "missing" in text
    assert "patient" in text


def test_the_command(results: Path, tmp_path: Path) -> None:
    words = ["report", "--bench", "tumor_ext", "--ref", "universal", "--results", str(results),
             "--out", str(tmp_path / "r"), "--margin", "0.05"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r" / "index.html").is_file()
    assert "0.05 Dice" in (tmp_path / "r" / "report.md").read_text()


def test_one_strategy_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()})
    made = make_report(study_of(tmp_path), tmp_path / "r")
    assert not [line for line in made.lines if " than " in line]


def test_nothing_of_it_loads_torch(results: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from clbench.report.page.page import make_report\n"
        "from clbench.report.significance.analysis import Analysis\n"
        "from clbench.report.study import Protocol\n"
        "quick = Protocol(draws=500)\n"
        f"study = Analysis(results=Path({str(results)!r}), bench='tumor_ext', protocol=quick)\n"
        f"make_report(study, Path({str(tmp_path)!r}))\n"
        "import clbench.report.figures.strip, clbench.data.catalog\n"
        "loaded = {'torch', 'monai', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written(results: Path, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("a file")
    with pytest.raises(StoreError, match="cannot be written"):
        make_report(study_of(results), tmp_path / "r")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_sorts_and_filters(html: str, made: Report, tmp_path: Path) -> None:
    probe = """<script>
    const table = document.getElementById('confirmatory'), seen = {};
    const column = [...table.tHead.rows[0].cells].findIndex(h => h.textContent.trim() === 'difference');
    const read = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(
      r => [r.cells[1].textContent.trim(), r.cells[column].textContent.trim()]);
    const click = i => table.tHead.rows[0].cells[i].querySelector('button').click();
    click(column); seen.up = read();
    click(column); seen.down = read();
    click(1); seen.names = read();
    const box = document.querySelector('input[data-for=confirmatory]');
    box.value = 'JOINT learn'; box.dispatchEvent(new Event('input')); seen.two = read();
    box.value = 'joint'; box.dispatchEvent(new Event('input')); seen.one = read();
    document.body.append(Object.assign(document.createElement('pre'),
      {id: 'seen', textContent: JSON.stringify(seen)}));
    </script></body>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "3 of 6 rows" in done.stdout
    assert 'aria-sort="ascending"' in done.stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found is not None
    seen = json.loads(unescape(found[1]))
    path = next(p for p in made.files if p.name == "confirmatory.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(r["b"], float(r["difference"])) for r in csv.DictReader(file)]
    shown = [(name, float(text.replace("\u2212", "-"))) for name, text in seen["up"]]
    wanted = sorted(rows, key=lambda r: r[1])
    assert [d for _, d in shown] == pytest.approx([d for _, d in wanted], abs=0.0006)
    assert [n for n, _ in shown] == [n for n, _ in wanted]
    assert seen["down"] == seen["up"][::-1] != seen["up"]
    assert [n for n, _ in seen["names"]] == ["finetune"] * 3 + ["joint"] * 3
    assert {n for n, _ in seen["one"]} == {"joint"}
    assert len(seen["one"]) == 3
    assert len(seen["two"]) == 1  # every word must be there, in any case


# ------------------------------------------------------------------------------- calibration


def test_the_stored_rates_hold_what_is_promised() -> None:
    """Coverage, family-wise error and the level of a single claim."""
    covered = [
        r for r in rates().itertuples() if r.question == COVERED and (r.seeds > 1 or r.seed_sd == 0)
    ]
    assert {(r.patients, r.seeds) for r in covered} == {
        (p, s) for p in ("8 + 8", "12 + 20") for s in (1, 3, 5)
    }
    assert all(r.studies >= 2000 for r in covered)
    assert all(0.935 <= r.rate <= 0.965 for r in covered), covered
    false = [r for r in rates().itertuples() if r.question == "any false difference, max-t"]
    assert {(r.patients, r.comparisons) for r in false} == {
        (p, m) for p in ("8", "8 + 8", "12 + 20") for m in (3, 13)
    }
    assert all(0.03 <= r.rate <= 0.06 for r in false), false
    claims = {(r.seed_sd, r.seeds): r.rate for r in rates().itertuples() if r.question == CLAIM}
    assert all(0.03 <= claims[0.0, s] <= 0.07 for s in (1, 3, 5))
    for sd in (0.01, 0.02):  # what a run moves by is no patient's doing
        assert claims[sd, 1] > claims[sd, 3] > 0.05
    assert all(r.rate <= 0.05 for r in rates().itertuples() if r.question == SETTLED)
    winners = [r for r in rates().itertuples() if r.question.startswith("a single best among")]
    assert {r.patients for r in winners} == {"8", "8 + 8", "12 + 20"}
    for r in winners:  # leagues of ten equal methods
        assert (r.comparisons, r.studies >= 2000, r.rate <= 0.05) == (45, True, True)


def test_power_of_both_corrections_stands_side_by_side() -> None:
    power = {
        (r.question.rpartition(", ")[0], r.patients, r.comparisons, r.question.split()[-1]): r.rate
        for r in rates().itertuples()
        if r.question.startswith("power")
    }
    pairs = {key[:3] for key in power}
    assert len(power) == 2 * len(pairs) == 24
    for key in pairs:
        assert power[*key, "max-t"] >= power[*key, "holm"] - 0.01
    assert power["power, one of the family", "8", 13, "holm"] == 0
    assert power["power, one of the family", "8", 13, "max-t"] > 0.4


def test_the_table_of_rates() -> None:
    table = calibration_table()
    keys = {
        (r.question, r.patients, r.comparisons, r.seed_sd, r.effect) for r in rates().itertuples()
    }
    assert len(table.rows) == len(keys)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = TESTS / "perf" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_short_calibration(bench: ModuleType) -> None:
    """200 null studies: 5 % claims have a standard error of 1.5 points."""
    (claims,) = bench.claims(200, "8", 1, 0.0)
    assert 0.01 <= claims.rate <= 0.10
    assert bench.claims(200, "8", 1, 0.02)[0].rate > claims.rate  # runs differ, and there is one
    (covered,) = bench.coverage(200, "8 + 8", 3, 0.02)
    assert covered.rate > 0.89
    wrong, inside = bench.false_claims(60, "8", 3, "max-t")
    assert wrong.rate < 0.15
    assert inside.rate > 0.85


def test_published_weights_stand_in_the_provenance_with_their_overlap() -> None:
    loaded = {
        "loaded": ["a", "b"],
        "parts": {"encoder.swinViT": [118, 118], "decoder": [0, 20]},
        "trained_on": "BTCV",
        "overlap": ["btcv"],
    }

    def of(strategy: str, weights: dict[str, Any] | None) -> Any:
        return SimpleNamespace(strategy=strategy, backbone_weights=weights)

    record = of("universal", loaded)
    ((name, said),) = _backbone_weights([record, record])
    assert name == "backbone weights"
    assert said == (
        "universal: 2 tensors set (encoder.swinViT 118 of 118, decoder 0 of 20); trained on: BTCV; "
        "THAT NAMES DATA OF THIS COURSE: btcv"
    )
    older = of("joint", {"loaded": ["a"]})
    ((_, said),) = _backbone_weights([older])
    assert said == "joint: 1 tensors set; training data not declared"
    assert list(_backbone_weights([of("joint", None)])) == []
