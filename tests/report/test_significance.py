"""The report's tests: numbers by independent routes, words by rule, holes and mixtures by name."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sentence_audit import audit, audit_own
from synthetic_runs import ORGANS, THREE_STEPS, Method, make_runs

from clbench.errors import ClbenchError, SettingError, StoreError, UnknownName
from clbench.report.page.provenance import provenance
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import Comparison, statistical_cautions
from clbench.report.significance.endpoints import (
    ENDPOINTS,
    FINAL,
    KEPT,
    NEW,
    table,
)
from clbench.report.significance.exploratory import _disagreement, patient_macro
from clbench.report.significance.forgetting import Own
from clbench.report.significance.sentences import own_sentence, p_text, sentence
from clbench.report.significance.tables import (
    all_tables,
    class_table,
    confirmatory_table,
    own_table,
    ranking_table,
    set_table,
)
from clbench.report.study import Protocol, Study
from clbench.report.tables.render import EMPTY, number, render
from clbench.statistics.corrections import holm
from clbench.statistics.intervals import detectable_effect
from clbench.statistics.macro_estimate import ONE_DECIDES
from clbench.statistics.max_t import FamilyComparison, compare_family
from clbench.statistics.ranking import max_t_pairs, tie_groups, wilcoxon_holm
from clbench.statistics.verdicts import Verdict
from clbench.store import run_folder

QUICK = Protocol(draws=2000)
FOUR = {
    "universal": Method(),
    "joint": Method(),
    "finetune": Method(kept=-0.5),
    "lwf_ct": Method(step1=-0.05, kept=-0.06),
}


def run(results: Path, **more: Any) -> Analysis:
    options: dict[str, Any] = {
        "bench": "tumor_ext",
        "reference": "universal",
        "scoring": "strict",
        "protocol": QUICK,
    }
    study = Analysis(results=results, **{**options, **more})
    assert study.dice.strategies  # read now, so that damaged runs are refused here
    return study


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four")
    make_runs(out, FOUR)
    return out


@pytest.fixture(scope="module")
def four(results: Path) -> Analysis:
    return run(results)


def of(a: Analysis, endpoint: str, other: str) -> Comparison:
    (found,) = [c for c in a.comparisons if c.endpoint.name == endpoint and c.b == other]
    return found


def result(x: Comparison | Own) -> FamilyComparison:
    assert x.result is not None, x.hole
    return x.result


def rows_of(table: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(table, "csv"))))


def dice(results: Path, strategy: str, step: int, structure: str) -> dict[str, list[float]]:
    """Case → values over seeds, straight from the files."""
    home = "lits" if structure == "liver_tumor" else "btcv"
    found: dict[str, list[float]] = {}
    for path in sorted((results / "tumor_ext" / strategy).glob("*/scores.csv")):
        for line in csv.DictReader(path.open()):
            key = (line["step"], line["structure"], line["eval_set"], line["scoring"])
            if key == (str(step), structure, home, "strict"):
                found.setdefault(line["case"], []).append(float(line["value"]))
    return found


# ---------------------------------------------------------------------------- the numbers


def test_the_endpoints_are_frozen() -> None:
    assert [e.name for e in ENDPOINTS] == ["final", "kept", "new"]


def test_final_difference_from_the_files(results: Path, four: Analysis) -> None:
    """Class first, then classes alike; seeds averaged; cases without the class left out."""
    per_class = []
    for c in (*ORGANS, "liver_tumor"):
        a, b = (dice(results, s, 2, c) for s in ("universal", "finetune"))
        d = [np.mean(a[k]) - np.mean(b[k]) for k in a]
        per_class.append(np.mean([x for x in d if not math.isnan(x)]))
    found = of(four, "final", "finetune")
    assert result(found).mean.estimate == pytest.approx(np.mean(per_class), abs=1e-11)
    assert found.mean_a - found.mean_b == pytest.approx(np.mean(per_class), abs=1e-12)
    assert found.patients == {"btcv": 12, "lits": 11}  # the empty case of lits has no cell
    assert (found.classes, found.n, found.m, found.seeds) == (5, 23, 3, (0, 1, 2))


def test_new_and_kept_use_scipy_numbers(results: Path, four: Analysis) -> None:
    """One class: the sign flip of t is scipy's permutation test; `kept` is a difference in
    differences.
    """
    a, b = (dice(results, s, 2, "liver_tumor") for s in ("universal", "lwf_ct"))
    d = np.array([np.mean(a[k]) - np.mean(b[k]) for k in a])
    d = np.round(d[~np.isnan(d)], 12)
    expected = scipy_stats.permutation_test(
        (d,), lambda x, axis: np.abs(scipy_stats.ttest_1samp(x, 0, axis=axis).statistic),
        permutation_type="samples", n_resamples=np.inf, vectorized=True, alternative="greater",
    )  # fmt: skip
    found = of(four, "new", "lwf_ct")
    assert result(found).p_unadjusted == pytest.approx(expected.pvalue, abs=1e-12)
    assert result(found).mean.estimate == pytest.approx(d.mean(), abs=1e-12)
    organs = []
    for c in ORGANS:
        parts = [dice(results, s, t, c) for s in ("universal", "lwf_ct") for t in (2, 1)]
        did = [
            (np.mean(parts[0][k]) - np.mean(parts[1][k]))
            - (np.mean(parts[2][k]) - np.mean(parts[3][k]))
            for k in parts[0]
        ]
        organs.append(np.nanmean(did))
    kept = of(four, "kept", "lwf_ct")
    assert result(kept).mean.estimate == pytest.approx(np.mean(organs), abs=1e-11)
    assert kept.patients == {"btcv": 12}


def test_structure_rows_are_scipy_s(results: Path, four: Analysis) -> None:
    a, b = (dice(results, s, 2, "pancreas") for s in ("universal", "joint"))
    d = np.round([np.mean(a[k]) - np.mean(b[k]) for k in a], 6)
    d = d[~np.isnan(d)]
    (row,) = [r for r in four.classes if (r.structure, r.b, r.step) == ("pancreas", "joint", 2)]
    assert row.test.p == pytest.approx(scipy_stats.wilcoxon(d, method="exact").pvalue, abs=1e-12)
    assert row.n == 11  # one patient is not annotated for the pancreas
    tested = [r for r in four.classes if r.test.n]
    p = [r.test.p for r in tested]
    assert [r.p_bh for r in tested] == pytest.approx(scipy_stats.false_discovery_control(p))
    assert {r.m for r in four.classes} == {len(tested)}
    tumor = [r for r in four.classes if r.structure == "liver_tumor" and r.b == "joint"]
    assert [(r.missed, r.test.method) for r in tumor if r.test.n] == [((3, 3), "permutation")]


def test_a_family_is_the_max_t_of_its_tables(four: Analysis) -> None:
    """All comparisons of an endpoint are flipped together; so are all strategies' own changes."""
    ref, *others = four.dice.strategies
    a = table(four.dice, ref, KEPT, (0, 1, 2))
    spleen, before = (ref.cells[step, "btcv", "spleen"].values for step in (2, 1))
    assert a["btcv"][..., 0] == pytest.approx(spleen - before, nan_ok=True)
    tables = [
        {name: a[name] - b[name] for name in a}
        for b in (table(four.dice, m, KEPT, (0, 1, 2)) for m in others)
    ]
    expected = compare_family(tables, draws=2000)
    kept = [c for c in four.comparisons if c.endpoint is KEPT]
    assert [result(c) for c in kept] == list(expected.comparisons)
    assert {(c.m, c.flipped) for c in kept} == {(3, 12)}
    changes = [table(four.dice, m, KEPT, (0, 1, 2)) for m in four.dice.strategies]
    own = compare_family(changes, kind="change", draws=2000)
    assert [result(o) for o in four.own] == list(own.comparisons)


