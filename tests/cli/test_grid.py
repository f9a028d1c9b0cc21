"""`clbench grid` and `clbench status` on finished runs; planning starts nothing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import SettingError
from clbench.grid import local, ray_cluster
from clbench.grid.jobs import Job
from clbench.signals import STATUS
from clbench.store import files
from clbench.store.files import sha256

RUNNER = CliRunner()


def study(tmp_path: Path, out: Path, seeds: str = "[0]") -> Path:
    path = tmp_path / "study.toml"
    path.write_text(
        'courses = ["tumor_ext"]\nstrategies = ["universal"]\nprofiles = ["smoke"]\n'
        f'seeds = {seeds}\nout = "{out}"\n',
        encoding="utf-8",
    )
    return path


def test_finished_runs_are_found_and_not_made_again(
    smoke_run: Path, smoke_out: Path, cache_root: Path, tmp_path: Path
) -> None:
    before = {p: sha256(p) for p in smoke_run.rglob("*") if p.is_file()}
    words = [str(study(tmp_path, smoke_out)), "--cache", str(cache_root)]
    result = RUNNER.invoke(app, ["grid", *words])
    assert result.exit_code == 0, result.output
    assert "1 runs: 1 finished" in result.output
    assert "to make" not in result.output
    assert before == {p: sha256(p) for p in smoke_run.rglob("*") if p.is_file()}


def test_status_and_a_dry_run_show_what_is_left_and_start_nothing(
    smoke_run: Path, smoke_out: Path, cache_root: Path, tmp_path: Path
) -> None:
    words = [str(study(tmp_path, smoke_out, "[0, 41]")), "--cache", str(cache_root)]
    before = sorted(smoke_run.parent.iterdir())
    for command in (["status", *words], ["grid", *words, "--dry-run"]):
        result = RUNNER.invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "2 runs: 1 finished, 1 to do" in result.output
        assert "steps: 2 of 4 taught" in result.output
        assert "work left, one run after the other: about 0:" in result.output
    assert sorted(smoke_run.parent.iterdir()) == before


def test_status_looks_again_until_all_runs_are_finished(
    smoke_run: Path, smoke_out: Path, cache_root: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run that is missing is there when the status has been looked at for the third time."""
    slept: list[float] = []
    record = smoke_run / "run.json"
    whole = record.read_text(encoding="utf-8")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (tmp_path / "copy" / smoke_run.relative_to(smoke_out) / "run.json").write_text(whole)

    shutil.copytree(smoke_out, tmp_path / "copy")
    unfinished = json.loads(whole) | {"status": "running"}
    copied = tmp_path / "copy" / smoke_run.relative_to(smoke_out) / "run.json"
    copied.write_text(json.dumps(unfinished))
    monkeypatch.setattr(time, "sleep", sleep)
    words = [str(study(tmp_path, tmp_path / "copy", "[0]")), "--cache", str(cache_root)]
    result = RUNNER.invoke(app, ["status", *words, "--every", "7"])
    assert result.exit_code == 0, result.output
    assert slept == [7.0, 7.0]
    assert result.output.count("runs: ") == 3  # a file gets every look
    assert "1 runs: 1 finished" in result.output


