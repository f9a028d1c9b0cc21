"""Benchmarks as data: every rule of the specification has a case that breaks it."""

from dataclasses import replace
from pathlib import Path

import pytest

from clbench.errors import SpecError, UnknownName
from clbench.spec import registry
from clbench.spec.benchmark import (
    Benchmark,
    ExternalTest,
    Partial,
    Preprocessing,
    Source,
    Step,
)
from clbench.spec.splits import Draw, Split
from clbench.spec.toml import benchmark_text

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
    with pytest.raises(SpecError, match="source does not annotate") as err:
        replace(bench, steps=(replace(bench.steps[0], learns=("aorta",)),))
    fields = dict(err.value.fields())
    assert fields["got"] == "aorta"
    assert "spleen" in str(fields["expected"])
    assert "`learns`" in str(err.value)
    assert "one" in str(fields["where"])


def test_unknown_structure_and_source_get_did_you_mean() -> None:
    bench = small()
    with pytest.raises(UnknownName, match="spleem") as err:
        replace(bench, steps=(replace(bench.steps[0], learns=("spleem",)),))
    assert "did you mean 'spleen'" in str(err.value)
    two = replace(bench.sources[0], name="lits")
    with pytest.raises(SpecError) as err2:
        replace(bench, sources=(two,), steps=(replace(bench.steps[0], source="lit"),))
    assert "did you mean 'lits'" in str(err2.value)


def test_cases_of_the_phantom_are_listed_and_not_drawn() -> None:
    drawn = Split(name="p", draw=Draw(seed=1, train=1, test=1))
    with pytest.raises(SpecError, match="listed, not drawn"):
        replace(small().steps[0], phantom_split=drawn)
    test = Split(name="p", draw=Draw(seed=1, test=1))
    with pytest.raises(SpecError, match="listed, not drawn"):
        ExternalTest(source="a", split=test, phantom_split=test)


def test_label_values_beside_masks_are_refused() -> None:
    masks = {"name": "ward", "title": "", "layout": "totalsegmentator", "masks": {"liver": "liver"}}
    assert Source(**masks).structures == ("liver",)
    with pytest.raises(SpecError, match="and the source has masks"):
        Source(**masks, ignored=(3,))


@pytest.mark.parametrize(
    "bad",
    [
        {"train": ("1", "2")},
        {"train": ("1", "1")},
        {"validation": ("2",)},
        {"test": ()},
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


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": "../up"}, "letters, digits"),
        ({"labels": {}}, "neither"),
        ({"masks": {"liver": "liver"}}, "both"),
        ({"sides": {5: ("left_kidney", "spleen")}}, "left and the right"),
        ({"sides": {3: ("left_kidney", "right_kidney")}}, "listed twice"),
        ({"sides": {5: ("right_kidney", "left_kidney")}}, "left and the right"),
        ({"ignored": (0,)}, "start at 1"),
    ],
)
def test_sources_are_checked(changed: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError) as err:
        replace(small().sources[0], **changed)  # type: ignore[arg-type]
    assert says in str(err.value)


def test_names_are_given_once() -> None:
    bench = small()
    with pytest.raises(SpecError, match="two steps have one name"):
        replace(bench, steps=(bench.steps[0], replace(bench.steps[1], name="one")))
    with pytest.raises(SpecError, match="two sources have one name"):
        replace(bench, sources=bench.sources * 2)


def test_a_step_has_a_name_that_no_other_source_has() -> None:
    """What --split names is one step, or all steps of one source."""
    bench = small()
    other = replace(bench.sources[0], name="c")
    one, two = bench.steps
    alone = replace(bench, sources=(*bench.sources, other), steps=(one, replace(two, source="c")))
    replace(alone, steps=(replace(one, name="a"), replace(alone.steps[1], name="c")))
    for steps in (
        (replace(one, name="c"), alone.steps[1]),  # another step's source
        (replace(one, name="c"), two),  # a source that no step reads
        (replace(one, name="a"), two),  # its own, and that of another step
    ):
        with pytest.raises(SpecError, match="named like a source"):
            replace(alone, steps=steps)
    outside = ExternalTest(source="c", split=Split(name="e", test=("9",)))
    with pytest.raises(SpecError, match="named like a source"):
        replace(alone, steps=(one, replace(two, name="c")), external_tests=(outside,))
    none = Split(name="none", origin="not at hand")
    given = replace(one, name="c", split=none, given="0ab1")  # takes no split
    replace(alone, steps=(given, alone.steps[1]))


