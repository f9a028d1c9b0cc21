"""A run extended by a structure: an ordinary run again; with `frozen`, old masks to the bit."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from own_cts import write_own_cts

from clbench.deployment.extension.agreement import FILE, read_agreement
from clbench.deployment.extension.cost import extension_tables
from clbench.deployment.extension.extend import ExtendSettings, extend
from clbench.deployment.extension.learned import learned_by_run
from clbench.deployment.predict import predict_volume
from clbench.deployment.trained import checkpoint_path, load_trained
from clbench.errors import ClbenchError, DataError, SettingError, StoreError
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.run.record import catalog_of
from clbench.run.verify import verify_run
from clbench.store import checkpoint, run_folder
from clbench.store import files as store_files
from clbench.store.record import RunRecord
from clbench.strategies.universal import Universal

Make = Callable[..., ExtendSettings]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Path:
    return write_own_cts(tmp_path_factory.mktemp("own") / "cts", cache_root, 4)


@pytest.fixture(scope="module")
def settings(smoke_run: Path, own: Path, cache_root: Path, tmp_path_factory) -> Make:
    out = tmp_path_factory.mktemp("extended")

    def made(**more: object) -> ExtendSettings:
        base = ExtendSettings(
            model=smoke_run,
            learn=("spleen_cyst",),
            inside="spleen",
            data=own,
            strategy="frozen",
            out=out,
            cache=cache_root,
        )
        return replace(base, **more)

    return made


@pytest.fixture(scope="module")
def frozen(settings: Make) -> Path:
    return extend(settings())


def test_with_frozen_old_masks_are_those_of_the_old_model_to_the_bit(
    frozen: Path, smoke_run: Path
) -> None:
    old, new = load_trained(smoke_run), load_trained(frozen)
    assert new.structures == (*old.structures, "spleen_cyst")
    catalog = catalog_of(RunRecord.read(frozen))
    voxels = 0
    for case in catalog.splits[1].cases:
        volume = catalog.open(2, case, "test")
        one, two = predict_volume(old, volume), predict_volume(new, volume)
        mask = (1 << len(old.structures)) - 1
        np.testing.assert_array_equal(one, two & mask)
        voxels += int(np.count_nonzero(one))
    assert voxels > 0
    rows = read_agreement(frozen)
    assert len(rows) == 4 * len(old.structures)
    assert all(r.agreement == 1 or np.isnan(r.agreement) for r in rows)
    assert "every old mask is equal to the bit." in extension_tables(frozen)[0].notes


def test_the_result_is_an_ordinary_run(frozen: Path, smoke_run: Path) -> None:
    record = RunRecord.read(frozen)
    assert (record.status, record.steps_done, record.patients) == ("finished", 2, True)
    assert record.extends is not None
    assert record.extends["run"] == str(smoke_run)
    assert [len(cases) for cases in record.course.test] == [0, 1]
    assert "1" not in record.ledger or record.ledger["1"] == {"test": record.ledger["2"]["test"]}
    checked = verify_run(frozen).checked
    assert any(line.endswith("predictions and the data") for line in checked)
    before = {r.structure for r in run_folder.read_scores(frozen / "scores.csv") if r.step == 1}
    assert before == set(RunRecord.read(smoke_run).course.structures)


def test_it_can_be_extended_again_with_its_own_strategy(
    frozen: Path, settings: Make, own: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(own, mine)
    (mine / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "big_lesion": 2}}))
    (values,) = [settings(model=frozen, data=mine, learn=("big_lesion",), strategy=None)]
    mine_label = {"background": 0, "spleen": 1, "big_lesion": 2}
    (mine / "dataset.json").write_text(json.dumps({"labels": mine_label}))
    again = extend(values)
    old, record = RunRecord.read(frozen), RunRecord.read(again)
    assert record.course.structures == (*old.course.structures, "big_lesion")
    assert len(record.course.steps) == 3
    verify_run(again)
    one, two = load_trained(frozen), load_trained(again)
    state = two.server.model.state_dict()
    for name, tensor in one.server.model.state_dict().items():
        assert (state[name] == tensor).all(), name


def test_a_run_goes_on_with_its_own_strategy_steps_and_memory(
    settings: Make, smoke_run: Path
) -> None:
    found = extend(settings(strategy=None))
    record = RunRecord.read(found)
    assert record.strategy == "universal"
    assert [s.name for s in record.course.steps] == ["organs", "liver tumor", "spleen_cyst"]
    old = checkpoint.load(checkpoint_path(smoke_run, RunRecord.read(smoke_run), 2))
    new = checkpoint.load(found / "step2.pt")
    assert checkpoint.state_digest(old) == checkpoint.state_digest(new)
    assert {r.part for r in read_agreement(found)} == {"train", "test"}


def test_a_version_that_cannot_be_repeated_teaches_no_further_step(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is served as before; only what an older version taught with can go on."""
    monkeypatch.setattr(Universal, "version", 2, raising=False)
    monkeypatch.setattr(Universal, "serves_from", 1, raising=False)
    with pytest.raises(StoreError, match="universal teaches otherwise today") as refused:
        learned_by_run(smoke_run)
    assert "version 1" in str(refused.value)
    assert learned_by_run(smoke_run, strategy="frozen").strategy_name == "frozen"
    monkeypatch.setattr(Universal, "earlier_defaults", {1: {}}, raising=False)
    assert learned_by_run(smoke_run).overrides == ()


