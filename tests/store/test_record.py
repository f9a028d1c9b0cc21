"""run.json, typed: nothing is lost on the way, earlier records are brought up to date."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from locations import ROOT

from clbench.errors import StoreError
from clbench.store import run_folder
from clbench.store.record import RunRecord, refuse_mixture

RUNS = run_folder.find_runs(ROOT / "results" / "reference")


def test_every_recorded_run_is_written_back_to_the_byte(
    tmp_path: Path, phantom_2_runs: Path
) -> None:
    earlier = [run for part in phantom_2_runs.iterdir() for run in run_folder.find_runs(part)]
    assert RUNS
    assert len(earlier) > 25
    for run in (*earlier, *RUNS):
        RunRecord.read(run).write(tmp_path)
        assert (tmp_path / "run.json").read_bytes() == (run / "run.json").read_bytes()


def test_a_seal_entered_anew_is_the_same(tmp_path: Path) -> None:
    copied = shutil.copytree(RUNS[0], tmp_path / RUNS[0].name)
    record = RunRecord.read(copied)
    seal, record.files, record.record_sha256 = record.record_sha256, None, None
    assert "files" not in record.to_json()
    record.reseal(copied)
    assert RunRecord.read(copied).record_sha256 is None  # a run without checksums stays so
    record.seal(copied)
    record.reseal(copied)
    assert RunRecord.read(copied).record_sha256 == seal


def test_records_of_earlier_versions_are_brought_up_to_date() -> None:
    today = run_folder.read_record(RUNS[0])
    old = copy.deepcopy(today)
    old["identity"]["splits"] = {s["name"]: s for s in old["identity"]["splits"]}
    old["declares"] = {"past": old.pop("past")}
    for key in ("with_defaults", "warnings", "host", "starts", "metrics", "record_sha256"):
        del old[key]
    old["course"].pop("patient_of")
    before = json.dumps(old)
    record = RunRecord.from_json(old)
    assert json.dumps(old) == before
    assert record.identity.to_json() == today["identity"]
    assert record.past == today["past"]
    assert record.course.to_json() == today["course"]
    assert record.metrics == {}
    assert record.warnings is None
    assert "warnings" not in record.to_json()


def test_an_unknown_key_is_written_back_and_a_missing_one_is_named() -> None:
    content = run_folder.read_record(RUNS[0])
    assert RunRecord.from_json({**content, "later": [1]}).to_json()["later"] == [1]
    del content["identity"]
    with pytest.raises(StoreError, match="not whole") as err:
        RunRecord.from_json(content, "place/run.json")
    assert "no identity" in str(err.value)
    assert "place/run.json" in str(err.value)


def test_the_run_id_of_every_recorded_identity_is_that_of_its_folder(phantom_2_runs: Path) -> None:
    for run in (*run_folder.find_runs(phantom_2_runs / "reference"), *RUNS):
        record = RunRecord.read(run)
        assert record.identity.run_id == record.run_id == run.name


def test_unknown_keys_of_the_parts_are_written_back_and_missing_ones_are_named() -> None:
    content = run_folder.read_record(RUNS[0])
    for part in ("identity", "course"):
        more = {**content, part: {**content[part], "later": 1}}
        assert RunRecord.from_json(more).to_json()[part] == more[part]
    del content["course"]["steps"][0]["source"]
    with pytest.raises(StoreError, match=r"no course\.steps\.source"):
        RunRecord.from_json(content)
    content = run_folder.read_record(RUNS[0])
    del content["identity"]["seed"]
    with pytest.raises(StoreError, match=r"no identity\.seed"):
        RunRecord.from_json(content)


def record(*, patients: bool = False, **identity: Any) -> RunRecord:
    content = run_folder.read_record(RUNS[0])
    content["identity"] = {**content["identity"], "profile": {}, **identity}
    return RunRecord.from_json({**content, "patients": patients})


@pytest.mark.parametrize(
    "key", ["bench", "bench_version", "numerics", "data_fingerprint", "splits", "profile"]
)
def test_mixtures_are_refused(key: str) -> None:
    refuse_mixture([record(), record(seed=1), record(strategy={"class": "T"})])
    with pytest.raises(StoreError, match="one table") as err:
        refuse_mixture([record(), record(**{key: {"other": 1}})])
    assert key in str(err.value.got)


def test_text_encodings_and_weights_are_methods_of_one_table() -> None:
    def profile(encoding: str, weights: str | None, name: str = "unet") -> RunRecord:
        backbone = {"name": name, "weights": weights}
        return record(profile={"text": {"encoding": encoding}, "backbone": backbone})

    refuse_mixture([profile("clip", None), profile("onehot", "ssl.pt")])
    only = record(profile={"backbone": {"weights": "ssl.pt"}})  # the rest as the default is
    refuse_mixture([record(), only])
    with pytest.raises(StoreError, match="one table"):
        refuse_mixture([profile("clip", None), profile("clip", None, "segresnet")])


def test_phantom_and_patients_never_mix() -> None:
    with pytest.raises(StoreError, match="one table") as err:
        refuse_mixture([record(), record(patients=True)])
    assert "phantom and patients" in str(err.value)
