"""A published model reads back to equal bits and equal masks, and nothing foreign is read."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.deployment.inputs import find_inputs
from clbench.deployment.predict import output_form, predict_cases
from clbench.deployment.publish import export as export_module
from clbench.deployment.publish.export import export_run, import_run
from clbench.deployment.publish.tensors import read_tensors
from clbench.deployment.trained import checkpoint_path, load_trained
from clbench.errors import ClbenchError, SettingError, SpecError, StoreError
from clbench.report.tables.render import render
from clbench.report.tables.summary import run_report
from clbench.run.record import catalog_of
from clbench.run.verify import verify_run
from clbench.store import checkpoint
from clbench.store.record import RunRecord


@pytest.fixture(scope="module")
def exported(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    names = export_run(smoke_run, folder)
    assert names == [
        "README.md",
        "cost.csv",
        "metadata.json",
        "run.json",
        "scores.csv",
        "step2.safetensors",
        "vectors.safetensors",
    ]
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_a_model_reads_back_to_equal_bits(
    smoke_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled or executed")

    with monkeypatch.context() as patch:
        for owner, name in (
            (torch, "load"),
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "Unpickler"),
            (builtins, "eval"),
        ):
            patch.setattr(owner, name, refuse)
        run = import_run(exported, tmp_path / "results")
    assert run == tmp_path / "results" / smoke_run.relative_to(smoke_run.parents[2])
    before = checkpoint.load(smoke_run / "step2.pt")
    after = checkpoint.load(run / "step2.pt")
    assert checkpoint.checksum(after) == checkpoint.checksum(before)
    assert load_trained(run).digest == load_trained(smoke_run).digest


def test_the_imported_run_predicts_reports_and_verifies(
    smoke_run: Path, exported: Path, tmp_path: Path
) -> None:
    run = import_run(exported, tmp_path / "results")
    image = catalog_of(RunRecord.read(smoke_run)).files["lits"]["20"].image
    outputs = {}
    for folder in (smoke_run, run):
        out = tmp_path / f"out{len(outputs)}"
        trained = load_trained(folder)
        cases = find_inputs(image, out=out)
        predict_cases(trained, cases, out=out, form=output_form("auto", trained.structures))
        outputs[folder] = {
            p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.nii.gz")
        }
    assert len(outputs[run]) == 14
    assert outputs[run] == outputs[smoke_run]
    tables = [[render(t, "md") for t in run_report(f, scoring="strict")] for f in (smoke_run, run)]
    assert tables[0] == tables[1]
    lines = verify_run(run).lines()
    assert "checkpoint of step 2" in "\n".join(lines[1:5])
    again = tmp_path / "again"
    export_run(run, again)
    assert (again / "step2.safetensors").read_bytes() == (
        exported / "step2.safetensors"
    ).read_bytes()


def test_an_earlier_step_can_be_published(smoke_run: Path, tmp_path: Path) -> None:
    export_run(smoke_run, tmp_path / "model", step=1)
    run = import_run(tmp_path / "model", tmp_path / "results")
    assert load_trained(run, step=1).digest == load_trained(smoke_run, step=1).digest
    assert "checkpoint of step 1" in verify_run(run).checked
    with pytest.raises(StoreError, match="no checkpoint of step 2"):
        load_trained(run)
    with pytest.raises(SettingError, match="does not have this step"):
        export_run(smoke_run, tmp_path / "other", step=3)
    assert not (tmp_path / "other").exists()


def test_the_card_of_an_extended_model_names_no_folder(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, run)
    record = RunRecord.read(run)
    record.extends = {"weights": "/home/alice/hospital_x/model.pt", "sha256": "ab"}
    record.reseal(run)
    record.write(run)
    export_run(run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "weights model.pt" in card
    assert "alice" not in card


def test_a_course_of_ones_own_and_its_memory_come_along(tmp_path: Path, cache_root: Path) -> None:
    """A course named by its file, with a strategy that remembers thresholds."""
    from clbench.run.course import run_course
    from clbench.run.plan import RunSettings
    from clbench.spec.registry import benchmark_path

    course = tmp_path / "mine" / "my_course.toml"
    course.parent.mkdir()
    text = benchmark_path("tumor_ext").read_text().replace('name = "tumor_ext"', 'name = "mine"')
    course.write_text(text)
    for split in benchmark_path("tumor_ext").parent.glob("splits"):
        shutil.copytree(split, course.parent / "splits")
    run = run_course(
        RunSettings(
            bench=str(course),
            strategy="plop",
            profile="smoke",
            out=tmp_path / "out",
            cache=cache_root,
        )
    )
    export_run(run, tmp_path / "model")
    shutil.rmtree(course.parent)
    published = (tmp_path / "model" / "run.json").read_text()
    assert str(tmp_path) not in published
    assert str(cache_root) not in published
    imported = import_run(tmp_path / "model", tmp_path / "results")
    before, after = (checkpoint.load(f / "step2.pt") for f in (run, imported))
    assert before["memory"]
    assert checkpoint.checksum(before) == checkpoint.checksum(after)
    assert load_trained(imported).structures == tuple(before["structures"])


# ------------------------------------------------------------------------------- refused by export


def test_runs_that_cannot_be_published_are_named(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tumor_ext" / "universal" / "run"
    shutil.copytree(smoke_run, run)
    raw = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**raw, "status": "unfinished", "steps_done": 1}))
    with pytest.raises(StoreError, match="not finished") as err:
        export_run(run, tmp_path / "to")
    assert "1 of 2" in str(err.value)
    (run / "run.json").write_text(json.dumps({**raw, "seed": 1}))
    with pytest.raises(StoreError, match="record was changed"):
        export_run(run, tmp_path / "to")
    (run / "run.json").write_text(json.dumps(raw))
    scores = (run / "scores.csv").read_bytes()
    (run / "scores.csv").write_bytes(scores.replace(b"strict", b"Strict", 1))
    with pytest.raises(StoreError, match="changed after the run was finished"):
        export_run(run, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_folder_that_holds_files_stays_as_it_is(smoke_run: Path, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        export_run(smoke_run, tmp_path / "to")
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["mine.txt"]
    with pytest.raises(StoreError, match="no part of a run's folder"):
        export_run(smoke_run, smoke_run / "model")
    assert not (smoke_run / "model").exists()


def test_a_full_disk_leaves_nothing(
    smoke_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_tensors", full)
        with pytest.raises(StoreError, match="could not be written") as err:
            export_run(smoke_run, tmp_path / "a" / "model")
        assert "No space left" in str(err.value)
        patch.setattr(export_module.checkpoint, "save", full)
        with pytest.raises(StoreError, match="could not be written"):
            import_run(exported, tmp_path / "a" / "results")
    assert [p for p in (tmp_path / "a").rglob("*") if p.is_file()] == []
    assert import_run(exported, tmp_path / "a" / "results").is_dir()


# ------------------------------------------------------------------------------- refused by import


@pytest.mark.parametrize("name", ["model.pt", "x.pkl", "course/run.py", "model.PT", "notes", ".x"])
def test_a_foreign_file_is_refused_by_name(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(StoreError, match="no part of an exported model") as err:
        import_run(copy, tmp_path / "results")
    assert Path(name).name in str(err.value)
    assert not (tmp_path / "results").exists()


def test_links_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "LICENSE.md").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="no part of an exported model"):
        import_run(copy, tmp_path / "results")


def test_what_a_hub_adds_and_people_edit_is_no_obstacle(copy: Path, tmp_path: Path) -> None:
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".git" / "hooks").mkdir(parents=True)
    (copy / ".git" / "hooks" / "post.py").write_text("raise SystemExit")
    (copy / "LICENSE.md").write_text("CC BY 4.0")
    (copy / "README.md").write_text("edited")
    run = import_run(copy, tmp_path / "results")
    assert {p.name for p in run.iterdir()} == {
        "cost.csv",
        "run.json",
        "scores.csv",
        "step2.pt",
        "vectors.safetensors",
    }


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record and seal it again, as one who means harm would."""
    from clbench.store import checksums, run_folder

    raw = json.loads((folder / "run.json").read_text())
    change(raw)
    checksums.seal(folder, raw)
    run_folder.write_record(folder, raw)


