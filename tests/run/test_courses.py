"""Courses of three steps: the body extension on two layouts, and courses a user writes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from locations import ROOT
from typer.testing import CliRunner

from clbench.cli.options import app, parse_splits
from clbench.data.catalog import Catalog, build_catalog
from clbench.errors import SettingError, SpecError, StoreError
from clbench.run import course as course_module
from clbench.run.course import run_course
from clbench.run.plan import RunSettings, resolve
from clbench.run.record import catalog_of, course_of, new_record
from clbench.run.verify import verify_run
from clbench.spec import registry, taxonomy
from clbench.spec.settings import PhantomSettings, load_profile
from clbench.spec.splits import Split
from clbench.store import run_folder
from clbench.store.record import RunRecord, refuse_mixture

JHH = registry.benchmark("body_ext")
TOTALSEG = registry.benchmark("body_ext_totalseg")
TINY = ("phantom.train=2", "phantom.test=1", "phantom.validation=0", "train.epochs=1",
        "train.iterations=1", "backbone.size=8")  # fmt: skip
SMALL = PhantomSettings(train=2, validation=0, test=1, spacing_mm=10.0)
EVERYWHERE = (slice(None),) * 3


def test_the_two_courses_are_those_of_the_paper_and_its_public_stand_in() -> None:
    for bench in (JHH, TOTALSEG):
        assert [len(s.learns) for s in bench.steps] == [7, 3, 4]
        assert [s.learns for s in bench.steps] == list(bench.groups.values())
        for number, step in enumerate(bench.steps, 1):
            draw = step.split.draw
            assert draw is not None
            assert (draw.train, draw.validation, draw.test, draw.part) == (20, 20, 20, number)
            assert bench.shown(number) >= set(step.learns)
            others = {n for s in bench.steps if s is not step for n in s.learns}
            assert not bench.shown(number) & others
    assert JHH.structures(2) == TOTALSEG.structures(2)
    assert set(JHH.structures(3)) ^ set(TOTALSEG.structures(3)) == {
        "celiac_trunk", "superior_mesenteric_artery", "left_iliac_artery", "right_iliac_artery",
    }  # fmt: skip
    draws = [s.split.draw for s in TOTALSEG.steps]
    assert len({(d.seed, d.needs) for d in draws if d}) == 1  # else blocks could meet


def test_groups_are_those_printed_in_table_11() -> None:
    with (ROOT / "results/published/table11.csv").open() as file:
        printed = {row["group"] for row in csv.DictReader(file)}
    assert set(JHH.groups) == printed
    assert not set(TOTALSEG.groups) & printed  # never mistaken for JHH


def test_raw_values_of_jhh() -> None:
    source = JHH.source("jhh")
    assert len(source.labels) + len(source.sides) + len(source.ignored) == 24
    numbers = {value: taxonomy.structure(name).template_id for value, name in source.labels.items()}
    assert numbers == {  # value in the file → number in the paper's Table 2 and its extension
        1: 8, 4: 33, 5: 25, 6: 18, 7: 14, 8: 4, 9: 9, 10: 3, 11: 2, 12: 6, 13: 11, 14: 34, 15: 35,
        16: 19, 18: 1, 19: 7, 20: 10, 21: 36, 22: 37, 24: 38,
    }  # fmt: skip
    assert source.sides[2] == ("left_adrenal_gland", "right_adrenal_gland")
    assert not JHH.reads("jhh").sides  # no step teaches the adrenals
    assert set(JHH.structures(3)) <= set(JHH.reads("jhh").structures)


@pytest.mark.parametrize(
    ("bench", "strategy"),
    [(JHH, "finetune"), (JHH, "universal"), (JHH, "joint"), (TOTALSEG, "finetune")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_three_steps_on_the_phantom(
    bench: Any, strategy: str, cache_root: Path, smoke_out: Path
) -> None:
    folder = run_course(
        RunSettings(
            bench=bench.name, strategy=strategy, profile="smoke", out=smoke_out, cache=cache_root,
            overrides=TINY,
        )
    )  # fmt: skip
    rows = [r for r in run_folder.read_scores(folder / "scores.csv") if r.metric == "dice"]
    for step in (1, 2, 3):
        got = {r.structure for r in rows if r.step == step}
        assert got == set(bench.structures(step))
    # what a step hides from teaching, the examination sees: every structure in every test case
    assert not [r for r in rows if r.status == "not_annotated"]
    assert len({r.case for r in rows}) == 3
    ledger = run_folder.read_record(folder)["ledger"]
    trained = {case for by in ledger.values() for case in by.get("train", [])}
    tested = {case for by in ledger.values() for case in by["test"]}
    assert not trained & tested


def test_jhh_and_its_stand_in_never_share_a_table(smoke_out: Path, cache_root: Path) -> None:
    records = []
    for bench in (JHH, TOTALSEG):
        settings = RunSettings(
            bench=bench.name, strategy="finetune", profile="smoke", out=smoke_out, cache=cache_root,
            overrides=TINY,
        )  # fmt: skip
        records.append(RunRecord.read(run_course(settings)))
    with pytest.raises(StoreError, match="one table") as err:
        refuse_mixture(records)
    assert "bench" in str(err.value.got)


def small(bench: Any, cache_root: Path) -> Catalog:
    coarse = load_profile("smoke").preprocessing(bench.preprocessing)
    return build_catalog(bench, coarse, data=None, cache_root=cache_root, phantom=SMALL)


@pytest.mark.parametrize("bench", [JHH, TOTALSEG], ids=lambda b: b.name)
def test_while_teaching_a_case_shows_its_steps_lesson_alone(bench: Any, cache_root: Path) -> None:
    catalog = small(bench, cache_root)
    catalog.step = 2
    case = catalog.splits[1].train[0]
    taught, examined = (catalog.open(2, case, p) for p in ("train", "test"))  # type: ignore[arg-type]
    course = bench.structures(3)
    shown = {n for n in course if (taught.labels([n], EVERYWHERE) != 255).all()}
    assert shown == set(bench.steps[1].learns)
    assert (examined.labels(course, EVERYWHERE) != 255).all()
    # sampling knows no more than the labels do
    names = {taught.names[i] for p in taught.counts for i in range(64) if p >> i & 1}
    assert names <= bench.shown(2)
    positive = int(sum(n for p, n in taught.counts.items() if p))
    known = taught.labels([n for n in taught.names if n in bench.shown(2)], EVERYWHERE)
    assert positive == int((known == 1).any(0).sum())
    both = np.isin(taught.where[0], np.flatnonzero(taught.image > -175))
    assert both.all()  # hidden organs are tissue of the background, air is not


def test_steps_of_one_source_have_subjects_of_their_own(cache_root: Path) -> None:
    for bench in (JHH, TOTALSEG):
        cases = [set(s.cases) for s in small(bench, cache_root).splits]
        assert sum(map(len, cases)) == len(set.union(*cases)) == 9


# ------------------------------------------------------------------------- data of patients


def scan(seed: int, values: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tissue in air, with a small box per structure; pairs lie on both sides."""
    rng = np.random.default_rng(seed)
    image = np.full((24, 12, 12), -1000, np.int16)
    image[1:23, 1:11, 1:11] = rng.integers(0, 100, (22, 10, 10))
    label = np.zeros(image.shape, np.uint8)
    for i, value in enumerate(values.values()):
        label[2 + i, 3:6, 3:6] = value
    return image, label