def test_holm_is_a_choice(results: Path) -> None:
    protocol = replace(QUICK, correction="holm")
    found = run(results, protocol=protocol)
    kept, other = (
        [result(c) for c in of.comparisons if c.endpoint is KEPT] for of in (found, run(results))
    )
    assert [r.p for r in kept] == pytest.approx(holm([r.p_unadjusted for r in kept]))
    assert [r.p for r in kept] != [r.p for r in other]
    assert any(n.startswith("Holm over 3 comparisons") for n in confirmatory_table(found).notes)
    assert any(
        n.startswith("Step-down max-T over 3") for n in confirmatory_table(run(results)).notes
    )


def test_words_follow_the_effects(four: Analysis) -> None:
    words = {
        (c.endpoint.name, c.b): c.verdict.word for c in four.comparisons if c.verdict is not None
    }
    assert words["final", "finetune"] == words["kept", "finetune"] == "better"
    assert words["final", "joint"] == words["kept", "joint"] == "equivalent"
    assert words["final", "lwf_ct"] == "better"
    # it starts 0.05 lower and ends 0.06 lower: of the final gap, only 0.01 is forgetting
    assert result(of(four, "kept", "lwf_ct")).mean.estimate == pytest.approx(0.01, abs=0.01)
    own = {o.method: str(result(o).verdict) for o in four.own}
    assert own["finetune"] == "forgets, by more than the margin"
    assert own["universal"] == "keeps"


SHIPPED = {
    "final": {"better": 10, "equivalent": 2, "undecided": 1},
    "kept": {"better": 8, "equivalent": 5},
    "new": {"better": 3, "undecided": 10},
}
"""Words over fourteen strategies on version 2 of the phantom, from an independent implementation."""


def test_fourteen_strategies_are_decided(phantom_2_runs: Path) -> None:
    found = run(phantom_2_runs / "reference", protocol=Protocol())
    for endpoint, words in SHIPPED.items():
        of_endpoint = [c for c in found.comparisons if c.endpoint.name == endpoint]
        assert Counter(result(c).verdict.word for c in of_endpoint) == words
    assert Counter(result(o).verdict.word for o in found.own) == {"forgets": 11, "keeps": 3}
    plop_ct = result(of(found, "final", "plop_ct"))
    assert (plop_ct.mean.estimate, plop_ct.low, plop_ct.high) == pytest.approx(
        (0.039, 0.032, 0.047), abs=6e-4
    )
    assert plop_ct.new_runs == pytest.approx((-0.018, 0.096), abs=6e-4)


def test_a_shared_first_step_is_never_tested(four: Analysis) -> None:
    first = [r for r in four.classes if r.step == 1]
    for r in first:
        shared = r.b != "lwf_ct"
        assert r.shared is shared
        assert (r.test.n == 0) is shared
        assert r.verdict is not None
        assert (r.verdict.word == "shared") is shared
    assert of(four, "final", "joint").first_shared
    assert not of(four, "final", "lwf_ct").first_shared


def test_one_name_with_other_scores_is_no_shared_first_step(tmp_path: Path) -> None:
    """The name of a checkpoint is believed only as far as the scores after step 1 bear it out."""
    make_runs(tmp_path, {"a": Method(), "b": Method(kept=-0.1)}, patients={"btcv": 8, "lits": 8})
    path = sorted((tmp_path / "tumor_ext" / "b").glob("*/scores.csv"))[1]
    rows = run_folder.read_scores(path)
    at = next(i for i, r in enumerate(rows) if r.step == 1 and r.status == "ok"
              and r.scoring == "strict")  # fmt: skip
    rows[at] = replace(rows[at], value=rows[at].value + 0.01)
    run_folder.write_scores(path, rows)
    found = run(tmp_path, reference="a")
    final = of(found, "final", "b")
    assert not final.first_shared
    assert any("scores after it differ (seed " in c for c in final.cautions)
    assert not any(r.shared for r in found.classes if r.step == 1)
    notes = Study(results=tmp_path, bench="tumor_ext").need_scores().notes()
    (note,) = [n for n in notes if n.startswith("not shared: a and b")]
    assert "score differently" in note


