"""A study file names runs; what it says wrongly is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from clbench.errors import SpecError
from clbench.grid.study_file import StudyFile, cells, part_of, read_study, refuse_other_orders


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_study_is_the_product_of_its_lists(tmp_path: Path) -> None:
    study = read_study(
        written(
            tmp_path,
            """
            courses = ["tumor_ext", "own/course.toml"]
            strategies = ["universal", "lwf"]
            seeds = [0, 2]
            profiles = ["quick"]
            out = "runs"
            [settings]
            default = []
            slow = ["train.lr=0.0001", "train.epochs=2"]
            [data]
            tumor_ext = "btcv=/d/B,lits=/d/L"
            [splits]
            tumor_ext = ["btcv=own.toml"]
            [tuned]
            tumor_ext = "tuned.toml"
            """,
        )
    )
    made = list(cells(study))
    assert len(made) == len({c.name for c in made}) == 16
    assert [c.seed for c in made[:4]] == [0, 2, 0, 2]
    assert made[0].arguments() == [
        *("--bench", "tumor_ext", "--strategy", "universal", "--seed", "0"),
        *("--profile", "quick", "--data", "btcv=/d/B,lits=/d/L", "--tuned", "tuned.toml"),
        *("--split", "btcv=own.toml", "--out", "runs"),
    ]
    last = made[-1]
    assert (last.bench, last.data, last.splits) == ("own/course.toml", None, ())
    assert last.tuned is None
    assert last.arguments()[-6:-2] == ["--set", "train.lr=0.0001", "--set", "train.epochs=2"]


def test_a_part_of_a_study_keeps_what_is_said_of_its_courses() -> None:
    study = StudyFile(
        courses=("a", "b"),
        strategies=("lwf", "mib"),
        seeds=(1, 2),
        data={"a": "x=1", "b": "y=2"},
        splits={"b": ("y=s.toml",)},
    )
    part = part_of(study, {"courses": ("b",), "seeds": (7,), "out": "there"})
    assert [(c.bench, c.strategy, c.seed, c.data, c.splits, str(c.out)) for c in cells(part)] == [
        ("b", name, 7, "y=2", ("y=s.toml",), "there") for name in ("lwf", "mib")
    ]
    assert part_of(part, {"courses": ("a",)}).data == {}


def test_absent_lists_are_the_defaults_and_doubles_count_once() -> None:
    study = StudyFile(courses=("tumor_ext",), strategies=("lwf", "lwf"), seeds=(1, 1))
    (only,) = cells(study)
    assert (only.profile, only.settings, only.overrides, only.seed) == (None, "", (), 1)


def test_a_course_in_an_order_takes_no_orders_beside_it() -> None:
    ordered = {"courses": ("body_ext.order3-1-2",), "strategies": ("lwf",)}
    assert len(list(cells(StudyFile(**ordered)))) == 1
    with pytest.raises(SpecError, match="two orders of the steps"):
        StudyFile(**ordered, orders=((1, 2, 3),))


@pytest.mark.parametrize("order", [(1,), (), (1, 2, 3, 4), (1, 1)])
def test_an_order_that_is_none_of_the_course_is_refused(order: tuple[int, ...]) -> None:
    study = StudyFile(courses=("tumor_ext",), strategies=("lwf",), orders=(order,))
    with pytest.raises(SpecError, match="no permutation"):
        refuse_other_orders(study)


def test_the_home_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (cell,) = cells(StudyFile(courses=("tumor_ext",), strategies=("lwf",), out="~/runs"))
    assert cell.out == tmp_path / "runs"


def test_orders_multiply_the_courses_and_keep_their_data(tmp_path: Path) -> None:
    text = """
        courses = ["tumor_ext", "own/course.toml"]
        strategies = ["lwf"]
        orders = [[1, 2], [2, 1]]
        [data]
        tumor_ext = "btcv=/d/B,lits=/d/L"
        """
    made = list(cells(read_study(written(tmp_path, text))))
    assert [(c.bench, c.data is not None) for c in made] == [
        ("tumor_ext", True),
        ("tumor_ext.order2-1", True),
        ("own/course.toml", False),
        ("own/course.toml.order2-1", False),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('courses = ["tumor_ext"]', "strategies missing"),
        ('courses = []\nstrategies = ["lwf"]', "courses must be a list of at least one name"),
        (
            'courses = ["a"]\nstrategies = ["lwf"]\nseeds = []',
            "seeds must be a list of whole numbers",
        ),
        ('courses = ["a"]\nstrategies = ["lwf"]\nseeds = [-1]', "seeds must be"),
        ('courses = ["a"]\nstrategies = ["lwf"]\nseeds = [9223372036854775808]', "seeds must be"),
        ('courses = ["a"]\nstrategies = ["lwf"]\nout = ""', "out must be"),
        ('courses = ["a"]\nstrategy = ["lwf"]', "unknown field 'strategy'"),
        ('courses = ["a"]\nstrategies = ["lwf"]\n[data]\nb = "x"', "data of a course"),
        ("courses = [", "not a valid TOML file"),
    ],
)
def test_what_is_no_study_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpecError) as err:
        read_study(path)
    assert said in str(err.value)
    assert "study.toml" in str(err.value.where)