def patients(bench: Any, folder: Path, cache: Path, **splits: Split) -> Catalog:
    return build_catalog(
        bench, load_profile("smoke").preprocessing(bench.preprocessing), data=str(folder),
        cache_root=cache, phantom=SMALL, splits=splits,
    )  # fmt: skip


def test_jhh_is_read_by_lists_of_the_users(tmp_path: Path, lay_out: Any) -> None:
    raw = {name: value for value, name in JHH.source("jhh").labels.items()}
    for i in range(6):
        image, label = scan(i, raw)
        label[0, 0, 0] = 17  # a value without meaning
        label[1, 1, 1] = 2  # one adrenal gland: no step teaches them
        lay_out(tmp_path / "jhh", "jhh", f"F{i}", image, label)
    files = []
    for i, step in enumerate(JHH.steps):
        path = tmp_path / f"{i}.toml"
        path.write_text(f'train = ["F{2 * i}"]\ntest = ["F{2 * i + 1}"]\n')
        files.append(f"{step.name}={path}")
    catalog = patients(JHH, tmp_path / "jhh", tmp_path / "cache", **parse_splits(files))
    assert [s.train for s in catalog.splits] == [("F0",), ("F2",), ("F4",)]
    for step in (1, 2, 3):
        catalog.step = step
        volume = catalog.open(step, f"F{2 * step - 2}", "train")
        learns = JHH.steps[step - 1].learns
        assert (volume.labels(learns, EVERYWHERE) != 255).all()
        assert int(volume.native_bits().astype(bool).sum()) == 9 * len(raw)
    # one user's rule for the whole source deals a block to each step
    rule = tmp_path / "rule.toml"
    rule.write_text("draw = {seed = 5, train = 1, test = 1}\n")
    drawn = patients(JHH, tmp_path / "jhh", tmp_path / "cache", **parse_splits([f"jhh={rule}"]))
    assert len({c for s in drawn.splits for c in s.cases}) == 6
    # without lists the benchmark's own rule asks for 180 patients
    with pytest.raises(SpecError, match="too few patients") as err:
        patients(JHH, tmp_path / "jhh", tmp_path / "cache")
    assert "at least 60 (part 1 of 60 each)" in str(err.value)