def test_bars_are_those_of_the_protocol(results: Path) -> None:
    for correction, test in (("max-t", max_t_pairs), ("holm", wilcoxon_holm)):
        found = run(results, protocol=replace(QUICK, correction=correction))
        own = {m.label: patient_macro(found.dice, m, FINAL, (0, 1, 2))["btcv"]
               for m in found.dice.strategies}  # fmt: skip
        expected, shown = test(own), found.rankings[0].pairs
        assert shown is not None
        assert shown.p_adjusted.tolist() == expected.p_adjusted.tolist()
        told = f"({found.protocol.ranked_by}, m = 6)"
        assert any(told in note for note in ranking_table(found).notes)


def test_rankings_and_stability(four: Analysis) -> None:
    btcv = four.rankings[0]
    assert btcv.pairs is not None
    assert btcv.friedman is not None
    assert btcv.pairs.names[-1] == "finetune"
    assert ("universal", "joint") in btcv.pairs.cliques or (
        "joint",
        "universal",
    ) in btcv.pairs.cliques
    assert 0 <= btcv.friedman.kendall_w <= 1
    assert four.stable.stability is not None
    assert four.stable.stability.full_ranks[four.stable.stability.names.index("finetune")] == 4


# ------------------------------------------------------------------------- three steps


def test_three_steps_and_a_structure_nobody_has(tmp_path: Path) -> None:
    make_runs(
        tmp_path, {"a": Method(), "b": Method(kept=-0.1)}, bench="body_ext", steps=THREE_STEPS
    )
    for path in tmp_path.rglob("scores.csv"):  # no case contains the colon
        rows = [
            replace(r, value=math.nan, status="both_empty", gt_vox=0)
            if r.structure == "colon"
            else r
            for r in run_folder.read_scores(path)
        ]
        run_folder.write_scores(path, rows)
    found = run(tmp_path, bench="body_ext", reference="a")
    final, kept, new = (of(found, e, "b") for e in ("final", "kept", "new"))
    for endpoint, step in ((final, 3), (kept, 3), (new, 2)):  # no mean of "all" leaves it out
        why = f"a: colon after step {step}, seed 0: no test case of jhh_gastro holds it"
        assert (endpoint.hole, endpoint.verdict) == (why, None)
    for asked in (KEPT, NEW):  # a structure without a mean leaves none of the others
        assert table(found.dice, found.dice.reference, asked, (0, 1, 2)) == {}
    holes = [r.hole for r in found.classes if r.structure == "colon"]
    assert len(holes) == 2
    assert all("no test case of jhh_gastro holds it" in hole for hole in holes)
    assert all(r.test.n for r in found.classes if r.structure == "duodenum")


def test_scans_of_one_patient_are_one_patient(tmp_path: Path) -> None:
    """Two scans of each of eight patients are eight, not sixteen: averaged before any test."""
    make_runs(tmp_path, {"a": Method(), "b": Method(kept=-0.1)}, patients={"btcv": 8, "lits": 5},
              scans=2)  # fmt: skip
    scores = Study(results=tmp_path, bench="tumor_ext", reference="a").dice
    assert scores.patients["btcv"] == tuple(map(str, range(100, 108)))
    assert scores.scans == {"btcv": 16, "lits": 10}
    values = scores.reference.cells[2, "btcv", "spleen"].values
    assert values.shape == (3, 8)
    scans = dice(tmp_path, "a", 2, "spleen")
    pair = np.mean([scans["101_0"], scans["101_1"]], axis=0)
    assert sorted(values[:, 1]) == pytest.approx(sorted(pair))
    kept = run(tmp_path, reference="a").comparisons[1]
    assert kept.patients == {"btcv": 8}
    assert result(kept).mean.n == kept.flipped == 8
    assert (result(kept).p * 2**7).is_integer()  # 2**15 would count each scan as a patient
    facts = dict(provenance(run(tmp_path, reference="a")))
    assert "btcv: 8 patients (16 scans, averaged by patient)" in facts["test patients"]
    # patients of two hospitals may bear one number
    numbered = {f"{source}/1_{scan}": "1" for source in ("btcv", "lits") for scan in (0, 1)}
    notes = "\n".join(replace(scores, patient_of=numbered).notes())
    assert "4 test cases are scans of 2 patients" in notes


def test_older_records_take_the_patients_from_the_others(tmp_path: Path) -> None:
    make_runs(tmp_path, {"a": Method(), "b": Method()}, patients={"btcv": 8, "lits": 5}, scans=2)
    damage(tmp_path, "a", lambda r: r["course"].pop("patient_of"))
    assert len(Study(results=tmp_path, bench="tumor_ext", reference="a").dice.patients["btcv"]) == 8
    damage(tmp_path, "b", lambda r: r["course"]["patient_of"].update({"btcv/100_0": "x"}))
    with pytest.raises(StoreError, match="different patients for one test case") as err:
        _ = Study(results=tmp_path, bench="tumor_ext", reference="a").dice
    assert "btcv/100_0" in str(err.value)


# ------------------------------------------------------------------- small n, one seed


