"""A study: one protocol on the whole page, every file read once, every test made once."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_runs import Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import SettingError, UnknownName
from clbench.report.page.checklist import checklist
from clbench.report.significance import analysis
from clbench.report.significance.tables import (
    class_table,
    confirmatory_table,
    own_table,
    set_table,
)
from clbench.report.study import Protocol, Study
from clbench.report.tables.continual import continual_table
from clbench.report.tables.summary import summary
from clbench.statistics.intervals import hodges_lehmann
from clbench.store import run_folder

METHODS = {
    "universal": Method(kept=-0.01),
    "joint": Method(new=0.03),
    "lwf_ct": Method(kept=-0.01),
    "finetune": Method(kept=-0.4),
    "mib": Method(kept=-0.02, own_step1=True, step1=-0.02),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    cost = {
        str(i): {"train": {"train_s": 60.0, "parameters": 1000 * i, "forward_macs": 10**9}}
        for i in (1, 2)
    }
    methods = {
        name: Method(kept=m.kept, new=m.new, step1=m.step1, record={"cost": cost})
        for name, m in METHODS.items()
    }
    make_runs(out, methods)
    return out


# ----------------------------------------------------------------------------- one protocol


def written(results: Path, out: Path, *options: str) -> dict[str, str]:
    """File or figure → its text, of `clbench report` with these options."""
    words = ["report", "--bench", "tumor_ext", "--ref", "universal", "--results", str(results)]
    done = CliRunner().invoke(app, [*words, "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    texts = {p.name: p.read_text(encoding="utf-8") for p in out.glob("*.*")}
    html = texts["index.html"]
    for data, name in re.findall(r'<img src="data:[^,]*,([^"]*)" alt="([^."]*)', html):
        texts[f"figure {name}"] = base64.b64decode(data).decode()
    texts["index.html"] = re.sub(r"data:[^\"']*", "", html)
    return texts


@pytest.fixture(scope="module")
def by_default(
    results: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], Counter[str], Counter[str]]:
    """A report at the defaults: its texts, how often each file was read and each test made."""
    made: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        reads = counting_reads(patch)
        for name in ("confirm", "own_forgetting", "by_class", "by_set", "rankings", "stable"):
            right = getattr(analysis, name)

            def counted(*given: Any, name: str = name, right: Any = right) -> Any:
                made[name] += 1
                return right(*given)

            patch.setattr(analysis, name, counted)
        return written(results, tmp_path_factory.mktemp("default") / "r"), reads, made


@pytest.fixture(scope="module")
def strict(results: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The texts of a report at another level and margin."""
    out = tmp_path_factory.mktemp("strict") / "r"
    return written(results, out, "--alpha", "0.0004", "--margin", "0.001")


def statements(texts: dict[str, str]) -> list[str]:
    """What the report says in words: no numbers of cells, nothing about the simulated studies."""
    said = [
        line
        for line in texts["report.md"].splitlines()
        if not re.match(r"\|(?! (alpha|equivalence margin))", line) and not re.search("simulated studies|studies per cell", line)
    ]  # fmt: skip
    headers = re.findall(r"^\|.*\|\n(?=\| ?:?-)", texts["report.md"], re.M)
    said += [h for h in headers if "sd of a training run" not in h]
    said += texts["checklist.md"].splitlines()
    for name, text in texts.items():
        if name.startswith("figure "):
            said.append(" ".join(s for s in re.findall(r"<!-- (.*?) -->", text) if " " in s))
    return [unescape(line) for line in said]


DEFAULT_LEVEL = re.compile(r"(?<![\d.+−-])0\.0[25](?!\d)|9[05] ?%")


def test_the_pattern_finds_the_defaults(
    by_default: tuple[dict[str, str], Counter[str], Counter[str]],
) -> None:
    found = [line for line in statements(by_default[0]) if DEFAULT_LEVEL.search(line)]
    text = "\n".join(found)
    for words in ("adjusted p ≤ 0.05", "alpha 0.05, equivalence margin 0.02", "±0.02", "95 % interval",
                  "95 % over patients", "Wilson 95 %", "at 95 %"):  # fmt: skip
        assert words in text, words


def test_level_and_margin_hold_on_the_whole_page(strict: dict[str, str]) -> None:
    said = statements(strict)
    assert [s for s in said if DEFAULT_LEVEL.search(s)] == []
    text = "\n".join(said)
    for words in (
        "adjusted p ≤ 0.0004", "alpha 0.0004, equivalence margin 0.001", "±0.001, the equivalence margin",
        "99.96 % interval", "99.96 % over patients", "Wilson 99.96 %",
        "none exists below 13 patients at 99.96 %",
    ):  # fmt: skip
        assert words in text, words
    assert "at 5%, this report at 0.0004" in strict["report.md"]