def test_a_record_names_the_patient_behind_each_scan(tmp_path: Path, lay_out: Any) -> None:
    """A drawn split becomes lists of cases; who is behind them must not be lost on the way."""
    bench = replace(
        JHH, sources=tuple(replace(s, patient=r"(F\d+)_[av]") for s in JHH.sources)
    )  # fmt: skip
    raw = {name: value for value, name in JHH.source("jhh").labels.items()}
    for i in range(6):
        for phase in "av":
            lay_out(tmp_path / "jhh", "jhh", f"F{i}_{phase}", *scan(2 * i + (phase == "a"), raw))
    rule = tmp_path / "rule.toml"
    rule.write_text("draw = {seed = 5, train = 1, test = 1}\n")
    drawn = patients(bench, tmp_path / "jhh", tmp_path / "cache", **parse_splits([f"jhh={rule}"]))
    course = course_of(bench, drawn)
    assert [len(cases) for cases in course.test] == [2, 2, 2]
    tests = [case for cases in course.test for case in cases]
    assert course.patient_of == {c: c.split("/")[1].split("_")[0] for c in tests}
    drawn.patients = False  # on the phantom every case is a subject of its own
    assert course_of(bench, drawn).patient_of == {}


def test_totalsegmentator_draws_abdomens_alone(tmp_path: Path, lay_out: Any) -> None:
    source = TOTALSEG.source("totalseg")
    second = {"gall_bladder": "gallbladder", "intestine": "small_bowel",
              "postcava": "inferior_vena_cava"}  # fmt: skip
    values = {stem: i for i, stem in enumerate(source.masks, 1) if stem not in second}
    first_names = {stem: (value,) for stem, value in values.items()}
    other_names = {new: (values[old],) for new, old in second.items()} | {
        stem: value for stem, value in first_names.items() if stem not in second.values()
    }
    for i in range(16):
        names = other_names if i % 2 else first_names  # both kinds of names, side by side
        image, label = scan(i, values)
        if i % 4 == 3:
            label[label == values["liver"]] = 0  # a chest, say: the mask is there, and empty
        lay_out(tmp_path, "totalsegmentator", f"s{i:04d}", image, label, masks=names)
    (tmp_path / "meta.csv").write_text("image_id;split\n")
    lay_out(tmp_path, "totalsegmentator", "s0864", *scan(99, {}), masks=first_names)
    (tmp_path / "s0864" / "segmentations" / "liver.nii.gz").write_bytes(b"damaged")
    steps = tuple(
        replace(
            s, split=replace(s.split, draw=replace(s.split.draw, train=2, validation=1, test=1))
        )  # type: ignore[type-var]
        for s in TOTALSEG.steps
    )
    catalog = patients(replace(TOTALSEG, steps=steps), tmp_path, tmp_path / "cache")
    used = [set(s.cases) for s in catalog.splits]
    assert sum(map(len, used)) == len(set.union(*used)) == 12  # all that hold a liver
    assert not {"s0003", "s0007", "s0011", "s0015", "s0864"} & set.union(*used)
    kinds = set()
    for number, split in enumerate(catalog.splits, 1):
        catalog.step = number
        for case in split.train:
            volume = catalog.open(number, case, "train")
            shown = volume.labels(TOTALSEG.steps[number - 1].learns, EVERYWHERE)
            assert (shown != 255).all()
            kinds.add(int(case[1:]) % 2)
    assert kinds == {0, 1}


# ------------------------------------------------------------------------- courses users write

MIXED = """
name = "mixed"
version = 1
title = "vessels first, then one organ, then four"
[[source]]
name = "ward"
title = "one value for both kidneys"
layout = "nnunet"
labels = {1 = "liver", 4 = "aorta", 9 = "spleen"}
sides = {2 = ["left_kidney", "right_kidney"]}
[[source.partial]]
cases = ["2000..2001"]
annotates = ["liver", "left_kidney", "right_kidney"]
[[source]]
name = "atlas"
title = "masks"
layout = "abdomenatlas"
masks = {liver = "liver", spleen = "spleen", postcava = "postcava", gall_bladder = "gall_bladder"}
[[step]]
name = "vessels"
source = "ward"
learns = ["aorta"]
split = {train = ["a"], test = ["b"]}
[[step]]
name = "liver"
source = "atlas"
learns = ["liver"]
split = {train = ["c"], test = ["d"]}
[[step]]
name = "rest"
source = "ward"
learns = ["right_kidney", "left_kidney", "spleen"]
split = {train = ["e"], test = ["f"]}
[[step]]
name = "last"
source = "atlas"
learns = ["postcava", "gall_bladder"]
split = {train = ["g"], test = ["h"]}
"""