def test_a_small_sample_is_not_testable_and_says_so(tmp_path: Path) -> None:
    make_runs(tmp_path, FOUR, patients={"btcv": 5, "lits": 5})
    a = run(tmp_path)
    kept = of(a, "kept", "finetune")
    assert result(kept).verdict.word == "not testable"
    assert math.isnan(result(kept).p)
    text = sentence(kept, QUICK)
    assert "not testable, too few patients: 5, at least 6 are needed" in text
    assert "universal is ahead in 5 of 5, by 0." in text
    assert "adjusted p" not in text
    # 9 patients in the two sets together are enough for a test, if not for this one
    assert result(of(a, "final", "finetune")).verdict.word != "not testable"
    assert {r.verdict.word for r in a.classes if r.step == 2 and r.verdict} == {"not testable"}
    assert all(result(o).verdict.word == "not testable" for o in a.own)
    assert "at least 6 are needed" in own_sentence(a.own[0], QUICK)


def test_an_undecided_comparison_says_what_would_decide(four: Analysis) -> None:
    (found,) = [c for c in four.comparisons if c.verdict and c.verdict.word == "undecided"][:1]
    text = sentence(found, QUICK)
    assert re.search(r"(about \d+|more than 1,000) patients \(\d+ now\) would", text)


def test_one_seed_is_said(tmp_path: Path) -> None:
    make_runs(tmp_path, {k: replace(m, seeds=(0,)) for k, m in FOUR.items()})
    c = of(run(tmp_path), "final", "finetune")
    assert math.isnan(result(c).over_runs)
    assert c.seed_wins is None
    assert any("one training run" in w for w in c.cautions)
    text = sentence(c, QUICK)
    assert "1 seed" in text
    assert "over new training runs" not in text
    assert "for these training runs" in text


def test_three_agreeing_seeds_lift_the_limit(tmp_path: Path) -> None:
    make_runs(
        tmp_path,
        {
            "universal": Method(),
            "finetune": Method(kept=-0.3),
        },
    )
    text = sentence(of(run(tmp_path), "final", "finetune"), QUICK)
    assert "is better than" in text
    assert "for these training runs" not in text


def test_only_common_seeds_are_paired(tmp_path: Path) -> None:
    make_runs(
        tmp_path,
        {"universal": Method(), "finetune": Method(seeds=(1, 2, 3)), "joint": Method(seeds=(7,))},
    )
    a = run(tmp_path)
    assert of(a, "final", "finetune").seeds == (1, 2)
    assert any("left out: [0, 3]" in w for w in of(a, "final", "finetune").cautions)
    joint = of(a, "final", "joint")
    assert joint.hole == "universal and joint have no seed in common"
    assert joint.m == 1
    assert joint.result is None
    assert a.stable.stability is None


def test_cases_missed_are_those_of_the_common_seeds(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "finetune": Method(seeds=(0,))})
    a = run(tmp_path)
    (row,) = [r for r in a.classes if r.structure == "liver_tumor"]
    assert (row.n_seeds, row.missed) == (1, (1, 1))  # one patient is missed by all


@pytest.mark.parametrize("estimate", [0.0, 0.01])
def test_nobody_is_ahead_of_an_equal(four: Analysis, estimate: float) -> None:
    values = np.array([0.375, -0.125, -0.125, -0.125])[:, None] + estimate
    (r,) = compare_family([{"btcv": values}]).comparisons
    text = sentence(replace(of(four, "final", "finetune"), result=r), QUICK)
    assert ("is ahead" in text) == (estimate > 0)


# ----------------------------------------------------------------------------- bad inputs


def test_a_missing_case_is_a_hole_with_its_name(tmp_path: Path) -> None:
    make_runs(tmp_path, {**FOUR, "finetune": replace(FOUR["finetune"], drop=[(2, "btcv/103")])})
    a = run(tmp_path)
    found = of(a, "final", "finetune")
    assert found.hole == (
        "finetune: spleen after step 2, seed 0: 1 of 12 test cases missing (btcv/103)"
    )
    assert found.verdict is None
    assert found.m == 2  # it left the family, and the family says so
    assert "no number" in sentence(found, QUICK)
    assert of(a, "new", "finetune").hole == ""  # the other set is whole
    assert of(a, "final", "joint").hole == ""
    assert {
        r.hole != ""
        for r in a.classes
        if r.b == "finetune" and r.step == 2 and r.eval_set == "btcv"
    } == {True}
    assert "finetune" not in (a.stable.stability.names if a.stable.stability else ())
    assert any("btcv/103" in w for w in a.stable.left_out)
    text = render(confirmatory_table(a), "md")
    assert "hole" in text


def damage(results: Path, strategy: str, change: Any) -> Path:
    path = sorted((results / "tumor_ext" / strategy).glob("*/run.json"))[0]
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("bench_version", 2, "bench_version"),
        ("data_fingerprint", "other", "data_fingerprint"),
        ("splits", [{"name": "x"}], "splits"),
        ("numerics", 2, "numerics"),
        ("profile", {"name": "paper"}, "profile"),
    ],
)
def test_mixtures_are_refused(tmp_path: Path, field: str, value: Any, word: str) -> None:
    make_runs(tmp_path, {k: replace(FOUR[k], seeds=(0,)) for k in ("universal", "joint")})
    damage(tmp_path, "joint", lambda r: r["identity"].update({field: value}))
    with pytest.raises(StoreError, match="do not belong in one table") as err:
        run(tmp_path)
    assert word in str(err.value.got)
    assert "next step" in str(err.value)


def test_phantom_beside_patients_is_refused(tmp_path: Path) -> None:
    make_runs(tmp_path, {k: replace(FOUR[k], seeds=(0,)) for k in ("universal", "joint")})
    damage(tmp_path, "joint", lambda r: r.update(patients=True))
    with pytest.raises(StoreError, match="do not belong") as err:
        run(tmp_path)
    assert "phantom and patients" in str(err.value)


