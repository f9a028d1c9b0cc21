"""A benchmark is one file a user writes: every mistake in it is named, with the field."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from locations import ROOT

from clbench.errors import ClbenchError, SpecError
from clbench.spec import registry, taxonomy
from clbench.spec.benchmark import Partial, Preprocessing, Rescale
from clbench.spec.taxonomy import ancestors, structure
from clbench.spec.toml import benchmark_text, load_benchmark, load_split

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
    (tmp_path / "cases.toml").write_text('train = ["1..3", 5]\nvalidation = []\ntest = [4]\n')
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
    with pytest.raises(SpecError, match="an incomplete benchmark: version missing"):
        load_benchmark(path)
    with pytest.raises(SpecError, match="file not found"):
        load_benchmark(tmp_path / "absent.toml")
    with pytest.raises(SpecError, match="not a file that can be read"):
        load_benchmark(tmp_path)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A file with this text; what it declares is forgotten after the test."""
    monkeypatch.setattr(taxonomy, "DECLARED", {})

    def made(text: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        (tmp_path / "cases.toml").write_text("train = [1]\ntest = [2]\n")
        return path

    return made


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"spleen", 2', '"spleem", 2', "did you mean 'spleen'"),
        ("labels = {1", "labels = {one", "a whole number = one structure"),
        ('1 = "spleen"', '1 = ["left_kidney", "right_kidney"]', "use `sides`"),
        ("labels = {1", "sides = {7 = \"left_kidney\"}\nlabels = {1", "left and the right"),
        ("labels = {1", "ignored = 3\nlabels = {1", "ignored must be a list"),
        ('learns = ["spleen"]', 'learns = "spleen"', "learns must be a list of names"),
        ('learns = ["spleen"]', 'learns = []', "at least one structure"),
        ('learns = ["spleen"]', 'learns = ["spleen", "spleen"]', "a list of names, each once"),
        (
            "phantom_split",
            'shows = ["spleen", "liver", "spleen"]\nphantom_split',
            "shows must be a list of names, each once",
        ),
        ("[[step]]", '[groups]\nMean = ["spleen", "spleen"]\n[[step]]', "each once"),
        (
            "[[step]]",
            '[[source.partial]]\ncases = [1]\nannotates = ["liver", "liver"]\n[[step]]',
            "annotates must be a list of names, each once",
        ),
        (
            'split = "cases.toml"',
            'split = {draw = {seed = 1, train = 1, test = 1, needs = ["liver", "liver"]}}',
            "needs must be a list of names, each once",
        ),
        ("version = 1", 'version = "one"', "version must be a whole number"),
        ("version = 1", "version = true", "version must be a whole number"),
        ('layout = "btcv"', "layout = 3", "layout must be text"),
        ("[[source]]", "[source]", "write [[source]]"),
        ("[[step]]", "[step]", "write [[step]]"),
        ('split = "cases.toml"', "split = 3", "split must be a file or a table"),
        ('split = "cases.toml"', "split = {train = [1], test = [1]}", "stands in train and test"),
        ('split = "cases.toml"', "split = {train = 1, test = [1]}", "must be a list of case ids"),
        ('split = "cases.toml"', 'split = {train = ["3..1"], test = [9]}', "runs backwards"),
        ('split = "cases.toml"', "split = {draw = {train = 1, test = 1}}", "seed"),
        (
            'split = "cases.toml"',
            'split = {draw = {seed = 1, train = 1, test = 1, needs = ["livr"]}}',
            "did you mean 'liver'",
        ),
        ('1 = "spleen"', '1 = "spleen", 01 = "aorta"', "two keys of labels are one label value"),
        ('1 = "spleen"', '1 = "spleen", "+1" = "aorta"', "labels must be a table"),
        ('1 = "spleen"', '1 = "spleen", " 1" = "aorta"', "in plain digits"),
        ('1 = "spleen"', '1 = "spleen", "1.0" = "aorta"', "in plain digits"),
        ('1 = "spleen"', '1 = "spleen", "0_1" = "aorta"', "in plain digits"),
        ("[[step]]", 'sides = {"3.0" = []}\n[[step]]', "sides must be a table"),
        ("[[step]]", "sides = {3 = [], 03 = []}\n[[step]]", "two keys of sides are one label value"),
        ('split = "cases.toml"', "", "an incomplete step: split missing"),
        ('split = "cases.toml"', "split = {draw = {seed = 1, train = 0, test = 1}}", "train and test"),
        ('split = "cases.toml"', 'split = {train = [1], tst = [2]}', "did you mean 'test'"),
        ("[[step]]", "[[source.partial]]\ncases = 3\n[[step]]", "cases must be a list of case ids"),
        ("[[step]]", '[[source.partial]]\nannotates = ["liver"]\n[[step]]', "cases missing"),
        ("[[step]]", "[preprocessing]\nwindow_hu = [9, 1]\n[[step]]", "the lower end"),
        ("[[step]]", '[preprocessing]\norientation = "LPS"\n[[step]]', "one of RAS"),
        ("[[step]]", "[preprocessing]\npatch_vox = [1.5, 1, 1]\n[[step]]", "positive whole"),
        ("[[step]]", "[groups]\nMean = [\"liver\"]\n[[step]]", "no step learns"),
        ("[[step]]", "[preprocessing]\nspacing_mm = [1, 1]\n[[step]]", "three positive"),
        ('name = "mine"', 'name = "tumor_ext"', "is taken"),
        ('name = "mine"', 'name = "mine.order2-1"', "in an order of its steps"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(
    old: str, new: str, says: str, write: Callable[[str], Path]
) -> None:
    path = write(BENCH.replace(old, new, 1))
    with pytest.raises(ClbenchError) as err:
        registry.benchmark(str(path))
    assert says in str(err.value)


DIGESTS = {
    "body_ext": "8e2cc554e6d6b7b6",
    "body_ext_totalseg": "faa6c92bd7c6b949",
    "domain_ext": "f5ccc91896184c37",
    "public_ext": "93e9b2c1bf5e7eb8",
    "tumor_ext": "0d6d4069b3b746c8",
}
"""Course → hash that runs of it are known by."""


def test_an_error_names_file_item_and_value(write: Callable[[str], Path]) -> None:
    path = write(BENCH.replace('layout = "btcv"', "layout = 3"))
    with pytest.raises(SpecError) as err:
        load_benchmark(path)
    assert err.value.what == "layout must be text"
    assert err.value.fields() == {"where": f"{path}, source 'a'", "got": "3"}
    path = write(BENCH.replace('learns = ["spleen"]', 'lerns = ["spleen"]'))
    with pytest.raises(SpecError) as err:
        load_benchmark(path)
    assert err.value.where == f"{path}, step 'one'"
    (path.parent / "cases.toml").write_text("train = [1]\ntest = 2\n")
    path.write_text(BENCH)
    with pytest.raises(SpecError, match="test must be a list of case ids") as err:
        load_benchmark(path)
    assert err.value.where == path.parent / "cases.toml"


def test_a_course_keeps_its_hash_and_goes_to_another_process(
    write: Callable[[str], Path],
) -> None:
    path = write(BENCH)
    plain = load_benchmark(path)
    assert pickle.loads(pickle.dumps(plain)) == plain  # noqa: S301  # our own bytes
    path.write_text(
        BENCH.replace("[[step]]", "[preprocessing]\nspacing_mm = [2, 2, 2.5]\n[[step]]")
    )
    spacing = load_benchmark(path).preprocessing.spacing_mm
    assert [type(s) for s in spacing] == [int, int, float]  # as written: 2 and 2.0 hash apart
    for name, digest in DIGESTS.items():
        assert registry.benchmark(name).digest() == digest


def test_a_copy_of_a_registered_benchmark_may_keep_its_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path, dirs_exist_ok=True)
    assert registry.benchmark(str(tmp_path / "tumor_ext.toml")).name == "tumor_ext"


DECLARED = """
[[structure]]
name = "spleen_cyst"
kind = "cyst"
parent = "spleen"
[[structure]]
name = "left_ureter"
prompt = "ureter on the left"
kind = "duct"
mirror = "right_ureter"
[[structure]]
name = "right_ureter"
kind = "duct"
mirror = "left_ureter"
"""


def test_structures_of_ones_own(write: Callable[[str], Path]) -> None:
    text = BENCH.replace('2 = "liver"', '3 = "spleen_cyst", 4 = "left_ureter", 5 = "right_ureter"')
    text = text.replace('learns = ["spleen"]', 'learns = ["spleen", "spleen_cyst", "left_ureter"]')
    path = write(text + DECLARED)
    bench = load_benchmark(path)
    assert load_benchmark(path) == bench  # a second look is no second declaration
    assert bench.steps[0].learns[1] == "spleen_cyst"
    assert ancestors("spleen_cyst") == ("spleen",)
    assert structure("spleen_cyst").prompt == "spleen cyst"
    assert structure("left_ureter").prompt == "ureter on the left"
    other = path.with_name("other.toml")
    other.write_text(text + DECLARED.replace("on the left", "left"))
    with pytest.raises(SpecError, match="another file of this session"):
        load_benchmark(other)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"spleen_cyst"', '"liver"', "without declaring it"),
        ('"spleen_cyst"', '"Spleen Cyst"', "snake case"),
        ('kind = "cyst"', 'kind = "stone"', "organ, vessel"),
        ('parent = "spleen"', 'parent = "splen"', "did you mean 'spleen'"),
        ('parent = "spleen"', 'parent = "spleen_cyst"', "contains itself"),
        ('mirror = "left_ureter"', "", "does not point back"),
        ('mirror = "right_ureter"', 'mirror = "left_kidney"', "does not point back"),
        ('"right_ureter"\nkind', '"spleen_cyst"\nkind', "declared twice"),
        ('kind = "cyst"', 'knd = "cyst"', "did you mean 'kind'"),
        ('kind = "cyst"', 'kind = "cyst"\naliases = ["Spleen"]', "'Spleen' stands for 'spleen'"),
        ('kind = "cyst"', 'kind = "cyst"\naliases = ["left_ureter"]', "take it out of `aliases`"),
        ('"spleen_cyst"', '"small_bowel"', "use 'small_intestine' without declaring it"),
    ],
)
def test_a_declaration_is_checked(
    old: str, new: str, says: str, write: Callable[[str], Path]
) -> None:
    path = write(BENCH + DECLARED.replace(old, new, 1))
    with pytest.raises(ClbenchError) as err:
        load_benchmark(path)
    assert says in str(err.value)
    assert taxonomy.DECLARED == {}


