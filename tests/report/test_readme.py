"""The READMEs are true: tables and picture are the tool's, examples run, names of files exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml  # comes with avalanche-lib
from locations import ROOT
from matplotlib.image import imread
from pages import rewrite
from test_package import FLOOR, PROJECT

from clbench.cli import app  # every command
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec import registry
from clbench.store import run_folder
from clbench.testing import check_strategy

README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")])
page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def test_every_folder_at_the_top_has_a_page_that_the_first_one_names() -> None:
    text = README.read_text(encoding="utf-8")
    for folder in ("clbench", "strategies", "benchmarks", "results", "tests", "paper_figs"):
        assert ROOT / folder / "README.md" in PAGES
        assert f"({folder}/README.md)" in text


def test_the_first_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


# -------------------------------------------------------------------------------- numbers, picture


@page
def test_its_numbers_and_pictures_are_made_by_the_tool(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # pictures are drawn elsewhere, so that a test changes no file of the checkout
    text = page.read_text(encoding="utf-8")
    elsewhere = re.sub(
        r"(<!-- \$ clbench figure .*? --out )(\S+)( -->\n)(.*?)(<!-- end -->)",
        lambda m: f"{m[1]}{tmp_path}{m[3]}{m[4].replace(m[2] + '/', f'{tmp_path}/')}{m[5]}",
        text,
        flags=re.DOTALL,
    )
    assert rewrite(elsewhere) == elsewhere, "run `make readme`"
    for drawn in tmp_path.glob("*.png"):
        (kept,) = ROOT.rglob(f"paper_figs/{drawn.name}")
        now, then = imread(drawn), imread(kept)
        assert now.shape == then.shape, "run `make readme`"
        # rounding in another build of the font library moves the edge of a letter, not a line
        # (5e-6 was seen); a row of names that is erased makes 8e-4
        assert float(np.mean(np.abs(now - then))) < 2e-4, "run `make readme`"


def test_pages_hold_the_blocks_they_are_for() -> None:
    blocks = {p.parent.name: p.read_text(encoding="utf-8").count("<!-- $ ") for p in PAGES}
    assert blocks["results"] == 9
    assert blocks["tests"] == 7
    assert README.read_text(encoding="utf-8").count("<!-- $ clbench figure") == 1


def test_a_stale_number_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    stale = text.replace("| all | ", "| all | 1")
    assert stale != text
    assert rewrite(stale) == text


# ------------------------------------------------------------------------------------------ commands


FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[str]:
    """Every clbench command a page shows, in blocks and in the text."""
    for language, block in FENCED.findall(text):
        for line in block.splitlines() if not language else ():
            if shown := re.search(r"\bclbench .*", line):
                yield re.split(r"\s+#\s|\s\|\|?\s", shown[0])[0]
    prose = FENCED.sub("", text)
    yield from re.findall(r"`(clbench [^`]*)`", prose)


@page
def test_its_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text(encoding="utf-8")):
        if command in ("clbench list", "clbench doctor") or command.endswith("…"):
            continue
        words = shlex.split(command)[1:]
        group: Any = typer.main.get_command(app)
        while hasattr(group, "commands"):
            name = words.pop(0)
            assert name in group.commands, f"{command}: there is no command {name!r}"
            group = group.commands[name]
            if not words:  # the name of a command alone, as in a sentence
                break
        else:
            try:
                group.make_context("clbench", words)
            except Exception as err:
                raise AssertionError(f"{command}: {err}") from err


def test_every_page_with_commands_is_looked_at() -> None:
    shown = {p.parent.name: len(list(commands(p.read_text(encoding="utf-8")))) for p in PAGES}
    assert min(shown[n] for n in ("clbench", "strategies", "benchmarks", "paper_figs")) >= 4
    assert len(list(commands(README.read_text(encoding="utf-8")))) >= 10


@page
def test_its_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, re.MULTILINE):
        assert "".join(target) in targets


# --------------------------------------------------------------------------------------------- paths


@page
def test_links_inside_the_project_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _, heading in (
        link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    ):
        file = page.parent / target if target else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


@page
def test_files_it_names_exist(page: Path) -> None:
    tops = "clbench|strategies|benchmarks|results|tests|paper_figs"
    for name in re.findall(rf"`((?:{tops})/[\w./*-]*)`", page.read_text(encoding="utf-8")):
        if name.startswith(("results/tumor_ext/", "results/_logs/", "paper_figs/out/")):
            continue  # what a run or `make paper` writes
        assert re.search(r"[A-Z]{3}", name) or list(ROOT.glob(name.rstrip("/"))), name


def test_the_table_of_folders_has_each_in_the_order_of_its_floor() -> None:
    text = (ROOT / "clbench" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)
    there = {p.name for p in (ROOT / "clbench").iterdir() if (p / "__init__.py").exists()}
    assert set(rows) == there
    assert [FLOOR[row] for row in rows] == sorted(FLOOR[row] for row in rows)


def test_every_strategy_and_benchmark_is_named() -> None:
    for kind, folder in (("strategy", "strategies"), ("benchmark", "benchmarks")):
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        for name in registry.entries(kind):
            assert f"`{name}`" in text, name


# ------------------------------------------------------------------------------------------ examples


def example(language: str, name: str) -> str:
    """The one block of the first page that holds a name."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if name in block]
    return str(code)


def test_its_strategy_runs(
    smoke_out: Path, cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frozen_backbone.py").write_text(example("python", "class FrozenBackbone"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = run_course(
        RunSettings(
            bench="tumor_ext", strategy="frozen_backbone:FrozenBackbone", profile="smoke",
            out=smoke_out, cache=cache_root, overrides=("strategy.head_lr=2",),
        )
    )  # fmt: skip
    assert run_folder.read_record(folder)["status"] == "finished"
    report = check_strategy("frozen_backbone:FrozenBackbone")
    assert report.ok, str(report)


def test_its_course_runs(cache_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "my_course.toml"
    path.write_text(example("toml", 'name = "my_course"'))
    bench = registry.benchmark(str(path))
    assert bench.shown(2) == {"spleen"}
    folder = run_course(
        RunSettings(
            bench=str(path), strategy="universal", profile="smoke", out=tmp_path / "out",
            cache=cache_root, overrides=("train.epochs=1", "train.iterations=1"),
        )
    )  # fmt: skip
    assert run_folder.read_record(folder)["status"] == "finished"


# ---------------------------------------------------------------------------- changelog and citation


def test_lines_of_the_changelog_are_short() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    lines = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert lines
    for line in lines:
        assert len(line.split()[1:]) <= 25, line


def test_modules_that_the_changelog_sends_to_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"^\| `(clbench\.[\w.]+)` \| `(clbench\.[\w.]+)` \|", text, re.MULTILINE)
    assert len(moved) >= 20
    homes = PROJECT["tool"]["setuptools"]["package-dir"]
    for old, new in moved:
        for module, wanted in ((old, False), (new, True)):
            package = max((h for h in homes if f"{module}.".startswith(f"{h}.")), key=len)
            path = ROOT / homes[package] / module.removeprefix(package).strip(".").replace(".", "/")
            there = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
            assert there == wanted, module


def test_the_citation_file_is_valid() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["message"]
    assert citation["type"] == "software"
    for work in (citation, *citation["references"]):
        assert work["authors"]
        for author in work["authors"]:
            assert set(author) <= {"name", "family-names", "given-names"}
    (paper,) = citation["references"]
    assert paper["title"] in " ".join(README.read_text(encoding="utf-8").split())
    assert (paper["type"], paper["journal"], paper["year"]) == (
        "article",
        "Medical Image Analysis",
        2024,
    )