def test_other_versions_of_a_metric_are_refused(tmp_path: Path) -> None:
    make_runs(tmp_path, {k: replace(FOUR[k], seeds=(0,)) for k in ("universal", "joint")})
    damage(tmp_path, "joint", lambda r: r.update(metrics={"dice": {"version": 2}}))
    with pytest.raises(StoreError, match="do not belong") as err:
        run(tmp_path)
    assert "different metric versions (dice)" in str(err.value)


def test_a_scoring_that_one_strategy_lacks_is_a_hole(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()})
    make_runs(tmp_path, {"joint": Method()}, scorings=["paper"])
    found = of(run(tmp_path), "final", "joint")
    assert found.hole == "joint: spleen after step 2, seed 0: not scored"
    assert found.verdict is None


def test_damaged_scores_are_refused_with_their_line(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,))})
    path = next(tmp_path.rglob("scores.csv"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:30], *lines[6:]]))
    with pytest.raises(StoreError, match="cannot be read") as err:
        run(tmp_path)
    assert "line 6" in str(err.value)
    path.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(StoreError, match="scored twice"):
        run(tmp_path)
    path.write_text("\n".join(lines[:1]))
    assert run(tmp_path).comparisons == []  # no one to compare with; the hole is in the one run
    assert run(tmp_path).own[0].hole


def test_scores_of_another_run_are_refused(tmp_path: Path) -> None:
    folders = make_runs(tmp_path, {"universal": Method(), "joint": Method()})
    (folders[0] / "scores.csv").write_bytes((folders[3] / "scores.csv").read_bytes())
    with pytest.raises(StoreError, match="another run") as err:
        run(tmp_path)
    assert "joint" in str(err.value)


def test_a_number_that_is_not_one_is_a_hole(tmp_path: Path) -> None:
    make_runs(tmp_path, FOUR)
    path = next((tmp_path / "tumor_ext" / "joint").rglob("scores.csv"))
    rows = run_folder.read_scores(path)
    at = next(
        i for i, r in enumerate(rows) if r.status == "ok" and r.step == 2 and r.scoring == "strict"
    )
    rows[at] = replace(rows[at], value=math.nan)
    run_folder.write_scores(path, rows)
    assert of(run(tmp_path), "final", "joint").hole


def test_the_reference_must_exist_and_be_one(tmp_path: Path, results: Path) -> None:
    with pytest.raises(UnknownName, match="univrsal") as err:
        run(results, reference="univrsal")
    assert "did you mean 'universal'" in str(err.value)
    make_runs(tmp_path, {"universal": Method(seeds=(0,))})
    make_runs(
        tmp_path, {"universal": Method(seeds=(0,), identity={"strategy": {"class": "U", "x": 1}})}
    )
    with pytest.raises(StoreError, match="several variants") as err:
        run(tmp_path)
    assert "universal (" in str(err.value)
    with pytest.raises(StoreError, match="no finished runs"):
        run(tmp_path / "nothing")


def test_the_protocol_refuses_nonsense() -> None:
    for options in ({"alpha": 0.0}, {"alpha": 0.7}, {"margin": 0.0}, {"margin": 1.5}):
        with pytest.raises(SettingError, match="no such"):
            Protocol(**options)


# ------------------------------------------------------------- sentences and their audit


def test_every_sentence_survives_its_audit(four: Analysis) -> None:
    rows = rows_of(confirmatory_table(four))
    assert len(rows) == len(four.comparisons) == 9
    for c, row in zip(four.comparisons, rows, strict=True):
        audit(sentence(c, QUICK), row, QUICK)
    kept = rows_of(own_table(four))
    assert len(kept) == len(four.own) == 4
    assert {result(o).verdict.word for o in four.own} >= {"forgets", "keeps"}
    for o, row in zip(four.own, kept, strict=True):
        audit_own(own_sentence(o, QUICK), row, QUICK)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("change", "-0.7"), ("high", "0.1"), ("p", "0.2"), ("p_low", "0.2"), ("m", "2"),
        ("method", "nobody"), ("hole", "gone"), ("seeds", "0"), ("n", "3"),
        ("new_runs_low", "-0.9"),
    ],
)  # fmt: skip
def test_the_audit_of_forgetting_catches_a_changed_number(
    four: Analysis, column: str, value: str
) -> None:
    rows = {r["method"]: r for r in rows_of(own_table(four))}
    for o in four.own:
        with pytest.raises(ClbenchError, match="contradicts its numbers"):
            audit_own(own_sentence(o, QUICK), {**rows[o.method], column: value}, QUICK)


def test_the_audit_of_forgetting_catches_a_changed_claim(four: Analysis) -> None:
    rows = {r["method"]: r for r in rows_of(own_table(four))}
    texts = {o.method: own_sentence(o, QUICK) for o in four.own}
    for name, old, new in (
        ("finetune", " forgets, by", " keeps its old structures, by"),
        ("finetune", "by more than", "by less than"),
        ("finetune", "finetune forgets", "for these training runs, finetune forgets"),
        ("finetune", "0.02 Dice or more", "0.05 Dice or more"),
        ("universal", " keeps its old structures; ", " gains on its old structures; "),
    ):
        wrong = texts[name].replace(old, new)
        assert wrong != texts[name]
        with pytest.raises(ClbenchError, match="contradicts its numbers"):
            audit_own(wrong, rows[name], QUICK)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("difference", "-0.4"), ("low", "0.1"), ("p", "0.2"), ("p_high", "0.01"), ("m", "2"),
        ("n", "22"), ("b", "nobody"), ("hole", "gone"), ("seeds", "0 1"), ("low_open", "True"),
        ("new_runs_high", "0.9"),
    ],
)  # fmt: skip
def test_the_audit_catches_a_changed_number(four: Analysis, column: str, value: str) -> None:
    c = of(four, "final", "finetune")
    row = rows_of(confirmatory_table(four))[four.comparisons.index(c)]
    audit(sentence(c, QUICK), row, QUICK)
    with pytest.raises(ClbenchError, match="contradicts its numbers"):
        audit(sentence(c, QUICK), {**row, column: value}, QUICK)


