"""A whole tuning on the phantom: budget, resuming, what trials may open, and the runs that follow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clbench.errors import ClbenchError, DivergedError, SettingError, StoreError, TrainingError
from clbench.report.figures import style
from clbench.run import teach
from clbench.run.course import run_plan
from clbench.run.plan import RunSettings
from clbench.run.record import new_record
from clbench.spec import registry
from clbench.spec.settings import load_profile
from clbench.store.record import RunRecord, refuse_mixture
from clbench.tuning import study as study_module
from clbench.tuning import trial as trial_module
from clbench.tuning.outcome import FILE, write_outcome
from clbench.tuning.study import TunedStrategy, TuneSettings, output_folder, tune
from clbench.tuning.summary import tables
from clbench.tuning.trial import Trial, plan_trial, run_trial
from clbench.tuning.tuned_file import plan_tuned, read_tuned, write_tuned

FEW = ("train.epochs=1", "train.iterations=1")


def settings(out: Path, cache: Path, **changes: Any) -> TuneSettings:
    base = RunSettings(
        bench="tumor_ext", strategy="finetune", seed=1000, profile="smoke", overrides=FEW, out=out,
        cache=cache,
    )  # fmt: skip
    return TuneSettings(
        **{"strategies": ("finetune",), "base": base, "rule": "first_step", "budget": 5, **changes}
    )


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> TuneSettings:
    return settings(tmp_path_factory.mktemp("tuned"), cache_root)


@pytest.fixture(scope="module")
def tuned(asked: TuneSettings) -> TunedStrategy:
    """Two trials of two updates each, for the budget of 5 pays for no third."""
    (one,) = tune(asked)
    return one


@pytest.fixture(scope="module")
def file(asked: TuneSettings, tuned: TunedStrategy) -> Path:
    path = output_folder(asked) / FILE
    write_tuned(path, [tuned], asked)
    return path


def run_settings(asked: TuneSettings, **changes: Any) -> RunSettings:
    return dataclasses.replace(asked.base, **{"seed": 0, **changes})


def test_the_budget_pays_for_whole_trials(tuned: TunedStrategy) -> None:
    assert [t.updates for t in tuned.trials] == [2, 2]
    assert tuned.spent("updates") == 4
    assert tuned.trials[0].settings == {}
    assert [*tuned.trials[1].settings] == ["train.lr"]
    assert all(t.score is not None and t.seconds > 0 for t in tuned.trials)
    assert len({t.first_step for t in tuned.trials}) == 2  # other rates, other first steps


def test_trials_open_training_and_validation_cases_of_the_rules_steps_alone(
    tuned: TunedStrategy, asked: TuneSettings
) -> None:
    catalog = plan_trial(asked.base, Path(), 2).catalog
    sources = [catalog.source(i).name for i in (1, 2)]
    seen = {
        part: sorted(
            f"{source}/{case}"
            for source, split in zip(sources, catalog.splits, strict=True)
            for case in getattr(split, part)
        )
        for part in ("train", "validation")
    }
    for trial in tuned.trials:
        assert trial.opened == {"train": seen["train"], "tuning": seen["validation"]}
    record = RunRecord.read(tuned.folder / "trial_001")
    assert set(record.ledger["2"]["tuning"]) == set(seen["validation"])  # after the last step


def test_a_torn_file_of_a_trial_says_how_to_go_on(tuned: TunedStrategy, tmp_path: Path) -> None:
    folder = shutil.copytree(tuned.folder / "trial_002", tmp_path / "trial_002")
    (folder / "trial.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be read") as err:
        Trial.read(folder)
    assert "--fresh" not in str(err.value)  # which `clbench tune` does not know
    assert "delete the folder" in str(err.value)
    shutil.rmtree(folder)
    assert Trial.read(folder) is None


def test_the_same_command_goes_on_with_the_trials_that_are_missing(
    tuned: TunedStrategy, asked: TuneSettings
) -> None:
    second = tuned.folder / "trial_002"
    before = (second / "trial.json").read_bytes()
    (tuned.folder / "trial_001" / "trial.json").rename(tuned.folder / "kept.json")
    events: list[Any] = []
    (again,) = tune(asked, events.append)  # trial 1 had been scored, but not entered
    assert [e["number"] for e in events if e["event"] == "trial"] == [1]
    assert not any(e["event"] == "update" for e in events)
    assert again.trials == tuned.trials
    assert (second / "trial.json").read_bytes() == before


def test_a_rule_cannot_open_a_test_case(asked: TuneSettings) -> None:
    plan = plan_trial(asked.base, Path(), 1)
    catalog = plan.catalog
    test, validation = catalog.splits[0].test[0], catalog.splits[0].validation[0]
    for purpose in ("test", "tuning", "validation", "train", "trace"):
        with pytest.raises(TrainingError, match="a test case was asked for in tuning"):
            catalog.open(1, test, purpose)  # type: ignore[arg-type]
    catalog.step = 2
    for step, case in ((2, catalog.splits[1].validation[0]), (1, catalog.splits[0].train[0])):
        with pytest.raises(TrainingError, match="the tuning rule may not see"):
            catalog.open(step, case, "tuning")
    with pytest.raises(TrainingError, match="the tuning rule may not see"):
        catalog.open(2, catalog.splits[1].train[0], "train")  # a step beyond the rule's
    catalog.open(1, validation, "tuning")
    catalog.tuning_steps = 0
    with pytest.raises(TrainingError, match="no rule tunes"):
        catalog.open(1, validation, "tuning")


def test_training_that_diverges_is_a_trial_without_score(
    asked: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any) -> None:
        raise DivergedError("the loss term 'dice' is not finite")

    monkeypatch.setattr(teach, "teach", diverge)
    base = run_settings(asked, seed=5, out=tmp_path)
    trial = run_trial(plan_trial(base, tmp_path / "trial", 2), 1, {}, lambda event: None)
    assert trial.score is None
    assert "not finite" in str(trial.failure)
    assert Trial.read(tmp_path / "trial") == trial
    alone = TunedStrategy(
        name="x", space={}, defaults={}, trials=[trial], folder=tmp_path, facts={}, patients=False
    )
    with pytest.raises(SettingError, match="diverged in every trial"):
        _ = alone.best


def test_a_trial_that_diverges_takes_what_its_steps_took_shared_or_not(
    asked: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = teach.teach

    def diverge(step: Any) -> None:
        if step.lesson.number == 2:
            raise DivergedError("the loss term 'dice' is not finite")
        taught(step)

    monkeypatch.setattr(teach, "teach", diverge)
    base = run_settings(asked, seed=6, out=tmp_path)
    for name in ("one", "two"):  # the second takes the first step of the other
        trial = run_trial(plan_trial(base, tmp_path / name, 2), 1, {}, lambda event: None)
        assert trial.score is None
        cost = RunRecord.read(tmp_path / name).cost["1"]["train"]
        assert trial.seconds > cost["prepare_s"] + cost["train_s"] > 0


def test_cases_that_show_a_structure_again_count_in_its_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a course whose later steps only teach again would be tuned by forgetting alone."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def dice(server: object, volumes: list[str], names: tuple[str, ...], **_: Any) -> Any:
        asked.append((volumes[0], names))
        return {name: [0.5] for name in names}

    monkeypatch.setattr(trial_module, "structure_dice", dice)
    monkeypatch.setattr(trial_module, "predictor", lambda *_: None)
    monkeypatch.setattr(trial_module, "windows_fit", lambda *_: contextlib.nullcontext())
    steps = [
        SimpleNamespace(learns=("liver", "spleen"), again=()),
        SimpleNamespace(learns=("cyst",), again=("liver",)),
        SimpleNamespace(learns=(), again=("spleen",)),
    ]
    splits = [SimpleNamespace(validation=(name,)) for name in "abc"]
    catalog = SimpleNamespace(splits=splits, open=lambda number, case, purpose: case)
    profile = SimpleNamespace(examine=SimpleNamespace(postprocess=False))
    plan: Any = SimpleNamespace(
        catalog=catalog, benchmark=SimpleNamespace(steps=steps), profile=profile, strategy=None
    )
    lesson: Any = SimpleNamespace(number=3, structures=())
    served: Any = None
    found = trial_module.validation_dice(plan, lesson, served, {}, lambda event: None)
    assert asked == [("a", ("liver", "spleen")), ("b", ("cyst", "liver")), ("c", ("spleen",))]
    assert set(found) == {"liver", "spleen", "cyst"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "pays for at least one trial"),
        ({"budget": -1.0}, "pays for at least one trial"),
        ({"budget": float("nan")}, "pays for at least one trial"),
        ({"budget": 1}, "the budget pays for no trial.*\n.*\n.*at least 2 updates"),
        ({"rule": "first_steps"}, "unknown value"),
        ({"space": ("train.lr=1e-5..",)}, "no bound"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_a_trial(
    changes: dict[str, Any], message: str, tmp_path: Path, cache_root: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        tune(settings(tmp_path, cache_root, **changes))
    assert not (tmp_path / "_tuning").exists()


@pytest.mark.parametrize(
    ("word", "fixed", "message"),
    [
        ("train.amp=off|fp16", (), "float16 needs a GPU"),
        ("backbone.name=small_unet|smal_unet", (), "no backbone called 'smal_unet'"),
        ("text.encoding=onehot|one_hot", (), "no encoding called 'one_hot'"),
        ("data.sampling=posneg|class_ratio", ("data.posneg=2,1",), "nothing reads data.posneg"),
        ("train.accumulate=1..2:int", ("train.compile=true",), "accumulated batches"),
    ],
)
def test_values_that_no_run_takes_are_refused_before_a_trial(
    word: str, fixed: tuple[str, ...], message: str, tmp_path: Path, cache_root: Path
) -> None:
    base = dataclasses.replace(settings(tmp_path, cache_root).base, device="cpu", overrides=fixed)
    with pytest.raises(SettingError, match=message):
        tune(settings(tmp_path, cache_root, base=base, space=(word,)))
    assert not (tmp_path / "_tuning").exists()


def test_a_setting_whose_default_is_none_is_tuned_to_the_end(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tmp_path, cache_root, space=("train.clip_norm=0.5..10:log",), budget=12)
    monkeypatch.setattr(study_module, "run_trial", scored(0.1, 0.2, 0.3, 0.2, 0.4, 0.1))
    (one,) = tune(asked)
    assert one.defaults["train.clip_norm"] is None
    monkeypatch.setattr(style, "to_bytes", lambda figure, kind: kind.encode())
    written = write_outcome([one], asked, tmp_path / "outcome")
    assert [*tables([one], asked)]
    assert "train.clip_norm" in (tmp_path / "outcome" / "sensitivity.csv").read_text()
    assert read_tuned(written[0]).strategies["finetune"].trials == 6


def scored(*results: float | str, updates: int = 2) -> Any:
    """Stands in for teaching: the score of each trial, or the error in which it ends."""

    def run(plan: Any, number: int, values: Any, watch: Any) -> Trial:
        result = results[min(number, len(results)) - 1]
        failure = result if isinstance(result, str) else None
        return Trial(
            number=number, settings=dict(values), score=None if failure else float(result),
            dice={}, updates=updates, seconds=1.0, first_step="a", opened={}, failure=failure,
            fault=failure is not None,
        )  # fmt: skip

    return run


def test_an_error_that_other_settings_do_not_mend_ends_the_tuning_early(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tmp_path, cache_root, budget=100)
    monkeypatch.setattr(study_module, "run_trial", scored("no such layer", "no such layer"))
    with pytest.raises(TrainingError, match="failed alike"):
        tune(asked)
    monkeypatch.setattr(study_module, "run_trial", scored("no such layer", 0.5))
    (one,) = tune(asked)
    assert one.best.number == 2
    assert len(one.trials) == 50


def test_trials_that_fail_before_their_first_update_are_not_made_without_end(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = scored(*(f"no layer {n}" for n in range(99)), updates=0)
    monkeypatch.setattr(study_module, "run_trial", failing)
    (one,) = tune(settings(tmp_path, cache_root, budget=9))
    assert len(one.trials) == 4  # of two updates each, had they been made
    with pytest.raises(SettingError, match="training failed in every trial"):
        _ = one.best


def test_settings_given_by_set_are_not_searched(tmp_path: Path, asked: TuneSettings) -> None:
    fixed = run_settings(asked, out=tmp_path, overrides=(*FEW, "train.lr=0.001"))
    with pytest.raises(SettingError, match="nothing to tune"):
        tune(dataclasses.replace(asked, base=fixed))


def test_steps_without_validation_cases_are_refused(tmp_path: Path, asked: TuneSettings) -> None:
    base = run_settings(asked, out=tmp_path, overrides=(*FEW, "phantom.validation=0"))
    with pytest.raises(SettingError, match="validation cases of every step"):
        tune(dataclasses.replace(asked, base=base))


def test_a_run_with_tuned_settings_records_how_they_were_chosen(
    asked: TuneSettings, tuned: TunedStrategy, file: Path
) -> None:
    plan = plan_tuned(run_settings(asked), file)
    chosen = tuple(f"{k}={v}" for k, v in tuned.best.settings.items())
    assert plan.settings.overrides == (*FEW, *chosen)
    record = new_record(plan)
    assert record.tuned is not None
    assert record.tuned["rule"] == "first_step"
    assert record.tuned["realistic"] is True
    assert (record.tuned["budget"], record.tuned["unit"]) == (5.0, "updates")
    assert (record.tuned["trials"], record.tuned["updates"]) == (2, 4)
    assert _read_back(record).tuned == record.tuned
    assert "tuned" not in dataclasses.replace(record, tuned=None).to_json()


def _read_back(record: RunRecord) -> RunRecord:
    return RunRecord.from_json(json.loads(json.dumps(record.to_json())))


def test_rates_that_tuning_chose_may_stand_in_one_table(
    asked: TuneSettings, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / FILE
    text = file.read_text()
    start, end = text.index("settings = ["), text.index("score =")
    other.write_text(text[:start] + 'settings = ["train.lr=0.0007"]\n' + text[end:])
    record = _read_back(new_record(plan_tuned(run_settings(asked), other)))
    plain = dataclasses.replace(
        record, tuned=None, identity=dataclasses.replace(
            record.identity, profile=record.tuned["profile_before"] if record.tuned else {}
        )
    )  # fmt: skip
    assert record.identity.profile["train"]["lr"] == 0.0007
    refuse_mixture([plain, record])
    with pytest.raises(StoreError, match="profile"):
        refuse_mixture([plain, dataclasses.replace(record, tuned=None)])


def without_fixed(text: str) -> str:
    """A settings file as it was before it held what else its trials were made with."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("fixed = ")) + "\n"


