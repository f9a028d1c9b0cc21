"""Benchmarks as data: every rule of the specification has a case that breaks it."""

from dataclasses import replace
from pathlib import Path

import pytest

from clbench import registry
from clbench.errors import SpecError, UnknownName
from clbench.spec import Benchmark, Partial, Preprocessing, Source, Split, Step, load_benchmark

SPLIT = Split(name="s", train=("1",), validation=(), test=("2",))


def small() -> Benchmark:
    source = Source(
        name="a", title="A", layout="btcv", labels={1: "spleen", 2: "liver", 3: "liver_tumor"}
    )
    steps = (
        Step(name="one", source="a", learns=("spleen",), split=SPLIT, phantom_split=SPLIT),
        Step(name="two", source="a", learns=("liver",), split=SPLIT, phantom_split=SPLIT),
    )
    return Benchmark(
        name="b",
        version=1,
        title="t",
        sources=(source,),
        steps=steps,
        preprocessing=Preprocessing(),
    )


def test_tumor_ext_is_the_papers_course() -> None:
    bench = registry.benchmark("tumor_ext")
    assert [len(s.learns) for s in bench.steps] == [13, 1]
    btcv, lits = (s.split for s in bench.steps)
    assert (len(btcv.train), len(btcv.validation), len(btcv.test)) == (31, 4, 12)
    assert (len(lits.train), len(lits.validation), len(lits.test)) == (95, 16, 20)
    assert set(lits.cases) == {str(i) for i in range(131)}
    assert len(set(btcv.cases)) == 47
    source = bench.source("btcv")
    assert len(source.annotated("1")) == 13
    assert source.annotated("61") == (
        "spleen", "left_kidney", "gall_bladder", "esophagus", "liver", "stomach", "pancreas",
        "duodenum",
    )  # fmt: skip
    assert bench.structures(1) == bench.steps[0].learns
    assert bench.structures(2)[-1] == "liver_tumor"
    assert bench.learned_at("liver_tumor") == 2
    assert len(bench.groups["Mean"]) == 14


def test_steps_that_learn_the_same_structure_are_refused() -> None:
    bench = small()
    with pytest.raises(SpecError, match="'spleen' is learned twice") as err:
        replace(bench, steps=(bench.steps[0], replace(bench.steps[1], learns=("spleen",))))
    assert "'one' and 'two'" in str(err.value)


def test_a_step_cannot_learn_what_its_source_does_not_annotate() -> None:
    bench = small()
    with pytest.raises(SpecError, match="source does not annotate"):
        replace(bench, steps=(replace(bench.steps[0], learns=("aorta",)),))


def test_unknown_structure_and_source_get_did_you_mean() -> None:
    bench = small()
    with pytest.raises(UnknownName, match="spleem") as err:
        replace(bench, steps=(replace(bench.steps[0], learns=("spleem",)),))
    assert "did you mean 'spleen'" in str(err.value)
    two = replace(bench.sources[0], name="lits")
    with pytest.raises(SpecError) as err2:
        replace(bench, sources=(two,), steps=(replace(bench.steps[0], source="lit"),))
    assert "did you mean 'lits'" in str(err2.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"train": ("1", "2")},
        {"train": ("1", "1")},
        {"validation": ("2",)},
        {"test": ()},
        {"train": ()},
    ],
)
def test_splits_are_disjoint_and_not_empty(bad: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(SpecError):
        replace(SPLIT, **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"orientation": "LPS"},
        {"spacing_mm": (1.5, 0.0, 1.5)},
        {"window_hu": (250.0, -175.0)},
        {"patch_vox": (96, 96)},
    ],
)
def test_preprocessing_is_checked(bad: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        Preprocessing(**bad)  # type: ignore[arg-type]


def test_partial_cases_annotate_what_has_a_value() -> None:
    with pytest.raises(SpecError, match="which the source does not have"):
        Source(
            name="a", title="A", layout="btcv", labels={1: "spleen"},
            partial=(Partial(cases=("1",), annotates=("liver",)),),
        )  # fmt: skip


BENCH = """
name = "mine"
version = 1
title = "mine"
[[source]]
name = "a"
title = "A"
layout = "btcv"
labels = {1 = "spleen", 2 = "liver"}
[[step]]
name = "one"
source = "a"
learns = ["spleen"]
split = "cases.toml"
phantom_split = "cases.toml"
"""


def test_a_users_own_file_is_read_and_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "cases.toml").write_text('train = ["1-3", 5]\nvalidation = []\ntest = [4]\n')
    path = tmp_path / "mine.toml"
    path.write_text(BENCH)
    assert load_benchmark(path).steps[0].split.train == ("1", "2", "3", "5")
    path.write_text(BENCH.replace("learns", "lerns"))
    with pytest.raises(SpecError, match="unknown field 'lerns'") as err:
        load_benchmark(path)
    assert "did you mean 'learns'" in str(err.value)
    path.write_text(BENCH.replace('"cases.toml"', '"../cases.toml"', 1))
    with pytest.raises(SpecError, match="outside"):
        load_benchmark(path)
    path.write_text(BENCH.replace("version = 1", "version = "))
    with pytest.raises(SpecError, match="not a valid TOML"):
        load_benchmark(path)
    path.write_text(BENCH.replace("version = 1\n", ""))
    with pytest.raises(SpecError, match="incomplete Benchmark"):
        load_benchmark(path)
    with pytest.raises(SpecError, match="file not found"):
        load_benchmark(tmp_path / "absent.toml")