def test_the_audit_catches_a_changed_claim(four: Analysis) -> None:
    c = of(four, "final", "finetune")
    row, text = rows_of(confirmatory_table(four))[four.comparisons.index(c)], sentence(c, QUICK)
    for wrong in (
        text.replace("better", "worse"),
        text.replace(": 0.", ", for these training runs: 0.", 1),
        text.replace("is better than", "beats"),
        text.replace(" by more than 0.02 Dice", ""),
    ):
        assert wrong != text
        with pytest.raises(ClbenchError, match="contradicts its numbers"):
            audit(wrong, row, QUICK)


def with_row(a: Analysis, **computed: Any) -> Analysis:
    """The study with other results in place of its own."""
    other = copy.copy(a)
    other.__dict__.update(computed)
    return other


def any_family(seed: int, *, kind: Any, protocol: Protocol) -> tuple[Any, int]:
    """A tested family of random differences: large and small, constant, zero, with holes."""
    rng = np.random.default_rng(seed)
    n, seeds = int(rng.integers(4, 10)), int(rng.integers(1, 5))
    tables = []
    for _ in range(int(rng.integers(1, 6))):
        shift = rng.choice([0.0, 0.01, -0.015, 0.02, -0.3, 0.6])
        spread, run_sd = rng.choice([0.0, 0.003, 0.02]), rng.choice([0.0, 0.01])
        d = shift + rng.normal(0, 1, (1, n, 2)) * spread + rng.normal(0, 1, (seeds, 1, 1)) * run_sd
        d[:, rng.random((n, 2)) < 0.1] = np.nan
        tables.append({"btcv": d.round(4)})
    family = compare_family(
        tables, kind=kind, correction=protocol.correction, alpha=protocol.alpha,
        margin=protocol.margin,
    )  # fmt: skip
    return family, seeds


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([QUICK, replace(QUICK, correction="holm"), replace(QUICK, alpha=0.2)]),
)
def test_every_sentence_follows_from_any_numbers(
    four: Analysis, seed: int, protocol: Protocol
) -> None:
    family, seeds = any_family(seed, kind="difference", protocol=protocol)
    start = of(four, "kept", "finetune")
    found = [
        replace(start, result=r, m=family.m, patients={"btcv": r.mean.n}, seeds=tuple(range(seeds)))
        for r in family.comparisons
    ]
    study = with_row(four, comparisons=found, protocol=protocol)
    for c, row in zip(found, rows_of(confirmatory_table(study)), strict=True):
        audit(sentence(c, protocol), row, protocol)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([QUICK, replace(QUICK, correction="holm"), replace(QUICK, margin=0.005)]),
)
def test_every_sentence_about_forgetting_follows_from_any_numbers(
    four: Analysis, seed: int, protocol: Protocol
) -> None:
    family, seeds = any_family(seed, kind="change", protocol=protocol)
    found = [
        replace(
            four.own[0], result=r, m=family.m, patients={"btcv": r.mean.n},
            seeds=tuple(range(seeds)),
        )
        for r in family.comparisons
    ]  # fmt: skip
    study = with_row(four, own=found, protocol=protocol)
    for o, row in zip(found, rows_of(own_table(study)), strict=True):
        audit_own(own_sentence(o, protocol), row, protocol)


def test_csv_holds_full_precision(four: Analysis) -> None:
    tables = all_tables(four)
    assert list(tables) == ["confirmatory", "forgetting", "structures", "eval_sets", "ranking"]
    for row, c in zip(rows_of(tables["confirmatory"]), four.comparisons, strict=True):
        assert float(row["difference"]) == result(c).mean.estimate
        assert float(row["p"]) == result(c).p
    for name, t in tables.items():
        assert "PHANTOM" in t.title, name


def test_the_same_runs_give_the_same_report(results: Path, four: Analysis) -> None:
    again = run(results)
    for name, t in all_tables(four).items():
        assert render(all_tables(again)[name], "csv") == render(t, "csv"), name


def test_more_than_twenty_patients_are_sampled_with_their_own_limit(four: Analysis) -> None:
    found = [result(c) for c in four.comparisons if c.endpoint is FINAL]
    assert {c.flipped for c in four.comparisons if c.endpoint is FINAL} == {23}
    assert min(r.p for r in found) >= 1 / 2000
    assert all(round(r.p * 2000, 6).is_integer() for r in found)


def test_a_structure_lost_in_resampling_is_no_structure_that_nobody_holds(tmp_path: Path) -> None:
    """Two voxels of the file fall between those of the model's grid, which the paper scores on."""
    make_runs(
        tmp_path, {"a": Method(), "b": Method(kept=-0.1)}, bench="body_ext", steps=THREE_STEPS
    )
    for path in tmp_path.rglob("scores.csv"):
        rows = [
            replace(r, value=math.nan, status="both_empty", gt_vox=0)
            if (r.structure, r.scoring) == ("colon", "paper")
            else r
            for r in run_folder.read_scores(path)
        ]
        run_folder.write_scores(path, rows)
    holes = [
        r.hole
        for r in run(tmp_path, bench="body_ext", reference="a", scoring="paper").classes
        if r.structure == "colon"
    ]
    assert holes
    assert all("on the model's grid: what the files hold is lost" in hole for hole in holes)
    strict = run(tmp_path, bench="body_ext", reference="a").classes
    assert not any(r.hole for r in strict if r.structure == "colon")