def test_marks_and_verdicts_follow_the_level_and_the_margin(
    by_default: tuple[dict[str, str], Counter[str], Counter[str]], strict: dict[str, str]
) -> None:
    loose = by_default[0]
    assert loose["table10.csv"].count("proven") > strict["table10.csv"].count("proven")
    assert "equivalent" in loose["table10.csv"]
    assert "equivalent" not in strict["table10.csv"]
    assert loose["learning.csv"] != strict["learning.csv"]  # wider intervals
    names = {n for n in loose if n.startswith("figure ")}
    assert len(names) == 8
    for name in names - {"figure Heatmap", "figure Patients", "figure Rank stability"}:
        assert loose[name] != strict[name], name


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"alpha": 0.5}, {"margin": 0.0}, {"margin": 1.0}]
)
def test_no_level_and_no_margin(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"no such (level|margin)"):
        Protocol(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "words"), [(0.025, "97.5 %"), (0.001, "99.9 %")])
def test_a_level_is_never_rounded_to_another_one(results: Path, alpha: float, words: str) -> None:
    study = analysis.Analysis(
        results=results, bench="tumor_ext", protocol=Protocol(alpha=alpha, draws=1000)
    )
    tables = (confirmatory_table, own_table, class_table, set_table)
    heads = [name for make in tables for name in make(study).columns if "interval" in name]
    assert len(heads) == len(tables)
    assert all(name.startswith(words) for name in heads), heads
    assert dict(checklist(study))["Intervals, not p alone?"].startswith(f"yes: {words}, ")
    (flag,) = hodges_lehmann([0.1, 0.2, 0.3], level=1 - alpha).flags
    assert flag == f"no {words} interval exists at n = 3 (at most 75 %)"


def test_percent_is_exact() -> None:
    assert Protocol(alpha=0.05).percent == "95 %"
    assert Protocol(alpha=0.005).percent == "99.5 %"


# ------------------------------------------------------------------- read once, tested once


def counting_reads(patch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of a run is opened from here on."""
    count: Counter[str] = Counter()
    scores, record = pd.read_csv, run_folder.read_record

    def counted_scores(path: Path, **options: Any) -> pd.DataFrame:
        count[str(path)] += 1
        return scores(path, **options)

    def counted_record(folder: Path) -> dict[str, Any]:
        count[str(folder / "run.json")] += 1
        return record(folder)

    patch.setattr(pd, "read_csv", counted_scores)
    patch.setattr(run_folder, "read_scores", None)
    patch.setattr(run_folder, "read_record", counted_record)
    return count


def test_a_report_reads_every_file_once_and_makes_every_test_once(
    results: Path, by_default: tuple[dict[str, str], Counter[str], Counter[str]]
) -> None:
    _, reads, made = by_default
    files = [str(p) for p in results.rglob("*") if p.name in ("run.json", "scores.csv")]
    of_runs = {file: count for file, count in reads.items() if str(results) in file}
    assert of_runs == dict.fromkeys(files, 1)
    assert set(made.values()) == {1}
    assert len(made) == 6


@pytest.mark.parametrize(
    "name", ["6", "10", "11", "summary", "learning", "continual", "distances", "cost"]
)
def test_a_table_reads_every_file_once(
    results: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reads = counting_reads(monkeypatch)
    words = ["table", name, "--bench", "tumor_ext", "--results", str(results)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("name", ["11", "summary", "learning", "continual"])
def test_every_table_of_strategies_takes_a_reference(results: Path, name: str) -> None:
    words = ["table", name, "--bench", "tumor_ext", "--ref", "mib", "--results", str(results)]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_a_reference_that_is_named_stands_first_and_must_have_a_run(results: Path) -> None:
    study = Study(results=results, bench="tumor_ext", reference="mib")
    assert summary(study).rows[0][0] != "mib"
    assert summary(study, reference_first=True).rows[0][0] == "mib"
    assert continual_table(study, reference_first=True).columns[1] == "mib"
    for name in ("10", "summary"):
        words = ["table", name, "--bench", "tumor_ext", "--ref", "mibb", "--results", str(results)]
        assert isinstance(CliRunner().invoke(app, words).exception, UnknownName)


@pytest.mark.parametrize(
    "words",
    [["cost", "--metric", "nsd"], ["calibration", "--percent"], ["summary", "--seeds", "0"]],
)
def test_a_table_refuses_an_option_it_does_not_take(results: Path, words: list[str]) -> None:
    with pytest.raises(SettingError, match=r"does not take --") as err:
        CliRunner().invoke(
            app, ["table", *words, "--results", str(results)], catch_exceptions=False
        )
    assert "leave" in str(err.value)
