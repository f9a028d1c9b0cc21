"""Splits held against data: one image under several names, names of files for case ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.data.checks.course_splits import (
    asked_first,
    chosen,
    content_problems,
    course_problems,
    file_names,
    missing,
    resolve,
    settle,
    unmatched,
)
from clbench.data.layouts import CaseFiles
from clbench.errors import SettingError, SpecError
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark, ExternalTest, Partial
from clbench.spec.splits import PARTS, Draw, Split

BENCH = registry.benchmark("tumor_ext")
ORGANS, TUMOR = BENCH.steps


def of(*cases: str, image: str = "imagesTr/img{:04d}.nii.gz") -> dict[str, CaseFiles]:
    return {
        c: CaseFiles(
            case=c,
            image=Path(image.format(int(c))),
            label=Path(f"labelsTr/label{int(c):04d}.nii.gz"),
        )
        for c in cases
    }


@pytest.mark.parametrize("first", PARTS)
@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("across", ["within a source", "across sources"])
def test_one_image_under_two_names_is_refused_in_all_parts(
    first: str, second: str, across: str
) -> None:
    organs = {"train": ["1"], "validation": ["2"], "test": ["3"]}
    tumor = {"train": ["11"], "validation": ["12"], "test": ["13"]}
    organs[first].append("8")
    (organs if across == "within a source" else tumor)[second].append("9")
    course = [
        (step, Split(name="s", **{p: tuple(c) for p, c in parts.items()}))  # type: ignore[arg-type]
        for step, parts in ((ORGANS, organs), (TUMOR, tumor))
    ]
    twins = ("8", "9")
    problems = content_problems(course, lambda s, c: "twin" if c in twins else f"{s}/{c}")
    (problem,) = problems
    both = " ".join(problem.fields().values())
    assert "case 8" in both
    assert "case 9" in both
    earlier, later = sorted((first, second), key=PARTS.index)
    assert problem.what == (
        f"the same image stands under two names in {first}"
        if first == second
        else f"the same case is in {earlier} and in {later}"
    )
    assert not list(content_problems(course, lambda s, c: f"{s}/{c}"))


def test_a_split_that_nothing_would_use_is_refused() -> None:
    split = Split(name="s", train=("1",), test=("2",))
    assert chosen(BENCH, {ORGANS.name: split}) == [split, None]
    with pytest.raises(SettingError, match="nothing would use") as err:
        chosen(BENCH, {ORGANS.source: split, ORGANS.name: split})
    assert f"splits of their own for {ORGANS.name}" in str(err.value)
    idle = replace(BENCH.source("btcv"), name="ward")
    with pytest.raises(SettingError, match="nothing would use"):
        chosen(replace(BENCH, sources=(*BENCH.sources, idle)), {"ward": split})
    drawn = Split(name="s", draw=Draw(seed=1, train=2, test=1, part=2))
    assert chosen(BENCH, {ORGANS.name: drawn}) == [drawn, None]
    with pytest.raises(SettingError, match="a block of its own"):
        chosen(BENCH, {ORGANS.source: drawn})


def test_one_name_in_two_steps_is_one_case() -> None:
    split = Split(name="s", train=("1",), test=("3",))
    more = replace(ORGANS, name="more")
    assert not list(content_problems([(ORGANS, split), (more, split)], lambda s, c: c))


def test_two_test_cases_never_have_one_file_in_a_run() -> None:
    one, two = (replace(BENCH.sources[0], name=name, patient="(.+)") for name in ("a", "a_b"))
    steps = [replace(ORGANS, name="s", source="a"), replace(ORGANS, name="t", source="a_b")]
    bench = replace(BENCH, sources=(one, two), steps=tuple(steps)[:1], groups={})
    files = {name: of("1", "2", "3") | {"b_1": of("4")["4"]} for name in ("a", "a_b")}

    def told(first: tuple[str, ...], second: tuple[str, ...]) -> list[str]:
        splits = (Split(name="s", train=("2",), test=tests) for tests in (first, second))
        course = list(zip(steps, splits, strict=True))
        problems = course_problems(course, bench, files, patients=False)
        return [
            str(p) for p in problems if p.what == "two test cases would have one file in the run"
        ]

    assert told(("b_1",), ("3",)) == told(("1",), ("b_1",)) == []
    (problem,) = told(("3", "b_1"), ("1",))
    assert "a_b case 1" in problem
    assert "a_b_1, as of a case b_1" in problem


def test_names_of_files_stand_for_ids() -> None:
    have = of("1", "61")
    names = file_names(have)
    assert {n for n, c in names.items() if c == "61"} == {
        "img0061", "img0061.nii.gz", "label0061", "label0061.nii.gz", "0061",
    }  # fmt: skip
    given_ = Split(name="s", train=("img0001",), test=("0061",))
    taken = resolve(given_, BENCH.sources[0], have, None)
    assert (taken.train, taken.test) == (("1",), ("61",))
    assert resolve(replace(taken, name="s"), BENCH.sources[0], have, None) == taken
    with pytest.raises(SpecError, match="listed twice in train") as err:
        resolve(replace(given_, train=("1", "img0001")), BENCH.sources[0], have, None)
    assert err.value.got == "1"
    rule = Split(name="s", draw=Draw(seed=0, train=1, test=1, without=("img0061",)))
    with pytest.raises(SpecError, match="too few patients"):
        resolve(rule, BENCH.sources[0], have, None)


def test_the_folder_of_a_case_stands_for_it() -> None:
    """As people write cases of KiTS."""
    have = of("3", "12", image="case_{:05d}/imaging.nii.gz")
    have = {c: replace(f, label=f.image.with_name("segmentation.nii.gz")) for c, f in have.items()}
    names = {"case_00003": "3", "00003": "3", "case_00012": "12", "00012": "12"}
    assert file_names(have) == names
    for word in ("case_00003", "00003", "3"):
        rule = Split(name="s", draw=Draw(seed=0, train=1, test=1, without=(word,)))
        with pytest.raises(SpecError, match="too few patients"):
            resolve(rule, BENCH.sources[0], have, None)
    among = Split(name="s", draw=Draw(seed=0, train=1, test=1, among=("case_00003", "00012")))
    assert sorted(resolve(among, BENCH.sources[0], have, None).cases) == ["12", "3"]


def test_ids_that_name_no_case_are_told() -> None:
    rule = Draw(seed=0, train=1, test=1, without=("img0007", "s01..s03"), among=("7", "61"))
    drawn = [Split(name="mine", draw=rule), Split(name="own", train=("61",), test=("7",))]
    course = [(ORGANS, drawn[1]), (ORGANS, drawn[1])]
    assert unmatched(course, {"btcv": of("61", "7")}, drawn) == [
        "`without` of split 'mine': no case of btcv is s01..s03"
    ]


def test_a_patient_of_one_folder_under_two_names_is_one_patient() -> None:
    """What the page advises for other cases of a folder: two sources."""
    ward = replace(BENCH.sources[0], name="ward", patient=r"(ward\d+)_.*")
    late = replace(ward, name="late")
    step, tests = replace(ORGANS, source="ward"), Split(name="b", test=("ward007_2",))
    outside = ExternalTest(source="late", split=tests)
    bench = replace(
        BENCH, sources=(ward, late), steps=(step,), external_tests=(outside,), groups={}
    )
    files = {
        c: CaseFiles(case=c, image=Path(f"{c}.nii.gz"), label=Path(f"l{c}.nii.gz"))
        for c in ("ward007_1", "ward007_2", "ward008_1")
    }
    split = Split(name="a", train=("ward007_1",), test=("ward008_1",))
    course = [(step, split), (outside, tests)]

    def said(elsewhere: dict[str, CaseFiles], of: Benchmark = bench) -> list[str]:
        found = course_problems(course, of, {"ward": files, "late": elsewhere}, patients=True)
        return [str(problem) for problem in found]

    (problem,) = said(files)
    assert "patient ward007 is trained on as case ward007_1" in problem
    # whoever forgets `patient` in the second source has the same patients all the same
    by_case = replace(bench, sources=(ward, replace(late, patient=BENCH.sources[0].patient)))
    assert len(said(files, by_case)) == 1
    apart = {c: replace(f, image=Path("other") / f.image) for c, f in files.items()}
    assert said(apart) == []
    # one image that both folders hold makes no other patients one
    assert said({**apart, "ward008_1": files["ward008_1"]}) == []


def test_a_name_that_several_cases_share_stands_for_none() -> None:
    have = {c: CaseFiles(case=c, image=Path(c) / "ct.nii.gz", label=()) for c in ("s1", "s2")}
    assert file_names(have) == {}


@given(ids=st.sets(st.text(st.characters(whitelist_categories=("L", "N")), min_size=1), min_size=1))
def test_a_literal_id_always_wins(ids: set[str]) -> None:
    """Whatever the files are called: here each is called as another case's id."""
    order = sorted(ids)
    have = {
        c: CaseFiles(case=c, image=Path(f"{other}.nii.gz"), label=Path(f"{other}.nii.gz"))
        for c, other in zip(order, order[1:] + order[:1], strict=True)
    }
    split = Split(name="s", train=tuple(order), test=("!",))
    assert resolve(split, BENCH.sources[0], have, None).train == tuple(order)