def test_a_split_file_may_draw(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[draw]\nseed = 1\ntrain = 20\nvalidation = 20\ntest = 20\n")
    draw = load_split(path).draw
    assert draw is not None
    assert (draw.train, draw.validation, draw.test, draw.part) == (20, 20, 20, 1)


@pytest.mark.parametrize("name", registry.entries("benchmark"))
def test_a_benchmark_written_as_text_is_read_back_equal(name: str, tmp_path: Path) -> None:
    course = registry.benchmark(name)
    odd = replace(course, title='5 \u03bcm "thin", \x7f\\n', name=f"{name}_copy")
    path = tmp_path / "copy.toml"
    path.write_text(benchmark_text(odd), encoding="utf-8")
    assert load_benchmark(path) == odd
    assert load_benchmark(path).digest() == odd.digest()


def test_what_is_empty_or_written_otherwise_than_a_default_is_written(
    write: Callable[[str], Path],
) -> None:
    """An empty list that must be there, and numbers that equal a default and hash otherwise."""
    course = load_benchmark(write(BENCH))
    odd = replace(
        course.sources[0],
        partial=(Partial(cases=("9",), annotates=()),),
        rescale=Rescale(slope=1.0, intercept=-1024),
    )
    whole = Preprocessing(spacing_mm=(1.5, 1.5, 1.5), window_hu=(-175, 250))
    other = replace(odd, name="b", partial=())
    again = replace(course.steps[0], name="two", source="b", learns=(), again=("spleen",))
    course = replace(
        course, sources=(odd, other), steps=(*course.steps, again), preprocessing=whole
    )
    path = write(benchmark_text(course))
    assert load_benchmark(path) == course
    assert load_benchmark(path).digest() == course.digest()


def test_a_given_step_learns_from_no_case_and_a_taught_one_from_some(
    write: Callable[[str], Path],
) -> None:
    given = BENCH.replace(
        'split = "cases.toml"', 'split = {origin = "not at hand"}\ngiven = "0ab1"', 1
    )
    step = load_benchmark(write(given)).steps[0]
    assert (step.given, step.split.cases) == ("0ab1", ())
    tested = given.replace("{origin", "{test = [7, 8], origin")
    assert load_benchmark(write(tested)).steps[0].split.test == ("7", "8")
    for wrong in (
        tested.replace("{test", "{train = [6], test"),
        given.replace('\ngiven = "0ab1"', ""),
        BENCH.replace('split = "cases.toml"', 'split = "cases.toml"\ngiven = "0ab1"', 1),
    ):
        with pytest.raises(SpecError, match="a step that is taught needs cases"):
            load_benchmark(write(wrong))