def test_options_of_the_run_hold_for_the_new_step_too(smoke_run: Path, tmp_path: Path) -> None:
    """Also where a file of `clbench tune` set them, and beside options of the command line."""
    run = tmp_path / smoke_run.name
    shutil.copytree(smoke_run, run)
    record = json.loads((run / "run.json").read_text())
    record["with_defaults"]["strategy"]["pseudo"] = "soft"
    (run / "run.json").write_text(json.dumps(record))
    learned = learned_by_run(run)
    assert (learned.strategy.pseudo, learned.overrides) == ("soft", ("strategy.pseudo=soft",))
    changed = learned_by_run(run, overrides=("strategy.postprocess=false",))
    assert (changed.strategy.pseudo, changed.strategy.postprocess) == ("soft", False)


def test_without_earlier_checkpoints_the_steps_become_one(smoke_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, alone)
    (alone / "step1.pt").unlink()
    learned = learned_by_run(alone)
    whole = learned_by_run(smoke_run)
    assert ([len(s.learns) for s in learned.steps], len(whole.steps)) == ([14], 2)
    assert learned.states[-1]["model"].keys() == whole.states[-1]["model"].keys()
    assert learned.states[-1]["memory"] == whole.states[-1]["memory"]
    with pytest.raises(StoreError, match="no checkpoint of step 1"):
        learned_by_run(alone, step=1)


def test_the_same_call_again_trains_nothing(frozen: Path, settings: Make) -> None:
    events: list[str] = []
    before = (frozen / "run.json").read_bytes()
    again = extend(settings(), lambda event: events.append(event["event"]))
    assert again == frozen
    assert "already finished" in events
    assert "update" not in events
    assert (frozen / "run.json").read_bytes() == before


def test_stopped_while_models_are_compared_the_same_call_goes_on(
    frozen: Path, settings: Make
) -> None:
    """The run is finished by then, so nothing is taught, and the comparison is made anew."""
    before = (frozen / FILE).read_bytes()
    (frozen / FILE).unlink()
    events: list[str] = []
    assert extend(settings(), lambda event: events.append(event["event"])) == frozen
    assert "update" not in events
    assert (frozen / FILE).read_bytes() == before
    assert "checkpoint of step 1" in verify_run(frozen).checked