def test_tampering_is_found(copy: Path, tmp_path: Path) -> None:
    weights, record = copy / "step2.safetensors", copy / "run.json"
    before = {p: p.read_bytes() for p in (weights, record, copy / "scores.csv")}

    def refused(match: str) -> None:
        with pytest.raises(ClbenchError, match=match):
            import_run(copy, tmp_path / "results")
        assert not (tmp_path / "results").exists()
        for path, content in before.items():
            path.write_bytes(content)

    altered = bytearray(before[weights])
    altered[-1] ^= 1
    weights.write_bytes(altered)
    refused("changed after it was finished")
    weights.write_bytes(altered)
    resealed(copy, lambda raw: None)
    refused("altered")
    (copy / "scores.csv").write_bytes(before[copy / "scores.csv"][:-2])
    refused("changed after it was finished")
    (copy / "more.csv").write_text("a,b\n")
    refused("no part of the model")
    (copy / "more.csv").unlink()
    resealed(copy, lambda raw: raw.update(run_id="0" * 12))
    refused("run id does not belong")
    resealed(copy, lambda raw: raw.pop("settings"))
    refused("no exported model")
    resealed(copy, lambda raw: raw["settings"].update(bench="no_such_course"))
    refused("no benchmark called")
    record.write_text(json.dumps({**json.loads(before[record]), "seed": 3}))
    refused("record was changed")
    weights.rename(copy / "step1.safetensors")
    resealed(copy, lambda raw: None)
    with pytest.raises(StoreError, match="another course or step"):
        import_run(copy, tmp_path / "results")
    (copy / "step1.safetensors").unlink()
    resealed(copy, lambda raw: None)
    with pytest.raises(StoreError, match="no exported model"):
        import_run(copy, tmp_path / "results")


@pytest.mark.parametrize("field", ["strategy", "run_id"])
def test_a_record_leads_out_of_no_folder(copy: Path, tmp_path: Path, field: str) -> None:
    resealed(copy, lambda raw: raw.update({field: "../../elsewhere"}))
    with pytest.raises(SpecError, match="letters, digits"):
        import_run(copy, tmp_path / "results")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_run_that_is_there_stays(smoke_run: Path, exported: Path, tmp_path: Path) -> None:
    run = import_run(exported, tmp_path / "results")
    (run / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match="there already"):
        import_run(exported, tmp_path / "results")
    assert (run / "note.txt").exists()
    with pytest.raises(StoreError, match="no exported model"):
        import_run(tmp_path / "nowhere", tmp_path / "results")
    with pytest.raises(StoreError, match="no part of an exported model"):
        import_run(smoke_run, tmp_path / "results")


def test_all_of_the_checkpoint_is_exported(smoke_run: Path, exported: Path) -> None:
    record = RunRecord.read(smoke_run)
    kept = read_tensors(exported / "step2.safetensors")
    assert set(kept) == set(checkpoint.load(checkpoint_path(smoke_run, record, 2)))
