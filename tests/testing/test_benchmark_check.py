"""The honesty kit on benchmarks: those that come with clbench pass, each broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import UnknownName
from clbench.run.course import run_plan
from clbench.run.plan import Plan
from clbench.spec import registry
from clbench.store import run_folder
from clbench.testing.benchmark_check import RULES, check_benchmark
from clbench.testing.report import Report

COURSE = """
name = "course"
version = 1
title = "two organs, then one"
citation = "nobody"
[preprocessing]
patch_vox = [96, 96, 96]
[[source]]
name = "a"
title = "A"
layout = "btcv"
licence = "private"
[source.labels]
1 = "spleen"
2 = "liver"
3 = "pancreas"
[[source.partial]]
cases = ["1"]
annotates = ["spleen"]
[[step]]
name = "one"
source = "a"
learns = ["spleen", "liver"]
split = { train = [1, 2], validation = [3], test = [4] }
[[step]]
name = "two"
source = "a"
learns = ["pancreas"]
split = { train = [5, 6], validation = [7], test = [8] }
[groups]
"Mean" = ["spleen", "liver", "pancreas"]
"""
FIRST = "split = { train = [1, 2], validation = [3], test = [4] }"
SECOND = "split = { train = [5, 6], validation = [7], test = [8] }"

SECOND_STEP = COURSE[COURSE.index('[[step]]\nname = "two"') : COURSE.index("[groups]")]
MEAN = '"Mean" = ["spleen", "liver", "pancreas"]'
ANOTHER_SOURCE = """
[[source]]
name = "b"
title = "B"
layout = "lits"
licence = "x"
labels = { 1 = "liver" }
[[step]]
name = "one\""""


def drawn(**more: object) -> str:
    rule = {"seed": 1, "train": 2, "validation": 1, "test": 1, **more}
    return f"split = {{ draw = {{ {', '.join(f'{k} = {v}' for k, v in rule.items())} }} }}"


def on_phantom(train: str, validation: str, test: str) -> str:
    return (
        f'phantom_split = {{ train = ["{train}"], validation = ["{validation}"], '
        f'test = ["{test}"] }}'
    )


LEAKS = "no test case is trained on in any step"
# What is wrong → changes of COURSE, text by text, and the rule that is broken.
BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "unknown field": ({"version = 1": "version = 1\nedition = 2"}, "the file is valid"),
    "learned twice": ({'learns = ["pancreas"]': 'learns = ["liver"]'}, "the file is valid"),
    "name with a slash": ({'name = "course"': 'name = "my/course"'}, "the file is valid"),
    "another name": ({'name = "course"': 'name = "curse"'}, "it goes by its name"),
    "version nought": ({"version = 1": "version = 0"}, "it goes by its name"),
    "no licence": ({'licence = "private"': ""}, "it says what it is"),
    "no citation": ({'citation = "nobody"': 'citation = " "'}, "it says what it is"),
    "unknown layout": (
        {'layout = "btcv"': 'layout = "btvc"'}, "every source is used and can be read",
    ),
    "a source too many": (
        {'[[step]]\nname = "one"': ANOTHER_SOURCE}, "every source is used and can be read",
    ),
    "one step": (
        {SECOND_STEP: "", MEAN: '"Mean" = ["spleen", "liver"]'}, "there is something to forget",
    ),
    "test case trained on": ({SECOND: SECOND.replace("[5, 6]", "[4, 6]")}, LEAKS),
    "test case validated on": ({SECOND: SECOND.replace("[7]", "[4]")}, LEAKS),
    "leak on the phantom": (
        {
            FIRST: f"{FIRST}\n{on_phantom('1..19', '20..29', '30..39')}",
            SECOND: f"{SECOND}\n{on_phantom('30..49', '50..59', '60..69')}",
        },
        LEAKS,
    ),
    "drawn and listed": ({SECOND: drawn()}, LEAKS),
    "drawn by two rules": ({FIRST: drawn(), SECOND: drawn(seed=2, part=2)}, LEAKS),
    "drawn without a case": ({FIRST: drawn(without='["5"]'), SECOND: drawn(part=2)}, LEAKS),
    "not annotated in training": (
        {FIRST: FIRST.replace("[1, 2]", "[1]")},
        "every learned structure can be taught and scored",
    ),
    "not annotated in the test": (
        {FIRST: FIRST.replace("[1, 2]", "[9, 2]").replace("[4]", "[1]")},
        "every learned structure can be taught and scored",
    ),
    "no validation": (
        {FIRST: FIRST.replace("validation = [3], ", "")}, "no split leaves out the choices",
    ),
    "left out of the tables": (
        {MEAN: '"Mean" = ["spleen", "liver"]'}, "table groups cover every structure",
    ),
    "twice in a table": ({MEAN: f'{MEAN[:-1]}, "liver"]'}, "the file is valid"),
    "a table of nothing": (
        {MEAN: f'{MEAN}\n"Nothing" = []'}, "table groups cover every structure",
    ),
    "odd patch": ({"[96, 96, 96]": "[96, 96, 90]"}, "the default network takes its patches"),
    "too few on the phantom": (
        {SECOND: f"{SECOND}\n{on_phantom('1-9', '20-29', '30-39')}"},
        "the phantom has cases enough",
    ),
}  # fmt: skip