def test_a_run_has_the_settings_of_the_trials_beside_the_tuned_ones(
    asked: TuneSettings, file: Path, tmp_path: Path
) -> None:
    (chosen,) = read_tuned(file).strategies.values()
    assert {*FEW} <= {*(chosen.fixed or ())}
    decayed = run_settings(asked, overrides=(*FEW, "train.weight_decay=0.5"))
    with pytest.raises(SettingError, match="tuned beside other settings") as refused:
        plan_tuned(decayed, file)
    said = str(refused.value)
    assert "train.weight_decay=0.5" in said
    assert f"--set train.weight_decay={load_profile('smoke').train.weight_decay}" in said
    shorter = run_settings(asked, overrides=())
    with pytest.raises(SettingError, match=r"--set train\.epochs=1 --set train\.iterations=1"):
        plan_tuned(shorter, file)
    ignoring = run_settings(asked, overrides=(*FEW, "strategy.unlabelled=ignore"))
    with pytest.raises(SettingError, match=r"strategy\.unlabelled"):
        plan_tuned(ignoring, file)
    older = tmp_path / FILE
    older.write_text(without_fixed(file.read_text()))
    assert plan_tuned(decayed, older).profile.train.weight_decay == 0.5
    assert "not compared" in read_tuned(older).label
    assert "not compared" not in read_tuned(file).label


