"""Notes on cases: through one channel into data check, run.json and the report's warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.cache import VolumeCache
from clbench.data.catalog import Catalog, build_catalog
from clbench.data.checks import case_notes
from clbench.data.checks.case_notes import NOT_HU, CaseNote, source_problems
from clbench.data.labels import read_case
from clbench.data.layouts import find_cases
from clbench.errors import DataError, SpecError
from clbench.run.plan import RunSettings, resolve
from clbench.spec import registry
from clbench.spec.benchmark import Rescale
from clbench.spec.settings import load_profile
from clbench.spec.splits import Split

BENCH = registry.benchmark("tumor_ext")
SMOKE = load_profile("smoke")
SPLITS = {
    "btcv": Split(name="b", train=("1", "2"), test=("3",)),
    "lits": Split(name="l", train=("0",), test=("1",)),
}
AFFINE = np.diag([-3.0, -3.0, 3.0, 1.0])


def write(lay_out: Any, folder: Path, layout: str, case: str, seed: int, add: int = 0) -> None:
    rng = np.random.default_rng(seed)
    image = np.full((20, 20, 20), -1000, np.int16)
    image[2:18, 2:18, 2:18] = rng.integers(-100, 100, (16, 16, 16))
    label = np.zeros(image.shape, np.uint8)
    label[3, 4:8, 4:8], label[4, 4:8, 4:8] = 1, 2
    lay_out(folder, layout, case, image + np.int16(add), label, AFFINE)


@pytest.fixture
def data(lay_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(case_notes.LOOKS, "anatomy")  # boxes in noise are no organs
    folder = tmp_path / "data"
    for case in ("1", "2", "3"):
        write(lay_out, folder / "btcv", "btcv", case, int(case))
    for case in ("0", "1"):
        write(lay_out, folder / "lits", "lits", case, 100 + int(case), add=1024)
    return folder


def catalog(folder: Path, tmp_path: Path, /, bench: Any = BENCH, **more: Any) -> Catalog:
    return build_catalog(
        bench,
        SMOKE.preprocessing(bench.preprocessing),
        data=str(folder),
        cache_root=tmp_path / "cache",
        phantom=SMOKE.phantom,
        splits=SPLITS,
        **more,
    )


def test_a_source_that_is_no_ct_is_refused_with_ways_out_that_work(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="images of a source are no CTs in HU") as err:
        catalog(data, tmp_path)
    for words in ("source 'lits', 2 of 2", "rescale = {slope", "data.expect_hu=false"):
        assert words in str(err.value)
    assert catalog(data, tmp_path, expect_hu=False).notes == ()
    assert catalog(data, tmp_path, expect_hu=None).notes == ()
    btcv, lits = BENCH.sources
    told = replace(BENCH, sources=(btcv, replace(lits, rescale=Rescale(intercept=-1024))))
    assert catalog(data, tmp_path, bench=told).notes == ()


def test_one_odd_case_is_a_warning(data: Path, lay_out: Any, tmp_path: Path) -> None:
    for case in ("0", "1"):
        write(lay_out, data / "lits", "lits", case, 100 + int(case))
    assert catalog(data, tmp_path).notes == ()
    write(lay_out, data / "btcv", "btcv", "2", 2, add=1024)
    whole = catalog(data, tmp_path)
    (note,) = whole.notes
    assert (note.source, note.case, note.kind) == ("btcv", "2", NOT_HU)
    (warning,) = whole.warnings()
    assert warning["kind"] == NOT_HU
    assert str(warning["message"]).startswith("btcv/2: no CT in HU")
    (data / "btcv" / "spare.nii.gz").write_bytes(b"")
    first, second = catalog(data, tmp_path).warnings()
    assert (first["step"], first["kind"]) == (0, "passed over")
    assert "spare.nii.gz" in str(first["message"])
    assert second == warning


def test_rescale_gives_the_volume_of_the_hu_file(data: Path, lay_out: Any, tmp_path: Path) -> None:
    lits = BENCH.sources[1]
    told = replace(lits, rescale=Rescale(slope=2, intercept=-1024))
    stored = find_cases(data / "lits", lits)["0"]
    raw = np.asarray(nib.load(stored.image).dataobj)  # type: ignore[attr-defined]  # NIfTI
    got = read_case(stored, told).image
    assert np.array_equal(got, read_case(stored, lits).image.astype(np.float32) * 2 - 1024)
    assert got.min() == raw.min() * 2.0 - 1024
    cache, pre = VolumeCache(tmp_path / "c"), SMOKE.preprocessing(BENCH.preprocessing)
    plain, scaled = cache.get(stored, lits, pre), cache.get(stored, told, pre)
    assert not np.array_equal(plain.image, scaled.image)  # and no entry of the other is taken


def test_a_look_that_is_added_reaches_the_catalog_and_data_check(
    data: Path, lay_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in ("0", "1"):
        write(lay_out, data / "lits", "lits", case, 100 + int(case))
    monkeypatch.setitem(
        case_notes.LOOKS, "size", lambda raw, source: [f"{raw.image.shape[0]} wide"]
    )
    notes = catalog(data, tmp_path).notes
    assert [n.message for n in notes] == [
        f"{s}/{c}: 20 wide" for s, c in (("btcv", "1"), ("btcv", "2"), ("btcv", "3"), ("lits", "0"), ("lits", "1"))
    ]  # fmt: skip
    run = CliRunner().invoke(app, ["data", "check", str(data / "lits"), "--layout", "lits"])
    assert run.output.count("note: 20 wide") == 2


def test_data_check_refuses_what_a_run_refuses(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('train = ["0"]\ntest = ["1"]\n')
    words = ["data", "check", f"lits={data / 'lits'}", "--split", f"lits={file}"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 1
    assert "images of a source are no CTs in HU" in run.output
    assert CliRunner().invoke(app, [*words, "--set", "data.expect_hu=false"]).exit_code == 0
    assert CliRunner().invoke(app, [*words, "--set", "train.lr=1"]).exit_code == 1


def test_nine_in_ten_are_a_source() -> None:
    cases = {"s": [str(i) for i in range(10)]}

    def odd(count: int) -> list[CaseNote]:
        return [
            CaseNote(source="s", case=str(i), kind=NOT_HU, text="no CT in HU") for i in range(count)
        ]

    assert not list(source_problems(odd(8), cases))
    assert len(list(source_problems(odd(9), cases))) == 1
    assert not list(source_problems(odd(10), {"s": ["11"]}))
    assert not list(source_problems([replace(n, kind="header") for n in odd(10)], cases))


def test_the_setting_changes_no_run_id(cache_root: Path) -> None:
    def identity(*words: str) -> Any:
        settings = RunSettings(
            bench="tumor_ext",
            strategy="finetune",
            profile="smoke",
            cache=cache_root,
            overrides=words,
        )
        return resolve(settings).identity

    assert identity("data.expect_hu=false") == identity()


def test_a_course_without_rescale_keeps_its_digest() -> None:
    # computed before the field existed
    assert registry.benchmark("body_ext").digest() == "8e2cc554e6d6b7b6"
    btcv, lits = BENCH.sources
    told = replace(BENCH, sources=(btcv, replace(lits, rescale=Rescale(intercept=-1024))))
    assert told.digest() != BENCH.digest()
    with pytest.raises(SpecError, match="slope"):
        Rescale(slope=0)


def test_the_phantom_has_no_notes(cache_root: Path) -> None:
    made = build_catalog(
        BENCH,
        SMOKE.preprocessing(BENCH.preprocessing),
        data=None,
        cache_root=cache_root,
        phantom=SMOKE.phantom,
    )
    for number, split in enumerate(made.splits, 1):
        source = made.source(number)
        for case in split.cases:
            assert made.cache.notes(made.files[source.name][case], source) == []
