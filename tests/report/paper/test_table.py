"""Tables 10 and 11: the print as printed, measured rows by hand, holes where something is missing."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import locations
import pytest
from locations import ROOT
from synthetic_runs import Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import SettingError, StoreError
from clbench.report.paper.printed import BENCH, printed_cells
from clbench.report.paper.table import paper_table
from clbench.report.significance.analysis import Analysis
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, FORMATS, Table, render
from clbench.spec import registry
from clbench.store import run_folder

SHARED = locations.SHARED / "paper"
ORGANS = (
    "spleen", "right_kidney", "left_kidney", "gall_bladder", "esophagus", "liver", "stomach", "aorta",
    "postcava", "portal_and_splenic_vein", "pancreas", "right_adrenal_gland", "left_adrenal_gland",
)  # fmt: skip
TUMOR = (("organs", "btcv", ORGANS), ("liver tumor", "lits", ("liver_tumor",)))
BODY = (
    ("organs", "jhh_a", ("spleen", "liver")),
    ("gastro", "jhh_b", ("colon",)),
    ("cardiac", "jhh_c", ("aorta", "postcava")),
)
CT = {"lwf_ct": Method(kept=-0.1), "ilt_ct": Method(kept=-0.05), "plop_ct": Method(kept=-0.02)}


def tumor(results: Path, methods: dict[str, Method], **more: Any) -> list[Path]:
    return make_runs(results, methods, steps=TUMOR, patients={"btcv": 6, "lits": 6}, **more)


def body(results: Path, methods: dict[str, Method], bench: str = "body_ext", **more: Any) -> None:
    folders = make_runs(
        results, methods, bench=bench, steps=BODY, patients=dict.fromkeys(("jhh_a", "jhh_b", "jhh_c"), 5),
        **more,
    )  # fmt: skip
    for folder in folders:
        record = run_folder.read_record(folder)
        record["course"]["groups"] = {
            "JHH_organ": ["spleen", "liver"], "JHH_gastro": ["colon"], "JHH_cardiac": ["aorta", "postcava"],
        }  # fmt: skip
        run_folder.write_record(folder, record)


def line(table: Table, label: str) -> dict[str, str]:
    """A row by its label: "header, step" → cell."""
    (row,) = [r for r in table.rows if r[0] == label]
    names = [f"{o}, {c}" if o else c for o, c in zip(table.over, table.columns, strict=True)]
    return dict(zip(names, row, strict=True))


def cells(table: Table) -> list[str]:
    end = len(table.columns) - table.tail
    return [c for row in table.rows for c in row[table.keys : end] if c]


# -------------------------------------------------------------------------------------- the print


@pytest.mark.parametrize(
    ("which", "source", "n"), [(10, "table10_printed_layout.csv", 96), (11, "table11.csv", 30)]
)
def test_the_printed_half_is_the_paper_cell_by_cell(which: int, source: str, n: int) -> None:
    lines = list(
        csv.reader(
            io.StringIO(
                render(
                    paper_table(
                        which, Analysis(results=Path("none"), bench=BENCH[which]), source="printed"
                    ),
                    "csv",
                )
            )
        )
    )
    assert len(lines) == n + 1
    if not (SHARED / source).exists():
        pytest.skip("the typed table of the paper is not on this machine")
    assert lines == list(csv.reader(io.StringIO((SHARED / source).read_text())))


def test_what_is_seen_is_what_was_printed() -> None:
    table = paper_table(10, Analysis(results=Path("none"), bench="tumor_ext"), source="printed")
    seen = [c.removesuffix(" p") for c in cells(table)]
    assert sorted(seen) == sorted(c.text for c in printed_cells(10))  # the shared cell once
    assert [table.spans[0, 1 + j] for j in range(0, 32, 2)] == [3] * 16
    assert table.over[1:5] == ("Spleen", "Spleen", "R kidney", "R kidney")
    seen = [
        c.removesuffix(" p")
        for c in cells(
            paper_table(11, Analysis(results=Path("none"), bench="body_ext"), source="printed")
        )
    ]
    assert sorted(seen) == sorted(c.text for c in printed_cells(11))


def test_every_printed_cell_is_marked_and_nothing_is_proven() -> None:
    for which in (10, 11):
        table = paper_table(
            which, Analysis(results=Path("none"), bench=BENCH[which]), source="printed"
        )
        assert all(c == "N/A" or c.endswith(" p") for c in cells(table))
        assert not any({"proven", "untestable"} & m for m in table.marks.values())


def test_printed_means_follow_from_printed_cells_but_for_one() -> None:
    found: dict[tuple[str, int], dict[str, str]] = {}
    for c in printed_cells(10):
        found.setdefault((c.methods[0], c.step), {})[c.name] = c.text
    gaps = set()
    for key, row in found.items():
        organs = [
            float(v) for c, v in row.items() if c not in ("Organ Mean", "Mean", "Liver tumor")
        ]
        assert round(sum(organs) / 13, 3) == float(row["Organ Mean"])
        if row["Mean"] != "N/A":
            mean = round((sum(organs) + float(row["Liver tumor"])) / 14, 3)
            gaps |= {key} if mean != float(row["Mean"]) else set()
    assert gaps == {("PLOP", 2)}
    assert any(
        "0.768" in n and "0.767" in n
        for n in paper_table(
            10, Analysis(results=Path("none"), bench="tumor_ext"), source="printed"
        ).notes
    )


def test_printed_tables_start_without_scipy_pandas_matplotlib_or_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from clbench.cli import app\n"
        "for n in ('10', '11'):\n  for f in ('terminal', 'md', 'csv', 'tex', 'html'):\n"
        "    app(['table', n, '--source', 'printed', '--format', f], standalone_mode=False)\n"
        "heavy = {'torch', 'scipy', 'pandas', 'monai', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_measured_tables_and_the_summary_start_without_torch_or_matplotlib(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method(), **CT})
    code = (
        "import sys; from clbench.cli import app\n"
        f"for n in ('6', '10', 'summary', 'learning', 'continual', 'distances', 'cost', 'calibration'):\n"
        f"  app(['table', n, '--results', {str(tmp_path)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'monai', 'matplotlib', 'nibabel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------- measured


def test_a_measured_cell_by_hand(tmp_path: Path) -> None:
    folders = tumor(tmp_path, {"universal": Method()})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    row = line(table, "universal [minilm]")
    per_seed = []
    for folder in folders:
        rows = run_folder.read_scores(folder / "scores.csv")
        values = [r.value for r in rows if r.structure == "aorta" and r.step == 2 and r.eval_set == "btcv"
                  and r.scoring == "strict"]  # fmt: skip
        per_seed.append(sum(values) / len(values))
    assert row["Aorta, Step 2"] == f"{sum(per_seed) / 3:.3f} m"
    assert row["Liver Tumor, Step 1"] == row["Mean, Step 1"] == "N/A"
    assert row["seeds"] == "3"
    assert "PHANTOM" in table.title


def test_strategies_that_share_step_1_print_it_once(tmp_path: Path) -> None:
    tumor(tmp_path, {**CT, "universal": Method(own_step1=True)})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert [r[0] for r in table.rows] == ["lwf_ct", "ilt_ct", "plop_ct", "universal [minilm]"]
    assert {n for (i, _), n in table.spans.items() if i == 0} == {3}
    assert [bool(line(table, s)["Spleen, Step 1"]) for s in CT] == [True, False, False]
    assert render(table, "tex").count(r"\multirow{3}") == 16


def as_in_the_paper(methods: dict[str, Method], **changed: Any) -> dict[str, Method]:
    """The same methods with the profile and the splits of the paper."""
    steps = registry.benchmark("tumor_ext").steps
    splits = [{"train": s.split.train, "test": s.split.test} for s in steps]
    identity = {"profile": {"name": "paper"}, "splits": splits, **changed}
    return {name: replace(m, identity=identity) for name, m in methods.items()}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"profile": {"name": "quick"}}, "the runs' profile (quick) is not the paper's"),
        ({"splits": [{"train": ["1"], "test": ["2"]}] * 2}, "the split of step"),
    ],
)
def test_other_splits_or_settings_are_not_set_against_the_print(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    tumor(tmp_path, as_in_the_paper({"universal": Method()}, **changed), phantom=False)
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="both")
    assert "  difference" not in [r[0] for r in table.rows]
    assert any(n.startswith(f"no difference is formed: {why}") for n in table.notes)


def test_both_stand_side_by_side(tmp_path: Path) -> None:
    methods = {**CT, "universal": Method(own_step1=True), "finetune": Method(kept=-0.6)}
    tumor(tmp_path, as_in_the_paper(methods), phantom=False)
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="both")
    labels = [r[0] for r in table.rows]
    assert labels == [
        "LwF, ILT, PLOP", "lwf_ct, ilt_ct, plop_ct", "  difference",
        "LwF", "lwf_ct", "  difference", "ILT", "ilt_ct", "  difference",
        "PLOP", "plop_ct", "  difference", "Ours", "universal [minilm]", "  difference", "finetune",
    ]  # fmt: skip
    assert table.rows[0][2:4] == ("0.955 p", "")  # the shared step 1, once
    assert table.rows[3][2:4] == ("", "0.941 p")
    ours, mine, gap = (r[2:4] for r in table.rows[12:15])
    for p, m, d in zip(ours, mine, gap, strict=True):
        exact = float(m.split()[0]) - float(p.split()[0])
        assert float(d.replace("−", "-")) == pytest.approx(exact, abs=0.0011)
    assert all(c in ("N/A", EMPTY) or c[-2:] in (" p", " m") or c[0] in "+−" for c in cells(table))
    assert not any(table.rows[i][0].startswith("  ") for (i, _) in table.marks)


def test_phantom_never_stands_beside_patients_without_its_name(tmp_path: Path) -> None:
    tumor(tmp_path, {**CT, "universal": Method(), "joint": Method()})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="both")
    assert "PHANTOM" in table.title
    printed = {"LwF, ILT, PLOP", "LwF", "ILT", "PLOP", "Ours"}
    assert all("PHANTOM" in r[0] for r in table.rows if r[0] not in printed)
    assert "  difference" not in [r[0] for r in table.rows]
    assert any("no difference" in n for n in table.notes)
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert {x["data"] for x in lines if x["origin"] == "measured"} == {"phantom"}
    assert {x["data"] for x in lines if x["origin"] == "printed"} == {"patients"}


def test_an_absent_strategy_is_a_row_of_holes(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method()})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="both")
    assert set(line(table, "lwf_ct").values()) <= {"lwf_ct", "", EMPTY, "N/A"}
    assert any("no finished run of lwf_ct" in n for n in table.notes)
    empty = paper_table(11, Analysis(results=tmp_path, bench="body_ext"), source="measured")
    assert any("no finished run" in n for n in empty.notes)
    assert set(cells(empty)) == {EMPTY}


def test_rows_that_are_whole_are_ranked_and_judged_beside_a_hole(tmp_path: Path) -> None:
    make_runs(
        tmp_path,
        {"universal": Method(seeds=(0, 1, 2, 3)), "lwf_ct": Method(kept=-0.3, seeds=(0, 1, 2, 3)),
         "ilt_ct": Method(seeds=(0, 3))},
        patients={"btcv": 10, "lits": 10},
    )  # fmt: skip
    table = paper_table(
        10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured", seeds=[0, 1]
    )
    assert table.marks
    assert line(table, "ilt_ct")["verdict"] == "hole"
    assert line(table, "lwf_ct")["verdict"] == "worse"
    assert line(table, "lwf_ct")["seeds"] == "2"
    assert any("max-T (m = 1)" in n for n in table.notes)
    assert not any("not the same seeds" in n for n in table.notes)


def test_an_absent_seed_is_a_hole_never_a_partial_mean(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method(), "lwf_ct": Method(seeds=(0, 2))})
    table = paper_table(
        10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured", seeds=[0, 1, 2]
    )
    assert set(list(line(table, "lwf_ct").values())[2:]) <= {EMPTY, "N/A", ""}
    assert line(table, "universal [minilm]")["Spleen, Step 2"].endswith(" m")
    assert any("hole: lwf_ct has no finished run of seed 1" in n for n in table.notes)
    loose = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert line(loose, "lwf_ct")["seeds"] == "2"
    assert not loose.marks  # rows over other seeds are not ranked
    assert any("not the same seeds" in n for n in loose.notes)


def test_a_missing_case_is_a_hole_with_its_name(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method(), "lwf_ct": Method(drop=[(2, "btcv/102")])})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    row = line(table, "lwf_ct")
    assert row["Spleen, Step 2"] == row["Organ Mean, Step 2"] == row["Mean, Step 2"] == EMPTY
    assert row["Liver Tumor, Step 2"].endswith(" m")  # another set of cases
    assert any("lwf_ct" in n and "btcv/102" in n and "1 of 6" in n for n in table.notes)


def test_what_a_course_does_not_have_is_no_hole(tmp_path: Path) -> None:
    body(tmp_path, {"universal": Method()})
    table = paper_table(10, Analysis(results=tmp_path, bench="body_ext"), source="measured")
    row = line(table, "universal")
    assert row["Liver Tumor, Step 2"] == "N/A"
    assert row["Spleen, Step 2"].endswith(" m")
    (note,) = [n for n in table.notes if n.startswith("N/A, since the course body_ext")]
    assert "Liver Tumor, step 2" in note
    assert "Spleen" not in note
    assert EMPTY not in cells(table)


def test_one_seed_says_so(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method(seeds=(4,))})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert any("one seed" in n for n in table.notes)


def test_variants_of_universal_are_named_by_their_encoding(tmp_path: Path) -> None:
    for encoding in ("minilm", "clip"):
        tumor(tmp_path, {"universal": Method(
            identity={"vectors": encoding, "profile": {"name": "smoke", "text": {"encoding": encoding}}},
            record={"text_encoding": {"encoding": encoding}})})  # fmt: skip
    labels = [
        r[0]
        for r in paper_table(
            10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured"
        ).rows
    ]
    assert "universal (clip)" in labels
    assert "universal (minilm)" in labels


def test_variants_of_one_encoding_are_named_by_prompt_or_checksum(tmp_path: Path) -> None:
    """What one label would hide is told apart: a prompt, other vectors, a setting no label has."""
    variants: list[tuple[dict[str, object], str]] = [
        ({"vectors": "aaaa1111aa"}, "a {}"),
        ({"vectors": "bbbb2222bb"}, "a CT of a {}"),
        ({"vectors": "cccc3333cc"}, "a CT of a {}"),
        ({"vectors": "aaaa1111aa", "strategy": {"class": "Other"}}, "a {}"),
    ]
    for identity, prompt in variants:
        text = {"encoding": "minilm", "prompt": prompt}
        tumor(tmp_path, {"universal": Method(identity=identity, record={"text_encoding": text})})
    scores = Study(results=tmp_path, bench="tumor_ext").need_scores()
    labels = [m.label for m in scores.strategies]
    assert len(labels) == 4
    assert sum(len(m.runs) for m in scores.strategies) == len(scores.runs) == 12
    assert "universal (minilm, prompt 'a CT of a {}', vectors bbbb2222)" in labels
    assert "universal (minilm, prompt 'a CT of a {}', vectors cccc3333)" in labels
    same = [label for label in labels if label.startswith("universal (minilm, prompt 'a {}') #")]
    assert len(set(same)) == 2


def test_older_runs_recorded_their_splits_by_name(tmp_path: Path) -> None:
    for folder in tumor(tmp_path, {"universal": Method(), "lwf_ct": Method(kept=-0.3)}):
        change(folder, splits={"a.toml": {"test": [], "draw": None}, "b.toml": {"test": []}})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert line(table, "lwf_ct")["verdict"] in ("worse", "not testable")


def test_a_verdict_per_strategy_seen_from_the_strategy(tmp_path: Path) -> None:
    make_runs(
        tmp_path, {"universal": Method(), "lwf_ct": Method(kept=-0.3, new=-0.2), "ilt_ct": Method(noise=0.001)},
        patients={"btcv": 10, "lits": 10},
    )  # fmt: skip
    for source in ("measured", "both"):
        table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source=source)
        words = {r[0].split(" ")[0]: r[-1] for r in table.rows if r[-1]}
        assert words["lwf_ct"] == "worse"
        assert words["universal"] == "reference"
        assert "plop_ct" not in words
    (note,) = [n for n in table.notes if "max-T (m = 2)" in n]
    assert "for these training runs" not in note  # the interval over new runs agrees
    swapped = paper_table(
        10, Analysis(results=tmp_path, bench="tumor_ext", reference="lwf_ct"), source="measured"
    )
    assert line(swapped, "universal [minilm]")["verdict"] == "better"
    none = paper_table(
        10, Analysis(results=tmp_path, bench="tumor_ext", reference="mib"), source="measured"
    )
    assert any("no verdict" in n and "mib" in n for n in none.notes)


# --------------------------------------------------------------------------------------- Table 11


def test_table_11_measured_by_hand(tmp_path: Path) -> None:
    body(
        tmp_path,
        {"universal_onehot": Method(kept=-0.1), "lwf_ct": Method(kept=-0.2), "mib": Method()},
    )
    table = paper_table(11, Analysis(results=tmp_path, bench="body_ext"), source="measured")
    assert [r[0] for r in table.rows] == [
        "lwf_ct", "ilt_ct", "plop_ct", "universal_onehot", "universal", "mib"
    ]  # fmt: skip
    row = line(table, "lwf_ct")
    lwf_ct = Study(results=tmp_path, bench="body_ext").need_scores().strategies[0]
    by_hand = [(r[3, "aorta"] + r[3, "postcava"]) / 2 for r in lwf_ct.r]
    assert row["JHH_cardiac, Step 3"] == f"{sum(by_hand) / 3:.3f} m"
    assert table.columns[2:] == ("Step 1", "Step 2", "Step 3", "Step 2", "Step 3", "Step 3")
    assert any(n.startswith("JHH_organ: of 2 structures (spleen, liver)") for n in table.notes)
    assert not any("N/A" in c for c in cells(table))


def test_table_11_both_keeps_the_papers_three_equal_cells(tmp_path: Path) -> None:
    body(tmp_path, {"universal": Method(), **CT}, phantom=False)
    table = paper_table(11, Analysis(results=tmp_path, bench="body_ext"), source="both")
    assert [line(table, m)["JHH_organ, Step 1"] for m in ("LwF", "ILT", "PLOP")] == ["0.891 p"] * 3
    labels = [r[0] for r in table.rows]
    assert labels[labels.index("Ours (CLIP)") + 1] == "universal [minilm]"
    assert labels[labels.index("Ours (1-hot)") + 1] == "universal_onehot"


def test_another_benchmark_has_a_table_of_its_own(tmp_path: Path) -> None:
    body(tmp_path, {"universal": Method()}, bench="body_ext_totalseg")
    with pytest.raises(SettingError, match="no numbers of this benchmark"):
        paper_table(11, Analysis(results=tmp_path, bench="body_ext_totalseg"), source="both")
    table = paper_table(
        11, Analysis(results=tmp_path, bench="body_ext_totalseg"), source="measured"
    )
    assert "different data" in table.title
    assert not any(c.endswith(" p") for c in cells(table))
    done = CliRunner().invoke(
        app, ["table", "11", "--bench", "body_ext_totalseg", "--results", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "different data" in done.output


# ---------------------------------------------------------------------------------------- refusals


def change(folder: Path, **identity: Any) -> None:
    record = run_folder.read_record(folder)
    record["identity"].update(identity)
    run_folder.write_record(folder, record)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bench_version", 2),
        ("data_fingerprint", "other"),
        ("splits", {"other.toml": {}}),
        ("numerics", 99),
        ("profile", {"name": "quick"}),
    ],
)
def test_runs_that_answer_other_questions_are_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    tumor(tmp_path, {"universal": Method()})
    (other, *_) = tumor(tmp_path, {"lwf_ct": Method(seeds=(0,))})
    change(other, **{field: value})
    with pytest.raises(StoreError, match="do not belong in one table") as err:
        paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert field in str(err.value.got)


def test_phantom_beside_patients_is_refused(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method()})
    tumor(tmp_path, {"lwf_ct": Method()}, phantom=False)
    with pytest.raises(StoreError, match="do not belong") as err:
        paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="both")
    assert "phantom and patients" in str(err.value)


def test_a_damaged_score_file_is_named(tmp_path: Path) -> None:
    folder, *_ = tumor(tmp_path, {"universal": Method()})
    path = folder / "scores.csv"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(StoreError, match="cannot be read") as err:
        paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    assert "line" in str(err.value)
    assert str(folder) in str(err.value)


def test_two_scorings_are_two_tables(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method()}, scorings=("strict",))
    table = paper_table(
        10, Analysis(results=tmp_path, bench="tumor_ext", scoring="paper"), source="measured"
    )
    assert set(cells(table)) == {EMPTY, "N/A"}
    assert any("not scored" in n for n in table.notes)


# ----------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("which", [10, 11])
def test_every_format_of_every_source(tmp_path: Path, which: int, format_: str) -> None:
    make = tumor if which == 10 else body
    make(tmp_path, {"universal": Method(seeds=(0,)), "lwf_ct": Method(seeds=(0,))})
    for source in ("printed", "measured", "both"):
        text = render(
            paper_table(which, Analysis(results=tmp_path, bench=BENCH[which]), source=source),
            format_,
        )
        assert ("0.783" in text or "0.466" in text) == (source != "measured")
        if source != "printed":
            assert "phantom" in text.lower()


def test_the_long_form_holds_full_precision(tmp_path: Path) -> None:
    tumor(tmp_path, {"universal": Method()})
    table = paper_table(10, Analysis(results=tmp_path, bench="tumor_ext"), source="measured")
    (cell,) = [x for x in csv.DictReader(io.StringIO(render(table, "csv")))
               if x["method"].startswith("universal") and x["class"] == "Organ Mean" and x["step"] == "2"]  # fmt: skip
    (universal,) = Study(results=tmp_path, bench="tumor_ext").need_scores().strategies
    value, sd = universal.over_seeds(2, ORGANS)
    assert float(cell["value"]) == value
    assert float(cell["sd"]) == sd
    assert cell["structures"] == "13"
    assert cell["seed_list"] == "0 1 2"
    assert not math.isnan(value)


def test_a_course_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    body(tmp_path, {"universal": Method()}, bench="tumor_ext")
    course = ROOT / "benchmarks" / "tumor_ext.toml"
    done = CliRunner().invoke(
        app, ["table", "11", "--bench", str(course), "--results", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "tumor_ext in the layout of Table 11" in done.output