def test_a_shared_source_shows_each_step_its_own_lesson() -> None:
    bench = small()
    assert bench.shown(1) == {"spleen", "liver_tumor"}  # the tumor is nobody's lesson
    assert bench.shown(2) == {"liver", "liver_tumor"}
    other = replace(bench.sources[0], name="c")
    apart = replace(
        bench,
        sources=(*bench.sources, other),
        steps=(bench.steps[0], replace(bench.steps[1], source="c")),
    )
    assert apart.shown(1) == apart.shown(2) == {"spleen", "liver", "liver_tumor"}
    told = replace(
        bench, steps=(bench.steps[0], replace(bench.steps[1], shows=("liver", "spleen")))
    )
    assert told.shown(2) == {"liver", "spleen"}
    for shows in (("spleen",), ("liver", "aorta")):
        with pytest.raises(SpecError, match="`shows` must hold"):
            replace(bench, steps=(bench.steps[0], replace(bench.steps[1], shows=shows)))


def test_tumor_ext_shows_all_it_annotates() -> None:
    bench = registry.benchmark("tumor_ext")
    assert bench.shown(1) == set(bench.source("btcv").structures)
    assert bench.shown(2) == {"liver", "liver_tumor"}


def test_a_pair_nobody_learns_is_background() -> None:
    bench = small()
    source = replace(
        bench.sources[0],
        sides={
            5: ("left_kidney", "right_kidney"),
            6: ("left_adrenal_gland", "right_adrenal_gland"),
        },
        partial=(Partial(cases=("9",), annotates=("spleen", "left_adrenal_gland")),),
    )
    steps = (replace(bench.steps[0], learns=("spleen", "left_kidney")), bench.steps[1])
    read = replace(bench, sources=(source,), steps=steps).reads("a")
    assert dict(read.sides) == {5: ("left_kidney", "right_kidney")}
    assert read.ignored == (6,)
    assert read.annotated("9") == ("spleen",)
    assert bench.reads("a") is bench.sources[0]


def test_the_digest_follows_what_moves_numbers() -> None:
    bench = small()
    same = replace(bench, title="another", groups={"Mean": ("spleen",)})
    assert same.digest() == bench.digest()
    for changed in (
        replace(bench, version=2),
        replace(bench, steps=bench.steps[::-1]),
        replace(bench, preprocessing=Preprocessing(spacing_mm=(2.0, 2.0, 2.0))),
        replace(bench, sources=(replace(bench.sources[0], ignored=(7,)),)),
    ):
        assert changed.digest() != bench.digest()


def test_a_step_that_is_taught_needs_training_cases() -> None:
    bench = small()
    with pytest.raises(SpecError, match="needs train and test cases"):
        replace(bench.steps[0], split=replace(SPLIT, train=()))


def externally(source: Source, **split: object) -> Benchmark:
    tests = Split(name="e", **{"test": ("1",), **split})  # type: ignore[arg-type]
    bench = small()
    known = {s.name: s for s in (*bench.sources, source)}
    return replace(
        bench,
        sources=tuple(known.values()),
        external_tests=(ExternalTest(source=source.name, split=tests),),
    )


def test_an_external_source_is_only_tested_on() -> None:
    taught = small().sources[0]
    with pytest.raises(SpecError, match="external source has cases to learn from"):
        externally(replace(taught, name="clinic"), train=("2",))
    with pytest.raises(SpecError, match="external source has cases to learn from"):
        externally(replace(taught, name="clinic"), test=(), draw=Draw(seed=1, train=3, test=1))
    with pytest.raises(SpecError, match="external source has training cases"):
        externally(taught)
    with pytest.raises(SpecError, match="annotates nothing that the course teaches"):
        externally(Source(name="clinic", title="c", layout="amos", labels={1: "esophagus"}))
    course = externally(replace(taught, name="clinic"), test=(), draw=Draw(seed=1, test=1))
    assert [part.source for part in course.with_cases] == [taught.name, taught.name, "clinic"]


