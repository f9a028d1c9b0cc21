"""The figures of an explained run: which cases and slices, what is drawn, equal bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forgetful_runs import CALLED, LOST

from clbench.diagnosis.explain import Explained, explain_run
from clbench.diagnosis.figures import write_figures
from clbench.diagnosis.strip_cases import choose, strip_cases
from clbench.evaluation.explained import (
    TOTAL,
    HeadBodyRow,
    LostDiceRow,
    summarize,
    summarize_head_body,
)
from clbench.evaluation.predictions import read_prediction
from clbench.evaluation.scoring import to_native
from clbench.report.figures.lost_dice import (
    REST,
    SMALLEST,
    WIDEST,
    _others,
    lost_dice_figure,
)


@pytest.fixture(scope="module")
def explained(forgetful: Path, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    folder = tmp_path_factory.mktemp("explained") / "tumor_ext" / "universal" / forgetful.name
    shutil.copytree(forgetful, folder)
    return explain_run(folder, models=False)


def total(case: str, dice: float, **more: Any) -> LostDiceRow:
    values: dict[str, Any] = {
        "step": 2, "eval_set": "btcv", "structure": "spleen", "learned_at": 1, "other": "",
        "truth_vox": 1, "voxels": 0, "part": TOTAL,
    }  # fmt: skip
    return LostDiceRow(case=case, dice=dice, **{**values, **more})


def test_the_median_and_the_worst_case_of_every_source_are_chosen() -> None:
    rows = [
        *(total(case, dice) for case, dice in zip("abcd", (0.4, 0.1, 0.3, 0.9), strict=True)),
        total("a", 0.0, structure="liver"),  # the mean of a is 0.2
        total("b", 5.0, part="absorbed"),  # no total
        total("c", 5.0, step=3),
        total("x", 0.5, eval_set="lits"),
    ]
    assert choose(rows, 2) == {
        ("btcv", "a"): ("median", 0.2),
        ("btcv", "d"): ("worst", 0.9),
        ("lits", "x"): ("median and worst", 0.5),
    }
    equal = [total(case, 0.5) for case in "cba"]
    assert choose(equal, 2) == {("btcv", "a"): ("worst", 0.5), ("btcv", "b"): ("median", 0.5)}


def test_the_strip_shows_what_was_lost(explained: Explained) -> None:
    for one in strip_cases(explained.catalog, explained.predictions.of, explained.rows, 2):
        assert set(one.truth) == set(one.before) == set(one.after) == set(one.missed)
        for name, missed in one.missed.items():
            assert missed.any() <= (name in (LOST, *CALLED)), name
            expected = one.truth[name] & one.before[name] & ~one.after[name]
            np.testing.assert_array_equal(missed, expected)
        assert any(missed.any() for missed in one.missed.values())
        assert not one.after[LOST].any()
        assert one.image.shape == one.truth[LOST].T.shape


def test_the_slice_holds_most_structures_that_lost_something(explained: Explained) -> None:
    """Counted anew, slice by slice, from whole volumes."""
    for one in strip_cases(explained.catalog, explained.predictions.of, explained.rows, 2):
        volume = one.volume
        truth, axes = volume.native_bits(), volume.native_axes()
        both = []
        for step in (1, 2):
            name = f"{volume.source}_{volume.case}.npz"
            stored = read_prediction(explained.folder / "predictions" / f"step{step}" / name)
            both.append((to_native(stored.bits, axes), stored.structures))
        counts = np.zeros(truth.shape[2], dtype=int)
        for name in one.truth:
            real, then, now = (
                (bits >> names.index(name)) & 1 == 1
                for bits, names in ((truth, volume.names), *both)
            )
            counts += (real & then & ~now).any(axis=(0, 1))
        shown = sum(bool(missed.any()) for missed in one.missed.values())
        assert shown == counts.max()


def test_figures_are_written_and_repeat_to_the_byte(explained: Explained, tmp_path: Path) -> None:
    first = write_figures(explained, tmp_path / "a")
    assert [p.name for p in first] == [
        "lost_dice.pdf", "lost_dice.png", "before_after.pdf", "before_after.png",
    ]  # fmt: skip
    for one, two in zip(first, write_figures(explained, tmp_path / "b"), strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")


def test_bars_add_up_to_the_diamond(explained: Explained) -> None:
    found = summarize(explained.rows)
    parts = [
        HeadBodyRow(
            step=2, eval_set="btcv", case="1", structure=one.structure, learned_at=1, old=1.0,
            new=0.2, old_head_new_body=0.9, new_head_old_body=0.3, probe_old_body=0.8,
            probe_new_body=0.7,
        )
        for one in found
    ]  # fmt: skip
    figure = lost_dice_figure(explained.record, found, summarize_head_body(parts))
    bars, _, models = figure.axes
    for y, one in enumerate(found):
        own = [p.get_width() for p in bars.patches if round(p.get_y() + p.get_height() / 2) == y]
        assert sum(own) == pytest.approx(one.lost, abs=1e-9)
        assert bars.lines[-1].get_xdata()[y] == one.lost
    widths = {round(p.get_width(), 6) for p in models.patches}
    assert widths == {0.7, 0.1}  # head ½ (0.7 + 0.7), body ½ (0.1 + 0.1)
    assert SMALLEST < 0.1


def test_many_others_share_a_column() -> None:
    to = {"background": 1, **{f"s{i}": 100 - i for i in range(20)}, "hardly": 4}
    others = _others([SimpleNamespace(to=to, truth_vox=1000)])  # type: ignore[list-item]
    assert others[0] == "background"
    assert others[1:3] == ["s0", "s1"]
    assert others[-1] == REST
    assert len(others) == WIDEST
    few = _others([SimpleNamespace(to={"s0": 5, "hardly": 4}, truth_vox=1000)])  # type: ignore[list-item]
    assert few == ["background", "s0"]