ELSEWHERE = [
    replace(QUICK, alpha=0.0004, margin=0.05),
    replace(QUICK, alpha=0.0004, correction="holm"),
    replace(QUICK, alpha=0.2, correction="holm", seed=5),
]


@pytest.mark.parametrize("protocol", ELSEWHERE, ids=str)
def test_the_protocol_reaches_the_confirmatory_family(results: Path, protocol: Protocol) -> None:
    found = run(results, protocol=protocol)
    ref, *others = (table(found.dice, m, FINAL, (0, 1, 2)) for m in found.dice.strategies)
    expected = compare_family(
        [{name: ref[name] - b[name] for name in ref} for b in others],
        alpha=protocol.alpha, margin=protocol.margin, correction=protocol.correction,
        draws=protocol.draws, seed=protocol.seed,
    )  # fmt: skip
    final = [result(c) for c in found.comparisons if c.endpoint is FINAL]
    for r, e in zip(final, expected.comparisons, strict=True):
        assert (r.p, r.low, r.high) == pytest.approx((e.p, e.low, e.high), nan_ok=True)
        assert r.verdict.word == e.verdict.word


@pytest.mark.parametrize("protocol", ELSEWHERE, ids=str)
def test_the_protocol_reaches_the_tie_groups(results: Path, protocol: Protocol) -> None:
    found = run(results, protocol=protocol)
    expected = tie_groups(
        [table(found.dice, m, FINAL, (0, 1, 2)) for m in found.dice.strategies],
        alpha=protocol.alpha, correction=protocol.correction, draws=protocol.draws,
        seed=protocol.seed,
    )  # fmt: skip
    assert found.tied.ties is not None
    assert found.tied.ties.p.tolist() == expected.p.tolist()
    assert found.tied.ties.groups == expected.groups


@pytest.mark.parametrize("correction", ["max-t", "holm"])
def test_the_level_reaches_the_bars(results: Path, correction: Any) -> None:
    found = run(results, protocol=replace(QUICK, alpha=0.0004, correction=correction))
    pairs = found.rankings[0].pairs
    assert pairs is not None
    assert pairs.cliques == (pairs.names,)  # 12 patients cannot reach it


def test_the_level_reaches_the_words_of_structures(results: Path) -> None:
    words = {
        alpha: {
            r.verdict.word
            for r in run(results, protocol=replace(QUICK, alpha=alpha)).classes
            if r.verdict and (r.b, r.step, r.structure) == ("finetune", 2, "spleen")
        }
        for alpha in (0.05, 0.001, 0.0004)
    }
    assert words == {0.05: {"better"}, 0.001: {"undecided"}, 0.0004: {"not testable"}}


def test_numbers_of_structures_have_the_sign_of_reference_minus_other(four: Analysis) -> None:
    lost = [r for r in four.classes if (r.b, r.step) == ("finetune", 2) and r.structure in ORGANS]
    assert len(lost) == 4
    for r in lost:
        assert r.mean_a > r.mean_b + 0.3
        assert r.pseudomedian.estimate == pytest.approx(r.mean_a - r.mean_b, abs=0.05)
        assert r.rank_biserial == 1.0
        assert r.verdict is not None
        assert r.verdict.word == "better"
    tested = [r for r in four.classes if r.test.n]
    assert [r.p_holm for r in tested] == pytest.approx(holm([r.test.p for r in tested]))


def test_columns_of_structures(four: Analysis) -> None:
    (row,) = [r for r in four.classes if (r.b, r.step, r.structure) == ("finetune", 2, "liver")]
    printed = class_table(with_row(four, classes=[replace(row, missed=(1, 2))]))
    cells = dict(zip(printed.columns, printed.rows[0], strict=True))
    assert (cells["universal"], cells["other's"]) == (number(row.mean_a), number(row.mean_b))
    assert cells["missed"] == "1 / 2"


def test_eval_sets_are_tested_by_scipy_s_numbers(four: Analysis) -> None:
    (row,) = [r for r in four.sets if (r.eval_set, r.b) == ("btcv", "lwf_ct")]
    by_label = {m.label: m for m in four.dice.strategies}
    a, b = (
        patient_macro(four.dice, by_label[name], FINAL, (0, 1, 2))["btcv"]
        for name in ("universal", "lwf_ct")
    )
    d = a - b
    sd = d.std(ddof=1)
    assert d.mean() > 0.03
    assert (row.mean.estimate, row.dz) == pytest.approx((d.mean(), d.mean() / sd))
    assert row.rank_biserial == 1.0
    assert [t.p for t in row.tests] == pytest.approx([
        scipy_stats.wilcoxon(np.round(d, 6), method="exact").pvalue,
        scipy_stats.ttest_1samp(d, 0).pvalue,
        scipy_stats.binomtest(int((d > 0).sum()), d.size).pvalue,
    ])  # fmt: skip
    assert row.detectable == pytest.approx(detectable_effect(d.size) * sd)
    assert row.posterior is not None
    assert row.posterior.p_a > 0.9


