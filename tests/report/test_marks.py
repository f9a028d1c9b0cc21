"""Marks: the rule against an independent list, and red only where a test by hand carries it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from locations import GOLDEN_FILES
from synthetic_runs import Method, make_runs

from clbench.report.paper.marks import best_and_second, mark
from clbench.report.paper.rows import Column, columns_of, printed_rows
from clbench.report.scores import StrategyScores
from clbench.report.study import Protocol, Study
from clbench.statistics.max_t import compare_family

GOLDEN = json.loads((GOLDEN_FILES / "printed_marks.json").read_text())


def test_the_rule_on_the_printed_step_2() -> None:
    columns = columns_of(10)
    rows = printed_rows(10, columns)
    for name, expected in GOLDEN["expected"].items():
        (j,) = [k for k, c in enumerate(columns) if c.name == name and c.step == 2]
        marks = best_and_second({row.label: row.cells[j].value for row in rows})
        for word, key in (("best", "bold"), ("second", "underline")):
            labels = [row.label for row in rows if marks.get(row.label) == word]
            assert labels == expected[key], (name, word)


@pytest.mark.parametrize(
    ("values", "best", "second"),
    [
        ({"a": 0.1, "b": 0.2, "c": 0.2}, {"b", "c"}, set()),
        ({"a": 0.1, "b": 0.2, "c": 0.3}, {"c"}, {"b"}),
        ({"a": 0.1, "b": 0.1, "c": 0.3}, {"c"}, {"a", "b"}),
        ({"a": 0.1, "b": math.nan}, set(), set()),
        ({"a": 0.1, "b": 0.1}, {"a", "b"}, set()),
        ({"a": 0.1 + 0.2, "b": 0.3, "c": 0.1}, {"a", "b"}, set()),
        ({}, set(), set()),
    ],
)
def test_ties_are_all_bold_and_then_none_is_underlined(
    values: dict[str, float], best: set[str], second: set[str]
) -> None:
    assert best_and_second(values) == dict.fromkeys(best, "best") | dict.fromkeys(second, "second")


def column(step: int, *members: str) -> Column:
    return Column(name="", header="", step=step, members=members)


def groups_of(tmp_path: Path, n: int, **gain: float) -> dict[str, StrategyScores]:
    make_runs(
        tmp_path, {name: Method(kept=g, noise=0.002) for name, g in gain.items()},
        patients={"btcv": n, "lits": n},
    )  # fmt: skip
    scores = Study(results=tmp_path, bench="tumor_ext").need_scores()
    return {s.label: s for s in scores.strategies}


def test_a_clear_lead_is_proven_where_n_allows_it(tmp_path: Path) -> None:
    g = groups_of(tmp_path, 12, a=0.0, b=-0.1, c=-0.2)
    rows = dict(enumerate(g.values()))
    cells = {
        0: (column(2, "spleen"), rows),
        1: (column(2, "spleen", "liver"), rows),
        2: (column(1, "spleen"), rows),  # one checkpoint: no contest
    }
    marked = mark(cells, Protocol())
    assert marked.m == 2
    assert marked.n == (12, 12)
    assert marked.marks == {
        (0, 0): {"best", "proven"}, (1, 0): {"second"}, (0, 1): {"best", "proven"}, (1, 1): {"second"},
    }  # fmt: skip
    # the same test by hand: patients paired, both columns flipped together
    leads = []
    for names in (("spleen",), ("spleen", "liver")):
        at = dict.fromkeys(names, 2)
        a, b = (g[k].table(at) for k in ("a", "b"))
        leads.append({name: a[name] - b[name] for name in a})
    assert all(c.p <= 0.05 for c in compare_family(leads).comparisons)


def test_five_patients_cannot_prove_anything(tmp_path: Path) -> None:
    g = groups_of(tmp_path, 5, a=0.0, b=-0.3)
    marked = mark({0: (column(2, "spleen"), dict(enumerate(g.values())))}, Protocol())
    assert marked.marks[0, 0] == {"best", "untestable"}
    assert marked.marks[1, 0] == {"second"}


def test_many_columns_do_not_make_a_clear_lead_untestable(tmp_path: Path) -> None:
    g = groups_of(tmp_path, 7, a=0.0, b=-0.3)  # 2^-6 alone; Holm needs 8 patients for four columns
    rows = dict(enumerate(g.values()))
    names = ("spleen", "right_kidney", "liver", "spleen")
    cells = {j: (column(2, c), rows) for j, c in enumerate(names)}
    by_max_t, by_holm = (mark(cells, p) for p in (Protocol(), Protocol(correction="holm")))
    assert by_max_t.m == by_holm.m == 4
    assert "proven" in by_max_t.marks[0, 0]
    assert "untestable" in by_holm.marks[0, 0]