Check = Callable[..., Report]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks COURSE, with changes text by text, as if it were registered as `course`."""
    path = tmp_path / "course.toml"
    monkeypatch.setattr(registry, "benchmark_path", lambda name: path)

    def run(changes: dict[str, str], *rules: str, name: str = "course") -> Report:
        text = COURSE
        for old, new in changes.items():
            assert old in text, old
            text = text.replace(old, new)
        path.write_text(text)
        return check_benchmark(name, only=rules)

    return run


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_benchmark_is_caught_by_the_rule_it_breaks(name: str, check: Check) -> None:
    changes, rule = BROKEN[name]
    report = check(changes, *(r.name for r in RULES[:-1]))  # all but the run
    assert report.failed == (rule,), report
    (finding,) = [f for f in report.findings if f.status == "FAIL"]
    assert finding.error is not None
    assert finding.error.fields(), "says where, expected, got or what to do"


def test_the_course_itself_is_sound(check: Check) -> None:
    report = check({})
    assert {f.status for f in report.findings} == {"pass"}, report
    two_parts = {FIRST: drawn(), SECOND: drawn(part=2)}
    assert check(two_parts, LEAKS).ok
    one, other = drawn(without='["5", "6"]'), drawn(without='["6", "5"]', part=2)
    assert check({FIRST: one, SECOND: other}, LEAKS).ok


def test_what_the_phantom_lacks_is_no_fault(check: Check) -> None:
    changes = {'3 = "pancreas"': '3 = "prostate"', '"pancreas"': '"prostate"'}
    report = check(changes)
    assert report.ok, report
    assert [f.rule for f in report.findings if f.status == "exempt"] == [
        "the phantom has cases enough", "two steps run on the phantom",
    ]  # fmt: skip


def test_a_course_that_cannot_be_run_is_caught(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(plan: Plan) -> Path:
        folder = run_plan(plan)
        rows = run_folder.read_scores(folder / "scores.csv")
        run_folder.write_scores(
            folder / "scores.csv", [r for r in rows if r.structure != "pancreas"]
        )
        return folder

    monkeypatch.setattr("clbench.testing.benchmark_check.run_plan", run)
    report = check({})
    assert report.failed == ("two steps run on the phantom",)
    assert "pancreas" in str(report)


def test_every_rule_has_a_benchmark_that_breaks_it() -> None:
    broken = {rule for _, rule in BROKEN.values()} | {"two steps run on the phantom"}
    # the text vectors that come with clbench cover every structure it knows
    assert {rule.name for rule in RULES} == broken | {"every structure has a text vector"}


def test_every_rule_says_why_in_one_line() -> None:
    for rule in RULES:
        assert 20 < len(rule.why) <= 110, rule.name
        assert rule.why.endswith(".")


@pytest.mark.parametrize("name", sorted(registry.entries("benchmark")))
def test_every_benchmark_that_comes_along_is_sound(name: str) -> None:
    # one run of the suite's time: the others take the same way
    but_the_run = [r.name for r in RULES if r.name != "two steps run on the phantom"]
    report = check_benchmark(name, only=but_the_run if name in ("domain_ext", "public_ext") else ())
    assert report.ok, report


def test_a_file_of_ones_own_owes_its_readers_less(check: Check) -> None:
    changes = {
        'citation = "nobody"': "",
        'licence = "private"': "",
        "validation = [3], ": "",
        MEAN: '"Mean" = ["spleen"]',
    }
    report = check(changes, *(r.name for r in RULES[:-1]), name="my/course.toml")
    assert report.ok, report
    remarks = [f.remark for f in report.findings if f.status == "exempt"]
    assert len(remarks) == 3
    assert all(r.startswith("a file of your own may leave this: ") for r in remarks)
    assert "liver, pancreas" in remarks[-1]


def test_one_patient_in_train_and_test(check: Check) -> None:
    scans = {
        'licence = "private"': 'licence = "private"\npatient = "(p\\\\d+)_.*"',
        FIRST: 'split = { train = ["p1_a", "p2_a"], validation = ["p3_a"], test = ["p2_b"] }',
        SECOND: 'split = { train = ["p5_a"], validation = ["p6_a"], test = ["p7_a"] }',
    }
    report = check(scans, LEAKS)
    assert report.failed == (LEAKS,)
    assert "p2_b" in str(report)


def test_the_command_prints_every_rule_and_ends_with_1_where_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "course.toml"
    path.write_text(COURSE.replace(SECOND, SECOND.replace("[7]", "[4]")))
    done = CliRunner().invoke(app, ["check", "benchmark", str(path)])
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert [line for line in lines if line.startswith("  FAIL")] == [
        f"  FAIL    {LEAKS}: {next(r.why for r in RULES if r.name == LEAKS)}"
    ]
    for part in ("expected:", "got:", "next step:"):
        assert part in done.output
    assert f"{len(RULES)} rules in" in lines[-1]


def test_an_unknown_benchmark(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'tumor_ext'"):
        check_benchmark("tumour_ext")
    report = check_benchmark(str(tmp_path / "absent.toml"))
    assert report.failed == ("the file is valid",)
