"""`data split`: drawn by rule, written as a split file, and taken by the commands that read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from clbench.cli.options import app, parse_splits
from clbench.data.checks.draw_split import DrawSettings, draw_split, write_split
from clbench.errors import ClbenchError, SettingError, SpecError
from clbench.spec.splits import PARTS, Split
from clbench.spec.toml import load_split


@pytest.fixture
def folder(lay_out: Any, tmp_path: Path) -> Path:
    """Ten cases, of which every second one holds a tumor."""
    rng = np.random.default_rng(0)
    for case in range(10):
        image = np.full((6, 6, 6), -1000, np.int16)
        image[1:5, 1:5, 1:5] = rng.integers(0, 100, (4, 4, 4))
        label = np.zeros(image.shape, np.uint8)
        label[2, 2, 2:4] = (1, 2 if case % 2 else 1)
        lay_out(tmp_path / "lits", "lits", str(case), image, label)
    return tmp_path / "lits"


def test_a_drawn_split_is_written_and_read(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    words = ["data", "split", f"lits={folder}", "--bench", "tumor_ext", "--out", str(out)]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "7 train, 1 validation, 2 test case(s), drawn from 10 patient(s)" in run.output
    split = load_split(out)
    assert sorted(split.cases, key=int) == [str(i) for i in range(10)]
    assert split == draw_split(DrawSettings(path=str(folder), bench="tumor_ext")).split.__class__(
        **{"name": "mine.toml", "origin": split.origin, **{p: getattr(split, p) for p in PARTS}}
    )
    assert "seed 0" in split.origin
    assert parse_splits([f"lits={out}"]) == {"lits": split}
    check = ["data", "check", f"lits={folder}", "--split", f"lits={out}"]
    assert CliRunner().invoke(app, check).exit_code == 0
    assert CliRunner().invoke(app, words).exit_code == 1  # never written over


def test_a_seed_and_a_layout_and_what_a_case_must_hold(folder: Path, tmp_path: Path) -> None:
    def drawn(**more: Any) -> Split:
        return draw_split(DrawSettings(path=str(folder), cache=tmp_path / "c", **more)).split

    plain = drawn(layout="lits")
    assert [getattr(plain, p) for p in PARTS] == [
        getattr(drawn(bench="tumor_ext"), p) for p in PARTS
    ]
    assert drawn(layout="lits", seed=1).test != plain.test
    tumor = drawn(bench="tumor_ext", needs=("liver_tumor",), without=("volume-1",))
    assert sorted(tumor.cases) == ["3", "5", "7", "9"]
    asked = drawn(layout="lits", train=2, validation=0, test=3)
    assert [len(getattr(asked, p)) for p in PARTS] == [2, 0, 3]


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        ({}, SettingError, "--bench BENCH or --layout LAYOUT"),
        ({"layout": "lits", "bench": "tumor_ext"}, SettingError, "both"),
        ({"layout": "lits", "needs": ("liver",)}, SettingError, "name the benchmark"),
        ({"bench": "tumor_ext", "needs": ("colon",)}, SettingError, "liver_tumor"),
        ({"layout": "lits", "without": ("volme-1",)}, SettingError, "did you mean 'volume-1'"),
        ({"layout": "lits", "train": 9, "test": 9}, SpecError, "too few patients"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    more: dict[str, Any], kind: type[ClbenchError], says: str, folder: Path
) -> None:
    with pytest.raises(kind) as err:
        draw_split(DrawSettings(path=str(folder), **more))
    assert says in str(err.value)


def test_names_with_quotes_survive(tmp_path: Path) -> None:
    split = Split(name="q", train=('a "b"', "é, c"), test=("d=1",), origin="x\\y")
    write_split(split, tmp_path / "q.toml")
    again = load_split(tmp_path / "q.toml")
    assert (again.train, again.test, again.origin) == (split.train, split.test, split.origin)


@pytest.mark.parametrize(
    "text", ["", "train = 3", 'train = ["1"]', "draw = {}", "[[", 'tests = ["1"]']
)
def test_the_error_of_a_wrong_split_file_says_what_one_looks_like(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SpecError) as err:
        load_split(tmp_path / "s.toml")
    assert 'train = ["1", "4..9"]' in str(err.value)


@pytest.mark.parametrize("word", ["lits=split.json", "lits=/a/b", "mine.toml"])
def test_a_wrong_split_option_says_what_one_looks_like(word: str) -> None:
    with pytest.raises(SettingError) as err:
        parse_splits([word])
    assert 'train = ["1", "4..9"]' in str(err.value)