def test_a_searched_setting_is_not_given_by_set_where_its_default_was_the_best(
    asked: TuneSettings, file: Path, tmp_path: Path
) -> None:
    text, path = file.read_text(), tmp_path / FILE
    start, end = text.index("settings = ["), text.index("score =")
    path.write_text(without_fixed(text[:start] + "settings = []\n" + text[end:]))
    with pytest.raises(SettingError, match="given by --set as well"):
        plan_tuned(run_settings(asked, overrides=(*FEW, "train.lr=0.5")), path)


def test_a_settings_file_is_refused_where_its_rule_does_not_reach(
    asked: TuneSettings, file: Path, tmp_path: Path
) -> None:
    def refused(text: str, message: str, **changes: Any) -> None:
        path = tmp_path / FILE
        path.write_text(text)
        with pytest.raises(ClbenchError, match=message):
            plan_tuned(run_settings(asked, **changes), path)

    text = file.read_text()
    assert read_tuned(file).seed == 1000
    refused(text, "this seed was used in tuning", seed=1000)
    refused(text, "tuned strategy", strategy="lwf")
    refused(text, "tuned on another course", bench="body_ext")
    refused(text, "tuned on other data", overrides=(*FEW, "phantom.train=2"))
    transfer = text.replace('"first_step"', '"transfer"')
    refused(transfer, "for another course")
    refused(transfer, "for another course", bench=registry.in_order("tumor_ext", (2, 1)))
    refused(text, "tuned on another course", bench=registry.in_order("tumor_ext", (2, 1)))
    refused(text.replace('rule = "first_step"', 'rule = "first"'), "another version")
    refused(text.replace("schema = 1\n", ""), "schema")
    both = text.replace("settings = [", 'settings = ["train.iterations=2", ').replace(", ]", "]")
    refused(both, "given by --set as well")
    plan = plan_tuned(run_settings(asked), file)
    seen = f"btcv/{plan.catalog.splits[0].test[0]}"
    refused(text.replace('"tuning" = [', f'"tuning" = ["{seen}", '), "test cases of this course")
    with pytest.raises(ClbenchError, match="file not found"):
        read_tuned(tmp_path / "absent.toml")


def test_a_finished_run_of_the_chosen_settings_learns_that_they_were_tuned(
    smoke_run: Path, file: Path, cache_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    folder = out / smoke_run.relative_to(smoke_run.parents[2])
    shutil.copytree(smoke_run, folder)
    text = file.read_text()
    start, end = text.index("settings = ["), text.index("score =")
    path = tmp_path / FILE
    path.write_text(
        without_fixed(text[:start] + "settings = []\n" + text[end:]).replace(
            "finetune", "universal"
        )
    )
    plan = plan_tuned(
        RunSettings(
            bench="tumor_ext", strategy="universal", profile="smoke", out=out, cache=cache_root
        ),
        path,
    )  # fmt: skip
    before = (folder / "scores.csv").read_bytes()
    assert run_plan(plan) == folder
    record = RunRecord.read(folder)
    assert record.tuned is not None
    assert record.tuned["settings"] == []
    assert (folder / "scores.csv").read_bytes() == before