def test_equivalence_of_eval_sets_is_tested_at_the_margin(four: Analysis) -> None:
    (row,) = [r for r in four.sets if (r.eval_set, r.b) == ("btcv", "joint")]
    a, b = (
        patient_macro(four.dice, m, FINAL, (0, 1, 2))["btcv"]
        for m in four.dice.strategies
        if m.label in ("universal", "joint")
    )
    above = scipy_stats.ttest_1samp(a - b, -0.02, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(a - b, 0.02, alternative="less").pvalue
    assert row.tost is not None
    found = (row.tost.p, row.tost.p_above_low, row.tost.p_below_high)
    assert found == pytest.approx((max(above, below), above, below), rel=1e-6, abs=0)


def test_columns_of_eval_sets(four: Analysis) -> None:
    (row,) = [r for r in four.sets if (r.eval_set, r.b) == ("btcv", "lwf_ct")]
    printed = set_table(with_row(four, sets=[row]))
    cells = dict(zip(printed.columns, printed.rows[0], strict=True))
    assert row.tost is not None
    assert row.posterior is not None
    for column, p in zip(
        ("p Wilcoxon", "p t", "p sign", "p within ±0.02"),
        (*(t.p for t in row.tests), row.tost.p),
        strict=True,
    ):
        assert cells[column] == p_text(p, 0.05, sign=False), column
    assert cells["P ahead / equal / behind"].startswith(f"{row.posterior.p_a:.2f} / ")


def test_a_test_that_says_otherwise_is_named(four: Analysis) -> None:
    tests = four.sets[0].tests
    found = [replace(t, p=p) for t, p in zip(tests, (0.01, 0.2, 0.3), strict=True)]
    assert _disagreement(found, 0.05) == "wilcoxon rejects, paired t and sign test not"


def test_columns_of_the_confirmatory_table(four: Analysis) -> None:
    printed = confirmatory_table(four)
    for row, c in zip(printed.rows, four.comparisons, strict=True):
        cells, r = dict(zip(printed.columns, row, strict=True)), result(c)
        assert cells["p"] == p_text(r.p, 0.05, sign=False)
        assert cells["p equivalent"] == p_text(r.p_equivalent, 0.05, sign=False)
        assert cells["detectable"] == (EMPTY if r.beyond_detectable else number(r.detectable))
    own = own_table(four)
    for row, o in zip(own.rows, four.own, strict=True):
        cells = dict(zip(own.columns, row, strict=True))
        assert cells["p of a loss below 0.02"] == p_text(result(o).p_low, 0.05, sign=False)


def test_what_was_found_beyond_detectable_has_no_such_number(four: Analysis) -> None:
    """An undecided difference larger than what `detectable` holds to be shown."""
    c = of(four, "final", "finetune")
    for detectable, text in ((0.01, EMPTY), (0.9, "0.900")):
        r = replace(result(c), verdict=Verdict(word="undecided"), detectable=detectable)
        printed = confirmatory_table(with_row(four, comparisons=[replace(c, result=r)]))
        cells = dict(zip(printed.columns, printed.rows[0], strict=True))
        assert cells["detectable"] == text


def test_the_csv_holds_what_was_planned(four: Analysis) -> None:
    for row, c in zip(rows_of(confirmatory_table(four)), four.comparisons, strict=True):
        r = result(c)
        for column, value in (("level", r.level), ("level_left", r.level_left),
                              ("detectable", r.detectable)):  # fmt: skip
            assert float(row[column]) == pytest.approx(value, nan_ok=True), column


def test_wins_over_seeds_are_those_of_the_reference(four: Analysis) -> None:
    wins = of(four, "final", "finetune").seed_wins
    assert wins is not None
    assert wins.estimate == 1.0


def test_empty_truths_scored_stand_beside(four: Analysis) -> None:
    """Both leave the one empty case empty, which then counts as an equal twelfth patient."""
    c = of(four, "new", "lwf_ct")
    assert c.with_empty == pytest.approx(result(c).mean.estimate * 11 / 12)


def test_the_one_ahead_is_named_where_it_is_the_other(four: Analysis) -> None:
    values = -np.array([[0.1], [0.2], [-0.05], [0.3], [0.25]])
    (r,) = compare_family([{"btcv": values}]).comparisons
    text = sentence(replace(of(four, "final", "finetune"), result=r), QUICK)
    assert "finetune is ahead in 4 of 5, by 0.100 to 0.300" in text


def test_a_mean_that_one_patient_decides_is_said(four: Analysis) -> None:
    r = result(of(four, "final", "finetune"))
    for share, said in ((0.5, False), (0.51, True)):
        told = statistical_cautions(replace(r, mean=replace(r.mean, largest_share=share)))
        assert (ONE_DECIDES in told) is said


def test_structures_that_count_per_endpoint(four: Analysis) -> None:
    assert {c.endpoint.name: c.classes for c in four.comparisons} == {
        "final": 5, "kept": 4, "new": 1,
    }  # fmt: skip


def test_patients_that_are_ranked_are_those_with_a_score(four: Analysis) -> None:
    assert [(r.eval_set, r.n) for r in four.rankings] == [("btcv", 12), ("lits", 11)]


def test_the_stability_of_a_ranking_as_printed(four: Analysis) -> None:
    s = four.stable.stability
    assert s is not None
    assert s.n_seeds == 3
    printed = {row[1]: row for row in ranking_table(four).rows if row[0] == "all, class macro"}
    for k, name in enumerate(s.names):
        shares = " ".join(f"{x:.2f}" for x in s.rank_share[k])
        assert printed[name][2:] == (f"{s.full_ranks[k]:g}", f"{s.p_first[k]:.2f}", shares)


def test_a_case_missing_at_its_own_step_is_a_hole_of_what_is_kept(tmp_path: Path) -> None:
    make_runs(tmp_path, {**FOUR, "lwf_ct": replace(FOUR["lwf_ct"], drop=[(1, "btcv/103")])})
    found = run(tmp_path)
    why = "lwf_ct: spleen after step 1, seed 0: 1 of 12 test cases missing (btcv/103)"
    assert of(found, "kept", "lwf_ct").hole == why
    assert [o.hole for o in found.own] == ["", "", "", why]
    assert of(found, "final", "lwf_ct").hole == ""


def test_one_run_is_said_of_forgetting_too(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,))})
    assert any("one training run" in caution for caution in run(tmp_path).own[0].cautions)