def test_no_space_left_loses_nothing(
    settings: Make, smoke_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashes = {p: store_files.sha256(p) for p in smoke_run.rglob("*") if p.is_file()}
    asked = settings(out=tmp_path)
    whole = checkpoint.files.atomic_write

    def full(path: Path, write, **more) -> None:
        if path.name == "step2.pt":

            def fails(file) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            write = fails
        whole(path, write, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.files, "atomic_write", full)
        with pytest.raises(StoreError, match="disk space"):
            extend(asked)
    assert {p: store_files.sha256(p) for p in hashes} == hashes
    assert RunRecord.read(extend(asked)).status == "finished"


def bad(learn: str = "spleen_cyst", **more: object) -> dict[str, object]:
    return {"learn": (learn,), **more}


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        (bad("Spleen", inside=None), SettingError, "has learned spleen already"),
        (bad("kidney_cyst", inside=None), DataError, "does not annotate kidney_cyst"),
        (
            bad(kind="organ", learn="liver_tumor"),
            SettingError,
            "clbench has the structures already",
        ),
        (bad(strategy="joint"), SettingError, "needs images of earlier steps"),
        (bad(strategy="softmax_finetune"), SettingError, "its weights do not fit"),
        (bad(strategy="nobody"), ClbenchError, "nobody"),
        (bad(model=Path("nowhere")), StoreError, "nothing that can be extended"),
        (bad(step=7), SettingError, "does not have this step"),
        (bad(data=Path("nowhere")), DataError, "does not exist"),
        (bad(old_data=Path("nowhere")), DataError, "given with --old-data"),
        (bad(layout="lits"), DataError, "no case of the layout"),
        (bad(patient="(a"), ClbenchError, "no regular expression"),
        (bad(overrides=("backbone.size=32",)), SettingError, "its weights do not fit"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    more: dict[str, object], kind: type[ClbenchError], says: str, settings: Make, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=says):
        extend(settings(**more, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_new_data_is_no_old_data(settings: Make, own: Path, tmp_path: Path) -> None:
    """Cases of one folder on both sides would test on what was learned."""
    with pytest.raises(SettingError, match="named as old data too"):
        extend(settings(old_data=own / ".." / own.name, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("count", "without", "says"),
    [(1, (), "1 of 1"), (3, (0, 1, 2), "0 of 3"), (3, (0, 2), r"1 of 3 \(patient 7002\)")],
)
def test_too_few_cases_with_the_structure(
    count: int,
    without: tuple[int, ...],
    says: str,
    settings: Make,
    tmp_path: Path,
    cache_root: Path,
) -> None:
    data = write_own_cts(tmp_path / "cts", cache_root, count, without=without)
    with pytest.raises(DataError, match="too few cases hold spleen_cyst") as err:
        extend(settings(data=data, out=tmp_path / "out"))
    assert err.match(says)


def test_a_checkpoint_of_another_course_is_refused(
    smoke_run: Path, settings: Make, tmp_path: Path
) -> None:
    home = tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, home)
    content = checkpoint.load(home / "step2.pt")
    del content["schema"]
    checkpoint.save(home / "step2.pt", {**content, "bench": "body_ext"})
    with pytest.raises(StoreError, match="a checkpoint of another course"):
        extend(settings(model=home / "step2.pt", out=tmp_path / "out"))


def test_a_course_with_a_given_step_is_not_taught_without_its_model(
    frozen: Path, own: Path, cache_root: Path, tmp_path: Path
) -> None:
    course = RunRecord.read(frozen).course_file
    with pytest.raises(StoreError, match="learned elsewhere is not there"):
        run_course(
            RunSettings(
                bench=str(course),
                strategy="frozen",
                profile="smoke",
                data=str(own),
                out=tmp_path,
                cache=cache_root,
                overrides=("text.declared=random",),
            )
        )


def test_the_table_counts_scores_and_agreement(frozen: Path) -> None:
    old, new = extension_tables(frozen)
    cells = {row[0]: row for row in old.rows}
    scores = run_folder.read_scores(frozen / "scores.csv")
    spleen = [r.value for r in scores
              if (r.structure, r.scoring, r.metric) == ("spleen", "strict", "dice")]  # fmt: skip
    assert cells["spleen"][1:3] == tuple(f"{v:.3f}" for v in spleen)
    assert cells["spleen"][4] == "1"
    assert cells["aorta"][4] == "0"
    assert new.rows[0][0] == "spleen_cyst"
    assert (frozen / FILE).read_text().splitlines()[0].startswith("case,part,structure")
