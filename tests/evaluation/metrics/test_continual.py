"""Every continual measure by name: by hand, where definitions part, n/a with a reason; the trace."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from locations import GOLDEN_FILES

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.evaluation.metrics.continual import NAMES, ONE_STEP, Quantity, course_metrics
from clbench.evaluation.metrics.stability_gap import (
    TraceRow,
    curves,
    lowest,
    read_trace,
    stability_gap,
    write_trace,
)
from clbench.store.run_folder import Score

AT = {"spleen": 1, "liver": 1, "pancreas": 2, "liver_tumor": 3}
R = {
    (1, "spleen"): 0.8, (1, "liver"): 0.6,
    (2, "spleen"): 0.9, (2, "liver"): 0.5, (2, "pancreas"): 0.7,
    (3, "spleen"): 0.4, (3, "liver"): 0.7, (3, "pancreas"): 0.5, (3, "liver_tumor"): 0.3,
}  # fmt: skip
JOINT = {(2, "pancreas"): 0.9, **{(3, c): 0.8 for c in AT}}


def test_of_a_distance_the_smallest_is_the_best_and_a_loss_has_the_sign_of_a_loss() -> None:
    """The same scores as lengths that grow where Dice falls: every difference stays."""
    dice = course_metrics(R, AT, 3, joint=JOINT)
    lengths, joint = ({key: 10 - value for key, value in of.items()} for of in (R, JOINT))
    found = course_metrics(lengths, AT, 3, joint=joint, higher_is_better=False)
    means = ("old", "new", "all", "all_by_step", "learning", "learning_all", "average_incremental")
    for name in means:
        assert found[name].value == pytest.approx(10 - dice[name].value), name
    ratio = "relative_joint"
    for name in set(NAMES) - {*means, "harmonic", "forward", ratio}:
        assert found[name].value == pytest.approx(dice[name].value), name
    assert found[ratio].value == pytest.approx((10 - 0.475) / 9.2)
    assert "harmonic mean" in found["harmonic"].reason
    assert math.copysign(1, course_metrics(dict.fromkeys(R, 0.0), AT, 3,
                                           higher_is_better=False)["all"].value) == 1  # fmt: skip
    neither = course_metrics(R, AT, 3, joint=JOINT, higher_is_better=None)
    assert neither["all"].value == dice["all"].value
    assert {neither[name].reason for name in ("bwt", "forgetting", "delta_joint", ratio)} == {
        continual.NO_DIRECTION
    }


def test_three_steps_by_hand() -> None:
    found = course_metrics(R, AT, 3, joint=JOINT)
    assert set(found) == set(NAMES)
    wanted = {
        "old": (0.4 + 0.7 + 0.5) / 3,
        "new": 0.3,
        "all": (0.4 + 0.7 + 0.5 + 0.3) / 4,
        "all_by_step": ((0.4 + 0.7) / 2 + 0.5 + 0.3) / 3,
        "bwt": (-0.4 + 0.1 - 0.2) / 3,
        "bwt_all_pairs": (0.1 - 0.1 - 0.4 + 0.1 - 0.2) / 5,
        "forgetting": (0.5 - 0.1 + 0.2) / 3,  # the liver gained in the last step
        "forgetting_first_last": (0.4 - 0.1 + 0.2) / 3,
        "forgetting_mammoth": (0.5 + 0.0 + 0.2) / 3,
        "learning": (0.7 + 0.3) / 2,
        "learning_all": (0.8 + 0.6 + 0.7 + 0.3) / 4,
        "average_incremental": (0.7 + 0.7 + 0.475) / 3,
        "harmonic": 2 * (1.6 / 3) * 0.3 / (1.6 / 3 + 0.3),
        "intransigence": (0.2 + 0.5) / 2,
        "delta_joint": (-0.4 - 0.1 - 0.3 - 0.5) / 4,
        "relative_joint": 0.475 / 0.8,
    }
    assert {k: v.value for k, v in found.items() if k != "forward"} == pytest.approx(wanted)
    assert len({round(found[k].value, 9) for k in NAMES if k.startswith("forgetting")}) == 3
    assert "class-incremental" in found["forward"].reason


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_with_two_steps_the_definitions_meet(v: list[float]) -> None:
    at = {"spleen": 1, "liver": 1, "liver_tumor": 2}
    r = dict(zip([(1, "spleen"), (1, "liver"), (2, "spleen"), (2, "liver"), (2, "liver_tumor")], v,
                 strict=True))  # fmt: skip
    found = {k: q.value for k, q in course_metrics(r, at, 2).items()}
    assert found["bwt"] == pytest.approx(found["bwt_all_pairs"])
    assert found["forgetting"] == pytest.approx(-found["bwt"])
    assert found["forgetting_first_last"] == pytest.approx(-found["bwt"])
    assert found["forgetting_mammoth"] >= max(0.0, found["forgetting"] - 1e-12)
    low, high = sorted((found["old"], found["new"]))
    assert low - 1e-12 <= found["harmonic"] <= high + 1e-12
    assert found["learning"] == found["new"] == v[4]
    assert found["all"] == pytest.approx((2 * found["old"] + found["new"]) / 3)
    same = course_metrics(r, at, 2, joint=r)  # a run is neither better nor worse than itself
    assert same["intransigence"].value == same["delta_joint"].value == 0
    if found["all"] > 0:
        assert same["relative_joint"].value == pytest.approx(1)


@given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_forgetting_is_ordered_at_any_number_of_steps(last: int, random: object) -> None:
    names = ["spleen", "liver", "pancreas", "stomach", "aorta"][:last]
    at = {c: i for i, c in enumerate(names, 1)}
    r = {(t, c): random.random() for c, s in at.items() for t in range(s, last + 1)}  # type: ignore[attr-defined]
    first, best, any_ = (
        f(r, at, last)
        for f in (
            continual.forgetting_first_last,
            continual.forgetting,
            continual.forgetting_mammoth,
        )
    )
    assert all(first[c] <= best[c] <= any_[c] and any_[c] >= 0 for c in names[:-1])
    assert all(any_[c] == max(0.0, best[c]) for c in names[:-1])


def test_what_does_not_exist_says_why() -> None:
    found = course_metrics({(1, "spleen"): 0.8}, {"spleen": 1}, 1)
    assert found["all"].value == found["average_incremental"].value == 0.8
    assert found["bwt"].reason == found["old"].reason == ONE_STEP
    assert "no run of joint" in found["intransigence"].reason

    holed = {k: v for k, v in R.items() if k != (2, "liver")}
    found = course_metrics(holed, AT, 3, joint=JOINT)
    assert found["bwt"].value == pytest.approx(-0.5 / 3)  # does not need step 2
    for name in ("forgetting", "forgetting_mammoth", "bwt_all_pairs", "average_incremental"):
        assert found[name].reason == "liver has no score after step 2", name
    found = course_metrics(R, AT, 3, joint={(3, "liver"): 0.8})
    assert found["delta_joint"].reason.startswith("joint training: spleen has no score")
    assert found["delta_joint"].reason.endswith("(and 2 more)")
    assert found["intransigence"].reason.startswith("joint training: pancreas")
    zero = course_metrics(R, AT, 3, joint=dict.fromkeys(JOINT, 0.0))
    assert zero["relative_joint"].reason == "joint training scores 0"
    with pytest.raises(ValueError, match="reason"):
        Quantity(value=math.nan)
    with pytest.raises(ValueError, match="reason"):
        Quantity(value=1.0, reason="no")


def row(**more: object) -> Score:
    plain = Score(
        bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="btcv", case="1",
        structure="liver", learned_at=1, scoring="strict", metric="dice", value=0.5, gt_vox=1,
        pred_vox=1, status="ok",
    )  # fmt: skip
    return replace(plain, **more)  # type: ignore[arg-type]


def test_nsd_stands_for_each_structures_own_tolerance() -> None:
    rows = [
        row(metric="nsd_1mm", value=0.1), row(metric="nsd_2mm", value=0.2),
        row(metric="nsd_1mm", value=0.3, structure="aorta"),
        row(metric="nsd_2mm", value=0.4, structure="aorta"),
    ]  # fmt: skip
    found = continual.matrix(rows, ("btcv",), scoring="strict", metric="nsd")
    assert {c: value for (_, c), value in found.items()} == {"liver": 0.2, "aorta": 0.3}


# ------------------------------------------------------------------------------------------ trace


def trace(values: list[float], structure: str = "liver", learned_at: int = 1) -> list[TraceRow]:
    return [
        TraceRow(step=2, update=10 * i, eval_set="btcv", case=case, structure=structure,
                 learned_at=learned_at, value=v + shift, status="ok")
        for i, v in enumerate(values)
        for case, shift in (("5", 0.01), ("6", -0.01))
    ]  # fmt: skip


def test_the_gap_of_the_golden_curve() -> None:
    golden = json.loads((GOLDEN_FILES / "segmentation.json").read_text())
    golden = golden["stability_gap"]
    rows = trace(golden["input"]["old_task_dsc_vs_iter"])
    rows += trace([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "liver_tumor", 2)
    gap = stability_gap(curves(rows, 2), {"liver": 1, "liver_tumor": 2}, 2)
    assert gap is not None
    wanted = golden["expected"]
    assert gap.before == pytest.approx(golden["input"]["before"])
    assert gap.lowest == pytest.approx(wanted["min"])
    assert gap.depth == pytest.approx(wanted["gap_depth_before_minus_min"])
    assert gap.transient == pytest.approx(wanted["transient_component_end_minus_min"])
    assert gap.persistent == pytest.approx(wanted["persistent_forgetting_before_minus_end"])
    assert gap.min_acc == pytest.approx(0.52)
    assert gap.wc_acc == pytest.approx(0.5 * 0.52 + 0.5 * 0.5)
    # the lowest of the mean is above the mean of the lowest
    rows = trace([0.9, 0.1, 0.9]) + trace([0.9, 0.9, 0.1], "spleen")
    gap = stability_gap(curves(rows, 2), {"liver": 1, "spleen": 1}, 2)
    assert gap is not None
    assert (gap.lowest, gap.min_acc) == (pytest.approx(0.5), pytest.approx(0.1))
    assert math.isnan(gap.wc_acc)  # the new structure was not traced


def test_the_lowest_value_of_a_structure_is_since_it_was_learned() -> None:
    """As De Lange et al. have it: the dip of step 2 stays in the minimum of step 3."""
    learned = {"liver": 1, "kidney": 2, "spleen": 3}
    second = {"liver": {0: 0.9, 1: 0.1, 2: 0.8}, "kidney": {0: 0.0, 2: 0.9}}
    third = {
        "liver": {0: 0.8, 1: 0.6, 2: 0.7},
        "kidney": {0: 0.9, 1: 0.7, 2: 0.8},
        "spleen": {0: 0.0, 1: 0.3, 2: 0.9},
    }
    before = lowest(second, learned, 2)
    assert before == {"liver": 0.1}
    gap = stability_gap(third, learned, 3, before)
    assert gap is not None
    assert gap.lowest == pytest.approx(0.65)  # of the mean, in this step
    assert gap.min_acc == pytest.approx((0.1 + 0.7) / 2)
    assert gap.wc_acc == pytest.approx(2 / 3 * 0.4 + 0.9 / 3)
    assert lowest({"liver": {0: 0.5, 1: 0.8, 2: 0.7}}, learned, 2) == {"liver": 0.7}  # after one


def test_no_gap_without_old_structures_or_a_beginning() -> None:
    assert stability_gap({}, {}, 2) is None
    rows = trace([0.5, 0.6], "liver_tumor", 2)
    assert stability_gap(curves(rows, 2), {"liver_tumor": 2}, 2) is None
    late = [replace(r, update=r.update + 10) for r in trace([0.5, 0.6])]
    assert stability_gap(curves(late, 2), {"liver": 1}, 2) is None
    with pytest.raises(StoreError, match="same cases at every update"):
        curves(trace([0.5, 0.6])[:-1], 2)
    with pytest.raises(StoreError, match="same cases at every update"):
        curves(trace([0.5, 0.6]) + trace([0.5], "spleen"), 2)


def test_the_trace_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = trace([0.5, 0.25])
    rows.append(replace(rows[0], structure="spleen", value=math.nan, status="both_empty"))
    write_trace(path, reversed(rows))
    first = path.read_bytes()
    again = read_trace(path, ["btcv/21"])
    write_trace(path, again)
    assert path.read_bytes() == first
    assert set(curves(again, 2)) == {"liver"}
    with pytest.raises(StoreError, match="looks at a test case"):
        read_trace(path, ["btcv/5"])
    path.write_bytes(first.replace(b"0.24", b"0.2x4", 1))
    with pytest.raises(StoreError, match="cannot be read") as err:
        read_trace(path, [])
    assert "line 6" in str(err.value)
    path.write_text("step,update\n")
    with pytest.raises(StoreError, match="other columns"):
        read_trace(path, [])
    with pytest.raises(StoreError, match="trace of a run cannot be read"):
        read_trace(tmp_path / "absent.csv", [])