def test_a_course_over_two_layouts_in_any_order(cache_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)

    settings = RunSettings(
        bench=str(path), strategy="finetune", profile="smoke", out=tmp_path / "out",
        cache=cache_root, overrides=TINY,
    )  # fmt: skip
    folder = run_course(settings)
    rows = {
        (r.eval_set, r.structure): r
        for r in run_folder.read_scores(folder / "scores.csv")
        if r.step == 4 and r.metric == "dice" and r.scoring == "strict"
    }
    assert rows["ward", "liver"].status != "not_annotated"  # annotated in several sources
    assert rows["atlas", "liver"].status != "not_annotated"
    assert rows["atlas", "aorta"].status == "not_annotated"
    assert (rows["ward", "left_kidney"].gt_vox or 0) > 0  # split from one value
    for named in ("mixed", str(path)):
        words = ["table", "summary", "--bench", named, "--results", str(tmp_path / "out")]
        table = CliRunner().invoke(app, words)
        assert table.exit_code == 0, table.output
        assert "mixed v1 on the PHANTOM" in table.output
    # nobody guards the version of a user's file: a changed course is another run
    assert resolve(settings).folder == folder
    path.write_text(MIXED.replace('["postcava", "gall_bladder"]', '["gall_bladder"]'))
    changed = resolve(settings)
    assert changed.folder != folder
    with pytest.raises(StoreError, match="different course"):
        refuse_mixture(
            [
                RunRecord.read(folder),
                RunRecord.from_json(json.loads(json.dumps(new_record(changed).to_json()))),
            ]
        )


def test_the_readmes_course_runs(cache_root: Path, tmp_path: Path) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    whole, declared = re.findall(
        r"```toml\n(.*?)```", text.split("## A whole course file")[1], re.DOTALL
    )[:2]
    path = tmp_path / "my_course.toml"
    path.write_text(whole + declared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taxonomy, "DECLARED", {})
        bench = registry.benchmark(str(path))
        assert taxonomy.ancestors("spleen_cyst") == ("spleen",)
    assert bench.source("ward").patient_of("ward007_1") == "ward007"
    assert bench.source("ward").annotated("ward007_1") == ("liver", "spleen")
    assert bench.shown(3) == {"aorta", "postcava", "liver"}
    path.write_text(whole)
    folder = run_course(
        RunSettings(
            bench=str(path), strategy="universal", profile="smoke", out=tmp_path / "out",
            cache=cache_root, overrides=TINY,
        )
    )  # fmt: skip
    assert run_folder.read_record(folder)["status"] == "finished"


