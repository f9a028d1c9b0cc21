"""Courses in several orders: one table over their runs, and the spread that the orders cause."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import ORGANS, Method, make_runs

from clbench.errors import StoreError
from clbench.report.study import Study
from clbench.report.tables.orders import _agreement, orders_table
from clbench.report.tables.render import EMPTY, render

FIRST = ("organs", "btcv", ORGANS)
SECOND = ("liver tumor", "lits", ("liver_tumor",))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    methods = {"universal": Method(), "finetune": Method(kept=-0.5, seed_sd=0.01)}
    make_runs(tmp_path, methods)
    make_runs(tmp_path, methods, bench="tumor_ext.order2-1", steps=(SECOND, FIRST))
    return tmp_path


def test_the_spread_is_that_of_the_means_of_the_orders(results: Path) -> None:
    table = orders_table(Study(results=results, bench="tumor_ext"))
    assert table.columns[2:4] == ("1,2", "2,1")
    assert table.title.startswith("tumor_ext v1")
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    means = []
    for order in ("1,2", "2,1"):
        values = [
            float(x["value"])
            for x in lines
            if (x["strategy"], x["measure"], x["order"]) == ("finetune", "all", order)
        ]
        assert len(values) == 3
        means.append(np.mean(values))
    row = next(row for row in table.rows if row[:2] == ("finetune", "all, after the last step"))
    assert row[4:7] == (
        f"{np.mean(means):.3f}",
        f"{np.std(means, ddof=1):.3f}",
        f"{max(means) - min(means):.3f}",
    )
    assert "Kendall's W" in " ".join(table.notes)
    same = orders_table(Study(results=results, bench="tumor_ext.order2-1"))
    assert (same.rows, same.title) == (table.rows, table.title)


def test_a_row_is_of_one_strategy_with_the_same_options(tmp_path: Path) -> None:
    """Other options are another row; vectors of the same text are not, whatever their order."""

    def lwf(temperature: float, vectors: str) -> Method:
        return Method(
            identity={"strategy": {"class": "Lwf", "temperature": temperature}, "vectors": vectors}
        )

    make_runs(tmp_path, {"lwf": lwf(2.0, "one"), "universal": Method()})
    make_runs(
        tmp_path,
        {"lwf": lwf(9.0, "two"), "universal": Method(identity={"vectors": "turned"})},
        bench="tumor_ext.order2-1",
        steps=(SECOND, FIRST),
    )
    table = orders_table(Study(results=tmp_path, bench="tumor_ext"))
    first = [row for row in table.rows if row[1].startswith("all")]
    assert [row[0] for row in first] == [
        "lwf (temperature=2.0)",
        "lwf (temperature=9.0)",
        "universal",
    ]
    assert [row[2] == EMPTY for row in first] == [False, True, False]
    assert [row[3] == EMPTY for row in first] == [True, False, False]
    assert [row[6] == EMPTY for row in first] == [True, True, False]


def test_orders_are_compared_on_the_seeds_they_have_in_common(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "lwf": Method(seeds=(3,))})
    make_runs(
        tmp_path,
        {"universal": Method(seeds=(0,)), "lwf": Method(seeds=(4,))},
        bench="tumor_ext.order2-1",
        steps=(SECOND, FIRST),
    )
    table = orders_table(Study(results=tmp_path, bench="tumor_ext"))
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    alone = next(
        float(x["value"])
        for x in lines
        if (x["strategy"], x["measure"], x["order"], x["seed"]) == ("universal", "all", "1,2", "0")
    )
    row = next(row for row in table.rows if row[:2] == ("universal", "all, after the last step"))
    assert row[2] == f"{alone:.3f}"
    notes = "\n".join(table.notes)
    assert (
        "universal has not the same seeds in every order (order 1,2: 0, 1, 2; order 2,1: 0): only "
        "seed 0 counts"
    ) in notes
    assert "no seed is common, so none counts" in notes
    assert next(row for row in table.rows if row[0] == "lwf")[2:] == (EMPTY,) * 6


def test_one_order_is_none_to_compare(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()})
    with pytest.raises(StoreError, match="fewer than two orders"):
        orders_table(Study(results=tmp_path, bench="tumor_ext"))


def test_orders_on_other_data_are_refused(results: Path) -> None:
    other = {"data_fingerprint": "synthetic-2"}
    make_runs(
        results,
        {"universal": Method(identity=other)},
        bench="tumor_ext.order1-2",
        steps=(FIRST, SECOND),
    )
    with pytest.raises(StoreError, match="different data_fingerprint"):
        orders_table(Study(results=results, bench="tumor_ext"))


def test_a_strategy_that_an_order_lacks_is_named_once(results: Path) -> None:
    make_runs(results, {"lwf": Method(), "mib": Method()})
    make_runs(results, {"mib": Method(record={"status": "running"})}, bench="tumor_ext.order2-1",
              steps=(SECOND, FIRST))  # fmt: skip
    notes = orders_table(Study(results=results, bench="tumor_ext")).notes
    assert [n for n in notes if "no finished run" in n] == [
        "order 2,1: hole: lwf has no finished run",
        "order 2,1: hole: mib has no finished run (3 unfinished)",
    ]


def test_orders_in_which_all_are_equal_have_no_agreement() -> None:
    """Kendall's W would be 0 there, which reads as if the orders ranked them against each other."""
    assert _agreement([[0.5, 0.6], [0.5, 0.6]]) == (
        "no order ranks one of 2 strategies above another.",
    )
    (said,) = _agreement([[0.5, 0.6], [0.4, 0.6]])
    assert "Kendall's W" in said
