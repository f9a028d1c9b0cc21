"""The forecast of a run: its counts are those of the run itself, its sizes near what a run leaves."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from clbench.cli.grid import _forecast_table, _hours, _smallest
from clbench.cli.options import app
from clbench.data.cache import VolumeCache
from clbench.data.volume import Volume
from clbench.errors import SettingError
from clbench.grid.forecast import (
    CASES,
    EPOCHS,
    Forecast,
    StepForecast,
    _checkpoint_bytes,
    _measured,
    _shortened,
    _Sizes,
    _step,
    _Stored,
    _stored_cases,
    _Watch,
    _with_all,
    forecast,
    smallest_difference,
)
from clbench.run.plan import RunSettings, resolve
from clbench.store import checkpoint, run_folder


@pytest.fixture(scope="module")
def settings(
    smoke_run: Path, cache_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunSettings:
    """Those of the finished run."""
    out = tmp_path_factory.mktemp("one")  # other tests may make runs beside the shared one
    own = out / smoke_run.relative_to(smoke_run.parents[2])
    shutil.copytree(smoke_run, own)
    for name, change in {
        "another": lambda r: r["identity"]["profile"]["train"].update(lr=0.5),
        "unfinished": lambda r: r.update(status="running"),
    }.items():
        record = run_folder.read_record(own)
        change(record)
        (own.parent / name).mkdir()
        run_folder.write_record(own.parent / name, record)
    return RunSettings(
        bench="tumor_ext", strategy="universal", profile="smoke", out=out, cache=cache_root
    )


@pytest.fixture(scope="module")
def order() -> list[str]:
    """What the trial does with its cases, in order."""
    return []


@pytest.fixture(scope="module")
def ahead(
    settings: RunSettings, order: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Forecast:
    write, see = VolumeCache._write, _Watch.see

    def written(cache: VolumeCache, entry: Path, volume: Volume) -> None:
        order.append("made")
        write(cache, entry, volume)

    def seen(watch: _Watch, event: Mapping[str, Any]) -> None:
        order.append(event["event"])
        see(watch, event)

    home = tmp_path_factory.mktemp("trial")
    before = sorted(settings.out.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(home))
        patch.setattr(VolumeCache, "_write", written)
        patch.setattr(_Watch, "see", seen)
        found = forecast(resolve(settings))
    assert not list(home.iterdir())  # the trial leaves nothing behind
    assert sorted(settings.out.rglob("*")) == before
    return found


def test_updates_and_cases_are_those_of_the_run(ahead: Forecast, smoke_run: Path) -> None:
    events = [json.loads(line) for line in (smoke_run / "events.jsonl").read_text().splitlines()]
    made = Counter(e["step"] for e in events if e["event"] == "update")
    assert {k: s.updates for k, s in enumerate(ahead.steps, 1)} == made
    record = json.loads((smoke_run / "run.json").read_text())
    assert [s.cases for s in ahead.steps] == [len(c) for c in record["course"]["train"]]
    tests = len({case for cases in record["course"]["test"] for case in cases})
    assert {s.tests for s in ahead.steps} == {tests}


def test_sizes_are_near_what_the_run_left(ahead: Forecast, smoke_run: Path) -> None:
    left = sum(p.stat().st_size for p in smoke_run.rglob("*") if p.suffix in (".pt", ".npz"))
    assert ahead.run_bytes == pytest.approx(left, rel=0.1)
    assert ahead.running_bytes > ahead.run_bytes
    assert ahead.cache_bytes > 0
    assert ahead.peak_bytes > 1e8


def test_a_case_is_made_in_the_time_before_the_event_that_it_is_opened(
    ahead: Forecast, order: list[str]
) -> None:
    """Made before the first such event, all of them would seem to take no time."""
    of_cases = [what for what in order if what in ("made", "opened")]
    assert of_cases[: 2 * CASES] == ["made", "opened"] * CASES


def test_every_part_of_the_time_was_measured(ahead: Forecast) -> None:
    first, second = (step.seconds for step in ahead.steps)
    assert first["pseudo labels"] == 0
    assert second["pseudo labels"] > 0
    for seconds in (first, second):
        assert seconds["train"] > 0
        assert seconds["examine"] > 0
    assert ahead.total_s == pytest.approx(sum(sum(s.seconds.values()) for s in ahead.steps))


def test_a_record_that_cannot_be_read_stops_no_forecast(
    settings: RunSettings, smoke_run: Path, tmp_path: Path
) -> None:
    home = tmp_path / smoke_run.relative_to(smoke_run.parents[2]).parent
    shutil.copytree(smoke_run, home / "whole")
    (home / "damaged").mkdir()
    (home / "damaged" / "run.json").write_text("{")
    plan = resolve(replace(settings, out=tmp_path))
    assert len(_measured(plan)) == 1


def test_finished_runs_of_these_settings_say_how_wrong_it_is(
    ahead: Forecast, settings: RunSettings, tmp_path: Path
) -> None:
    assert len(ahead.measured_s) == 1
    assert ahead.error == pytest.approx(ahead.total_s / ahead.measured_s[0] - 1)
    assert math.isnan(replace(ahead, measured_s=()).error)


def test_the_length_of_the_trial_is_its_own(settings: RunSettings, tmp_path: Path) -> None:
    words = ("train.epochs=30", "train.iterations=7", "phantom.test=1", "phantom.train=4")
    asked = replace(settings, overrides=words, out=tmp_path)
    trial = _shortened(resolve(asked), tmp_path)
    names = [word.partition("=")[0] for word in trial.overrides]
    assert len(names) == len(set(names))
    assert resolve(trial).profile.train.epochs == EPOCHS


def test_the_trial_shows_every_structure_that_a_step_teaches() -> None:
    """The first cases may lack one, and a label without it is refused."""
    held = {
        "a": {"liver"},
        "b": {"liver"},
        "c": {"liver"},
        "d": {"liver", "liver_tumor"},
        "e": {"x"},
    }
    catalog: Any = SimpleNamespace(
        benchmark=SimpleNamespace(reads=lambda name: SimpleNamespace(name=name)),
        files={"lits": {case: case for case in held}},
        cache=SimpleNamespace(holds=lambda files, source: frozenset(held[files])),
    )
    step: Any = SimpleNamespace(source="lits", learns=("liver", "liver_tumor"))
    assert _with_all(step, tuple("abcde"), catalog) == ("a", "b", "d")
    assert _with_all(step, tuple("abc"), catalog) == ("a", "b")  # the run itself would refuse it


def test_validations_and_traces_are_of_the_whole_course(settings: RunSettings) -> None:
    """A trial has two epochs of few updates: it validates less often, and traces hardly ever."""
    words = ("train.epochs=40", "train.iterations=5", "phantom.validation=3")
    asked = replace(settings, strategy="decoder_growth", overrides=words)
    plan, trial = resolve(asked), resolve(_shortened(resolve(asked), settings.out))
    watch = _Watch()
    seen = watch.of_step(2)
    seen.phases, seen.lengths = {"train": [9.0, 9.0, *[1.0] * 6]}, {"train": (8, 4)}
    seen.validations = {"train": (10, [5.0, 2.0])}
    seen.stages = {"examine": [7.0, 4.0]}
    found = _step(plan, trial, 2, watch, 12, (_Stored(), _Stored()))
    assert (found.updates, found.seconds["train"]) == (200, 200.0)
    assert found.seconds["validate"] == 10 * 2.0 * 3  # the trial has one validation case
    traced = resolve(replace(asked, overrides=(*words, "examine.trace_every=50")))
    looks = 1 + 4 + 1  # before the first update, after every 50, and at the end
    more = _step(traced, trial, 2, watch, 12, (_Stored(), _Stored())).seconds["validate"]
    assert more == found.seconds["validate"] + looks * 6 * 4.0  # three cases of each step
    seen.validations = {"train": (80, [5.0, 2.0])}  # of more epochs than the phase has
    longer = _step(plan, trial, 2, watch, 12, (_Stored(), _Stored()))
    assert longer.seconds["validate"] == 40 * 2.0 * 3


def test_stored_cases_are_those_that_the_strategy_stores(settings: RunSettings) -> None:
    words = ("strategy.mem_size=5", "phantom.train=8")
    asked = replace(settings, strategy="der", overrides=words)
    plan, trial = resolve(asked), resolve(_shortened(resolve(asked), settings.out))
    whole, tried = _stored_cases(plan), _stored_cases(trial)
    assert whole == {1: _Stored(), 2: _Stored(prepared=5, held=5)}
    assert tried[2] == _Stored(prepared=CASES, held=CASES)
    watch = _Watch()
    seen = watch.of_step(2)
    seen.stages, seen.counts = {"pseudo labels": [3.0, 2.0]}, {"pseudo labels": CASES}
    found = _step(plan, trial, 2, watch, 12, (whole[2], tried[2]))
    assert found.seconds["pseudo labels"] == 5 * 2.0  # not as many as there are training cases


def test_a_checkpoint_with_more_stored_cases_is_larger(tmp_path: Path) -> None:
    paths = []
    for cases in (1, 4):
        logits = {
            f"logits/1/{k}": torch.zeros(20, 30, 30, dtype=torch.float16) for k in range(cases)
        }
        content = {"model": {"w": torch.zeros(50_000)}, "memory": {**logits, "stored": [1]}}
        paths.append(tmp_path / f"{cases}.pt")
        checkpoint.save(paths[-1], content)
    assert _checkpoint_bytes(paths[0], 4.0) == pytest.approx(paths[1].stat().st_size, rel=0.02)
    assert _checkpoint_bytes(paths[0], 1.0) == paths[0].stat().st_size


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "1"])
def test_a_level_that_is_none_is_refused_before_the_trial(
    alpha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.grid.forecast.forecast", lambda settings: pytest.fail("a trial"))
    words = ["plan", "--bench", "tumor_ext", "--strategy", "universal", "--alpha", alpha]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert isinstance(done.exception, SettingError), done.exception
    assert done.exception.where == "--alpha"


def test_the_smallest_difference_has_the_power_it_says() -> None:
    for n, m in ((8, 1), (16, 13), (32, 3)):
        size = smallest_difference(n, comparisons=m)
        limit = stats.t.isf(0.05 / m / 2, n - 1)
        power = stats.nct.sf(limit, n - 1, size * math.sqrt(n))
        assert power == pytest.approx(0.8, abs=0.03)  # the shifted t stands for the noncentral one


def test_the_command_says_how_sure_it_is_and_makes_no_folder(
    settings: RunSettings, ahead: Forecast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.grid.forecast.forecast", lambda settings: ahead)
    words = ["plan", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--seeds", "0-2"])
    assert done.exit_code == 0, done.output
    assert "3 seeds one after the other" in done.output
    assert "the forecast is" in done.output
    assert "4 test patients can show nothing at alpha 0.05: at least 6 are needed" in done.output
    assert not (tmp_path / "out").exists()


def test_measured_seconds_are_all_of_a_run_of_any_seed(
    ahead: Forecast, settings: RunSettings, smoke_run: Path
) -> None:
    record = json.loads((smoke_run / "run.json").read_text())
    parts = [
        (c["train"]["train_s"], c["train"]["prepare_s"], c["examine_s"])
        for c in record["cost"].values()
    ]
    assert min(min(p[0], p[2]) for p in parts) > 0
    assert list(ahead.measured_s) == [pytest.approx(sum(map(sum, parts)))]
    both = list(zip(ahead.measured_s, ahead.measured_bytes, strict=True))
    assert _measured(resolve(replace(settings, seed=5))) == both
    of_step = [{**cost, **cost["train"]} for cost in record["cost"].values()]
    peaks = [
        cost[name] for cost in of_step for name in ("peak_rss_bytes", "examine_peak_rss_bytes")
    ]
    assert ahead.measured_bytes == (max(peaks),)
    assert ahead.memory_error == pytest.approx(ahead.peak_bytes / max(peaks) - 1)
    assert math.isnan(replace(ahead, measured_bytes=()).memory_error)


def test_disk_is_of_all_cases_and_all_steps(
    settings: RunSettings, smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _Sizes(volume=10.0, prediction=3.0, checkpoints=(100.0, 200.0))
    monkeypatch.setattr("clbench.grid.forecast._sizes", lambda *given: sizes)
    found = forecast(resolve(settings))
    splits = resolve(settings).catalog.splits
    tests = {case for split in splits for case in split.test}
    assert found.cache_bytes == 10.0 * sum(len(split.cases) for split in splits)
    assert found.run_bytes == 300.0 + 3.0 * found.steps[0].tests * 2
    assert found.steps[0].tests >= len(tests)
    record = json.loads((smoke_run / "run.json").read_text())
    trained = max(c["train"]["trainable_parameters"] for c in record["cost"].values())
    assert found.running_bytes == found.run_bytes + 200.0 + 8 * trained


def test_cases_are_those_of_the_whole_course(settings: RunSettings) -> None:
    asked = replace(settings, overrides=("phantom.train=8",))
    plan, trial = resolve(asked), resolve(_shortened(resolve(asked), settings.out))
    watch = _Watch()
    watch.of_step(0).stages = {"prepare": [9.0, 1.0]}
    seen = watch.of_step(2)
    seen.stages = {"prepare": [5.0, 2.0], "pseudo labels": [8.0, 3.0], "examine": [7.0, 4.0]}
    seen.counts = {"prepare": 4, "pseudo labels": 2, "examine": 2}
    seconds = _step(plan, trial, 2, watch, 12, (_Stored(), _Stored())).seconds
    assert seconds["prepare"] == 4 * (8 / CASES) * (2.0 + 1.0)
    assert seconds["pseudo labels"] == 2 * (8 / CASES) * 3.0
    assert seconds["examine"] == 12 * 4.0


def test_a_step_from_scratch_is_not_traced_before_it(settings: RunSettings) -> None:
    words = ("train.epochs=40", "train.iterations=5", "examine.trace_every=50")
    looks = {}
    for name in ("finetune", "joint"):
        asked = replace(settings, strategy=name, overrides=words)
        plan, trial = resolve(asked), resolve(_shortened(resolve(asked), settings.out))
        watch = _Watch()
        seen = watch.of_step(2)
        seen.phases, seen.lengths = {"train": [1.0] * 8}, {"train": (8, 4)}
        seen.stages = {"examine": [4.0, 4.0]}
        seconds = _step(plan, trial, 2, watch, 12, (_Stored(), _Stored())).seconds["validate"]
        looks[plan.strategy.declaration.starts_from == "scratch"] = seconds
    assert looks[True] * 6 == looks[False] * 5  # 200 updates: five looks, and one before the first


def test_the_table_of_a_forecast() -> None:
    step = StepForecast(updates=1234, cases=4, tests=6, seconds={"train": 3600.0})
    ahead = Forecast(
        steps=(step, step), peak_bytes=10**9, host_bytes=10**9, device="cpu", cache_bytes=5e9,
        run_bytes=1e9, running_bytes=2e9, trial_s=1.0,
    )  # fmt: skip
    table = _forecast_table(ahead, "tumor_ext", "universal", 3)
    assert table.rows[0] == ("step 1", "4", "1,234", "6", "60.0 min", "60.0 min")
    assert table.notes[0] == "one run: 2.0 h, 3 seeds one after the other 6.0 h; on cpu"
    assert "1.00 GB per finished run, 2.00 GB while it runs" in table.notes[2]
    assert table.notes[1] == "memory: 1.00 GB at the trial's highest"
    on_gpu = replace(ahead, device="cuda", host_bytes=3 * 10**9)
    (_, memory, *_) = _forecast_table(on_gpu, "tumor_ext", "universal", 1).notes
    assert memory.startswith("memory: 1.00 GB of the GPU and 3.00 GB of the machine")
    assert [_hours(s) for s in (59, 60, 7200, 172_800)] == ["59 s", "1.0 min", "2.0 h", "2.0 d"]


def test_the_smallest_difference_is_of_the_family_and_the_level() -> None:
    assert "0.75 times the spread of 16" in _smallest(16, 0.05, 1)[0]
    assert "13 comparisons): 1.07 times the spread of 16" in _smallest(16, 0.05, 13)[0]