OWN = """
name = "own"
version = 1
title = "a structure clbench does not know"
[[structure]]
name = "liver_cyst"
kind = "cyst"
parent = "liver"
[[source]]
name = "ward"
title = "W"
layout = "lits"
labels = {1 = "liver", 2 = "liver_cyst"}
[[step]]
name = "liver"
source = "ward"
learns = ["liver"]
split = {train = [1], test = [2]}
[[step]]
name = "cyst"
source = "ward"
learns = ["liver_cyst"]
split = {train = [3], test = [4]}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lay_out: Any) -> Path:
    """A folder with four cases and a benchmark file beside it."""
    monkeypatch.setattr(taxonomy, "DECLARED", {})
    rng = np.random.default_rng(0)
    for case in "1234":
        image = np.full((20, 20, 20), -1000, np.int16)
        image[2:18, 2:18, 2:18] = rng.integers(0, 100, (16, 16, 16))
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 4:12, 4:12] = 1
        label[6:9, 6:9, 6:9] = 2
        lay_out(tmp_path / "ward", "lits", case, image, label)
    (tmp_path / "own.toml").write_text(OWN)
    return tmp_path


def test_a_structure_of_ones_own_is_taught(own: Path, cache_root: Path) -> None:
    settings: dict[str, Any] = {
        "bench": str(own / "own.toml"), "strategy": "universal", "profile": "smoke",
        "data": f"ward={own / 'ward'}", "out": own / "out", "cache": cache_root,
    }  # fmt: skip
    words = ("train.epochs=1", "train.iterations=1")
    with pytest.raises(SettingError, match="no text vector") as err:
        run_course(RunSettings(**settings, overrides=words))
    assert "text.encoding=onehot" in str(err.value)
    for encoding in ("onehot", "random"):
        folder = run_course(
            RunSettings(**settings, overrides=(*words, f"text.encoding={encoding}"))
        )
        rows = {
            (r.case, r.structure): r
            for r in run_folder.read_scores(folder / "scores.csv")
            if r.step == 2 and r.metric == "dice" and r.scoring == "strict"
        }
        assert rows["4", "liver"].gt_vox == 8**3  # the cyst is liver too
        assert rows["2", "liver_cyst"].gt_vox == 3**3
    assert not (own / "out" / "tumor_ext").exists()


def test_a_run_is_read_from_its_own_copy_of_the_course(
    own: Path, cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, after the file moved, in a process that never read it."""
    monkeypatch.chdir(own)
    (own / "splits").mkdir()
    (own / "splits" / "cyst.toml").write_text("train = [3]\ntest = [4]\n")
    (own / "own.toml").write_text(
        OWN.replace("split = {train = [3], test = [4]}", 'split = "splits/cyst.toml"')
    )
    folder = run_course(
        RunSettings(
            bench="own.toml", strategy="finetune", profile="smoke", data="ward=ward", out=own / "out",
            cache=cache_root, overrides=(*TINY, "text.encoding=onehot"),
        )
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("own.toml", "splits"):
        (own / name).rename(elsewhere / f"moved {name}")
    monkeypatch.setattr(taxonomy, "DECLARED", {})

    record = RunRecord.read(folder)
    assert taxonomy.structure("liver_cyst").parent == "liver"
    assert taxonomy.canonical("liver_cyst") == "liver_cyst"
    assert record.course.groups == {"Mean": ["liver", "liver_cyst"]}
    for words in (["score", str(folder)], ["cost", str(folder)], ["verify", str(folder)]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception}"
    assert "scores against" in done.output
    assert "not checked: scores against" not in done.output

    copy = folder / "course" / "own.toml"
    text = copy.read_text()
    copy.write_text(text.replace('kind = "cyst"', 'kind = "tumor"'))
    with pytest.raises((StoreError, SpecError)):
        catalog_of(record)
    copy.unlink()
    with pytest.raises(StoreError, match="keeps no copy") as err:
        catalog_of(record)
    assert str(copy) in str(err.value)
    copy.write_text(text)  # what the error advises
    assert catalog_of(record).fingerprint == record.data_fingerprint


def test_groups_that_are_edited_reach_a_finished_run(
    own: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables and its copy of the course; nothing is taught, and no damage is sealed."""
    file, text = own / "own.toml", (own / "own.toml").read_text()
    settings = RunSettings(
        bench=str(file), strategy="finetune", profile="smoke", data=f"ward={own / 'ward'}",
        out=own / "out", cache=cache_root, overrides=(*TINY, "text.encoding=onehot"),
    )  # fmt: skip
    folder = run_course(settings)
    told: list[str] = []

    def again(groups: str) -> RunRecord:
        file.write_text(text.replace("[[structure]]", f"[groups]\n{groups}\n[[structure]]", 1))
        told.clear()
        assert run_course(settings, lambda e: told.append(str(e.get("what", e["event"])))) == folder
        return RunRecord.read(folder)

    assert again('Whole = ["liver"]').course.groups == {"Whole": ["liver"]}
    assert any("its tables have the new ones" in line for line in told)
    assert told[-1] == "already finished"
    assert (folder / "course" / "own.toml").read_text() == file.read_text()
    verify_run(folder)
    again('Whole = ["liver"]')
    assert not any("groups" in line for line in told)

    log = folder / "events.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b"\n")
    again('Other = ["liver_cyst"]')
    with pytest.raises(StoreError, match=r"changed after the run was finished"):
        verify_run(folder)
    log.write_bytes(whole)
    verify_run(folder)

    def locked(*_: Any, **__: Any) -> Any:
        raise StoreError("the folder cannot be written")

    monkeypatch.setattr(course_module, "alone", locked)
    assert again('Third = ["liver"]').course.groups == {"Other": ["liver_cyst"]}
    assert any("keep the earlier ones: the folder cannot be written" in line for line in told)


def test_results_of_a_moved_course_file_are_named_by_the_course(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such course file") as err:
        registry.name_of(str(tmp_path / "gone.toml"))
    assert "course's name" in str(err.value)