def test_a_course_without_external_sources_keeps_its_digest() -> None:
    assert small().digest() == replace(small(), external_tests=()).digest()
    clinic = replace(small().sources[0], name="clinic")
    assert externally(clinic).digest() != small().digest()


def test_an_order_is_a_permutation_of_the_listed_steps() -> None:
    bench = registry.benchmark("body_ext")
    ordered = registry.benchmark("body_ext.order3-1-2")
    assert [s.name for s in ordered.steps] == [bench.steps[i].name for i in (2, 0, 1)]
    assert (ordered.name, ordered.listed) == ("body_ext.order3-1-2", (3, 1, 2))
    assert bench.listed == (1, 2, 3)
    assert registry.benchmark("body_ext.order1-2-3") == bench
    assert registry.in_order("body_ext", [1, 2, 3]) == "body_ext"
    assert registry.in_order("body_ext.order3-1-2", [3, 1, 2]) == "body_ext.order3-1-2"
    with pytest.raises(SpecError, match="two orders of the steps") as err:
        registry.in_order("body_ext.order2-1-3", [3, 1, 2])
    assert err.value.next_step == "name the course body_ext, or leave --order out"
    for bad in ([3, 1], [1, 1, 2], [0, 1, 2], [1, 2, 3, 4]):
        with pytest.raises(SpecError, match="no permutation") as err:
            registry.in_order("body_ext", bad)
        assert "3 cardiovascular" in str(err.value)
        assert "name every step once: 3,2,1" in str(err.value)
    with pytest.raises(SpecError, match="'liver' is taught again, but no earlier step") as err:
        registry.benchmark("domain_ext.order2-1-3-4")
    assert "take an order in which the step that learns it comes before" in str(err.value)


def test_a_course_file_takes_an_order_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(benchmark_text(small()), encoding="utf-8")
    assert registry.is_path(f"{path}.order2-1")
    ordered = registry.benchmark(f"{path}.order2-1")
    assert [s.name for s in ordered.steps] == ["two", "one"]
    assert ordered.digest() != small().digest()
    path.write_text("order = [2, 1]\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SpecError, match="lists its steps in their order"):
        registry.benchmark(str(path))


def taught_again(**step: object) -> Benchmark:
    """Spleen and liver from one source, then `step` from another."""
    bench = small()
    clinic = replace(bench.sources[0], name="clinic")
    values = {"name": "three", "source": "clinic", "learns": (), "split": SPLIT, **step}
    return replace(
        bench,
        sources=(*bench.sources, clinic),
        steps=(*bench.steps, Step(**values)),  # type: ignore[arg-type]
    )


def test_a_structure_is_taught_again_from_another_source() -> None:
    course = taught_again(again=("liver",))
    assert course.structures(3) == course.structures(2) == ("spleen", "liver")
    assert "liver" in course.shown(3)
    assert course.learned_at("liver") == 2
    plain = replace(course, steps=course.steps[:2])
    assert replace(plain, sources=small().sources).digest() == small().digest()
    for step, says in (
        ({"again": ()}, "must learn at least one structure"),
        ({"again": ("liver_tumor",)}, "no earlier step learns it"),
        ({"learns": ("liver_tumor",), "again": ("liver_tumor",)}, "no earlier step learns it"),
        ({"again": ("liver",), "source": "a"}, "from the source it was learned from"),
        ({"again": ("liver",), "shows": ("spleen",)}, "must hold what the step learns"),
    ):
        with pytest.raises(SpecError, match=says):
            taught_again(**step)
    with pytest.raises(SpecError, match="no earlier step learns it"):
        course.in_order((3, 1, 2))