def test_seeds_of_a_plan_are_read_before_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(plan: object) -> None:
        raise AssertionError("a trial was made")

    monkeypatch.setattr("clbench.grid.forecast.forecast", tried)
    words = ["plan", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke"]
    done = CliRunner().invoke(app, [*words, "--seeds", "x"])
    assert isinstance(done.exception, SettingError)


def test_what_was_set_stands_in_the_table(tmp_path: Path, cache_root: Path) -> None:
    words = ["--bench", "tumor_ext", "--strategy", "finetune", "--profile", "smoke"]
    words += ["--set", "train.prior=0.02", "--out", str(tmp_path), "--cache", str(cache_root)]
    result = RUNNER.invoke(app, ["grid", *words, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "train.prior=0.02" in result.output
    assert "default" not in result.output


def test_a_study_whose_settings_ask_different_questions_says_so(
    tmp_path: Path, cache_root: Path
) -> None:
    path = study(tmp_path, tmp_path / "out")
    words = ["grid", str(path), "--cache", str(cache_root), "--dry-run"]
    assert "note: no table" not in RUNNER.invoke(app, words).output
    plain = path.read_text(encoding="utf-8")
    alike = plain + '[settings]\na = []\nb = ["text.encoding=onehot"]\n'
    path.write_text(alike, encoding="utf-8")
    said = RUNNER.invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "note: no table" not in said.output  # these two are rows of one table
    path.write_text(plain + '[settings]\na = []\nb = ["train.lr=0.01"]\n', encoding="utf-8")
    said = RUNNER.invoke(app, words)
    assert "note: no table holds all runs of tumor_ext" in said.output
    assert f"`out` is not {tmp_path / 'out'}" in said.output


def test_options_beside_a_file_replace_its_lists(
    smoke_run: Path, smoke_out: Path, cache_root: Path, tmp_path: Path
) -> None:
    path = study(tmp_path, tmp_path / "elsewhere", "[40, 41]")
    words = [str(path), "--cache", str(cache_root), "--dry-run"]
    part = RUNNER.invoke(app, ["grid", *words, "--seeds", "0", "--out", str(smoke_out)])
    assert "1 runs: 1 finished" in part.output
    more = RUNNER.invoke(app, ["grid", *words, "--strategy", "lwf", "--strategy", "mib"])
    assert "4 runs: 4 to do" in more.output
    for option, value in (("--set", "train.lr=1"), ("--data", "/d"), ("--split", "btcv=x.toml")):
        refused = RUNNER.invoke(app, ["grid", *words, option, value])
        assert f"{option} beside a study file" in str(refused.exception)
        assert str(path) in str(refused.exception)
        assert not (tmp_path / "elsewhere").exists()


def test_a_course_of_which_a_file_with_data_says_nothing_is_refused(tmp_path: Path) -> None:
    path = study(tmp_path, tmp_path / "out")
    path.write_text(path.read_text() + '[data]\ntumor_ext = "/data"\n', encoding="utf-8")
    done = RUNNER.invoke(app, ["grid", str(path), "--bench", "body_ext"])
    assert "add the course to the file" in str(done.exception)


def test_a_study_is_a_file_or_options() -> None:
    neither = RUNNER.invoke(app, ["grid"])
    assert "a study is a file, or --bench and --strategy" in str(neither.exception)
    assert "got:       neither" in str(neither.exception)
    lacking = RUNNER.invoke(app, ["grid", "--bench", "tumor_ext"])
    assert "got:       --bench" in str(lacking.exception)
    unknown = RUNNER.invoke(app, ["grid", "--bench", "tumor_ext", "--strategy", "universel"])
    assert "universal" in str(unknown.exception)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Words that runs would get; none is made."""
    words: list[list[str]] = []

    def take(jobs: list[Job], *_: Any, more: list[str], **__: Any) -> list[Job]:
        words.append(list(more))
        return []

    for place in (local, ray_cluster):
        monkeypatch.setattr(place, "work_off", take)
    return words


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("train.compile=true", "train.accumulate=2"), "cannot be taught by accumulated batches"),
        (("train.amp=fp16",), "float16 needs a GPU"),
    ],
)
def test_what_every_run_would_refuse_is_refused_before_one_starts(
    settings: tuple[str, ...], says: str, tmp_path: Path, cache_root: Path
) -> None:
    words = ["--bench", "tumor_ext", "--strategy", "finetune", "--profile", "smoke"]
    words += ["--out", str(tmp_path), "--cache", str(cache_root)]
    words += [word for one in settings for word in ("--set", one)]
    refused = RUNNER.invoke(app, ["grid", *words, "--device", "cpu", "--dry-run"])
    assert says in str(refused.exception)
    assert RUNNER.invoke(app, ["status", *words]).exit_code == 0  # which starts none
    on_gpu = RUNNER.invoke(app, ["grid", *words, "--on", "slurm", "--gpus", "1", "--dry-run"])
    assert (on_gpu.exit_code == 0) == ("float16" in says)
    on_cpu = RUNNER.invoke(app, ["grid", *words, "--on", "slurm", "--dry-run"])
    assert says in str(on_cpu.exception)


@pytest.mark.usefixtures("smoke_run")
def test_options_of_a_run_reach_the_runs_of_a_grid(
    smoke_out: Path, cache_root: Path, tmp_path: Path, handed: list[list[str]]
) -> None:
    typed = ["--workers", "0", "--keep-predictions", "none", "--checkpoint-every", "2.5"]
    typed += ["--deterministic", "--track", "tensorboard", "--track", "mlflow"]
    words = ["grid", str(study(tmp_path, smoke_out)), "--cache", str(cache_root)]
    assert RUNNER.invoke(app, [*words, "--device", "cpu", *typed]).exit_code == 0
    assert RUNNER.invoke(app, [*words, "--device", "cpu"]).exit_code == 0
    assert handed == [["--cache", str(cache_root), *typed], ["--cache", str(cache_root)]]
    refused = RUNNER.invoke(app, [*words, "--track", "tensorbord"])
    assert "there is no tracker called 'tensorbord'" in str(refused.exception)
    refused = RUNNER.invoke(app, [*words, "--keep-predictions", "all"])
    assert "--keep-predictions" in str(refused.exception)


@pytest.mark.usefixtures("smoke_run")
def test_workers_of_ray_keep_volumes_where_this_process_does(
    smoke_out: Path, cache_root: Path, tmp_path: Path, handed: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They have the environment of `ray start`."""
    monkeypatch.setenv("CLBENCH_CACHE", str(cache_root))
    done = RUNNER.invoke(app, ["grid", str(study(tmp_path, smoke_out)), "--on", "ray"])
    assert done.exit_code == 0, done.output
    assert handed == [["--cache", str(cache_root)]]


def test_a_grid_whose_runs_another_process_makes_is_not_done(
    smoke_run: Path, smoke_out: Path, cache_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(smoke_out, tmp_path / "copy")
    folder = tmp_path / "copy" / smoke_run.relative_to(smoke_out)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps(record | {"status": "unfinished"}))
    words = [str(study(tmp_path, tmp_path / "copy")), "--cache", str(cache_root)]
    with files.locked(folder / ".lock"):
        done = RUNNER.invoke(app, ["grid", *words, "--device", "cpu"])
    assert done.exit_code == STATUS, done.output
    assert "left alone, another process makes it: tumor_ext" in done.output
    assert "1 runs are not finished" in done.stderr
    assert "universal" in done.stderr.partition("not finished")[2]