def test_what_is_missing_is_listed_beside_what_is_there(tmp_path: Path) -> None:
    error = missing(
        Split(name="s", train=("7",), test=("1",)), BENCH.sources[0], of("1", "10", "2"), tmp_path
    )
    assert error is not None
    assert error.got == "missing: 7; in the folder: 1, 2, 10"
    assert "clbench data split" in str(error)


def test_every_step_is_looked_at_though_one_is_refused(tmp_path: Path) -> None:
    good = Split(name="g", train=("1",), test=("2",))
    files = {"btcv": of("1", "2"), "lits": of("1", "2")}
    folders = dict.fromkeys(files, tmp_path)
    bad = replace(good, train=("9",))
    settled, problems = settle(
        [(ORGANS, bad), (TUMOR, good)], BENCH, files, folders, holds=lambda s, c: frozenset()
    )
    assert [step.name for step, _ in settled] == [TUMOR.name]
    assert len(problems) == 1


def test_a_partial_that_names_files_is_refused() -> None:
    part = Partial(cases=("img0061",), annotates=("liver",))
    source = replace(BENCH.sources[0], partial=(part,))
    bench = replace(BENCH, sources=(source, BENCH.sources[1]))
    (problem,) = course_problems([], bench, {"btcv": of("61")}, patients=True)
    assert "names cases by their files" in str(problem)
    assert problem.expected == "61"


def test_only_cases_that_drawing_surely_asks_about_are_looked_at_ahead() -> None:
    """A folder may hold a thousand cases of which a rule takes ten."""
    files: Any = {"lits": {str(i): None for i in range(100)}}
    rule = Draw(seed=3, train=2, validation=1, test=1, part=2, needs=("liver",), without=("7",))
    course: Any = [(BENCH.steps[1], Split(name="d", draw=rule))]
    ahead = [case for _, case in asked_first(course, BENCH, files)]
    asked: list[str] = []
    rule.deal(
        files["lits"],
        patient=BENCH.source("lits").patient_of,
        fits=lambda case: asked.append(case) is None,
        where="here",
    )
    assert ahead == asked
    assert len(asked) == 8
    plain = replace(rule, needs=())
    assert asked_first([(BENCH.steps[1], Split(name="d", draw=plain))], BENCH, files) == []
