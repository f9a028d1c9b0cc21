"""Numbers that watch themselves: what stops a run, what warns, and that ordinary runs do neither."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

from clbench.cli.progress import Progress
from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.volume import Volume, preprocess
from clbench.errors import DataError, SettingError, TrainingError
from clbench.run.course import run_plan
from clbench.run.examine import same_scores, slack_of
from clbench.run.plan import RunSettings, resolve
from clbench.spec import registry
from clbench.spec.benchmark import Preprocessing, Source
from clbench.spec.settings import TrainSettings
from clbench.store import checkpoint, run_folder
from clbench.store.run_folder import Score
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Lesson, Phase
from clbench.training.loop import learning_rate
from clbench.training.monitors import (
    StepMonitor,
    check_gradient,
    constant_labels,
    count_positives,
    lost_in_some_cases,
    refuse_constant_labels,
    refuse_lost_validation,
    unfinished_warmup,
)

LESSON = Lesson(number=2, learns=("tumor",), structures=("liver", "spleen", "tumor"), source="lits")


def update(norm: float, *, voxels: tuple[int, ...] = (0, 0, 0), phase: str = "train") -> Any:
    return {
        "event": "update", "step": 2, "phase": phase, "epoch": 3, "iteration": 7,
        "cases": ["2/5"], "grad_norm": norm, "voxels": list(voxels),
    }  # fmt: skip


def case(names: tuple[str, ...], counts: Mapping[int, int], hidden: tuple[str, ...] = ()) -> Volume:
    """A case of 1000 voxels that holds each bit pattern so many times."""
    fake = SimpleNamespace(
        source="lits", case="0", names=names, counts=counts,
        annotated=frozenset(names) - set(hidden), bits=np.zeros((10, 10, 10), np.uint8),
        lost_in_resampling=lambda name: None,
    )  # fmt: skip
    return cast("Volume", fake)


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_unless_the_scaler_skips_it(norm: float) -> None:
    with pytest.raises(TrainingError, match="gradient is not finite") as err:
        check_gradient(norm, "step 2, epoch 1, iteration 4, cases 2/7", scaled=False)
    assert "cases 2/7" in str(err.value)
    assert "train.lr" in str(err.value)
    check_gradient(norm, "", scaled=True)
    check_gradient(1e9, "", scaled=False)  # large is StepMonitor's business


def test_ordinary_norms_and_skips_of_the_loss_scaler_say_nothing() -> None:
    rng = np.random.default_rng(0)
    watch = StepMonitor(LESSON, clips=False)
    said = []
    for i, norm in enumerate(np.exp(rng.normal(0, 1.0, 2000))):  # factor e is one sd
        said += watch.see(update(float(norm)))
        if i % 200 == 0:  # the scale is doubled too far, and comes down again
            for _ in range(17):
                said += watch.see(update(float("inf")))
    assert said == []


@pytest.mark.parametrize("epochs", [1, 2, 3, 15])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 4, 15, 17])
def test_a_warmup_is_unfinished_where_no_epoch_has_the_peak(epochs: int, warmup: int) -> None:
    train = TrainSettings(epochs=epochs, warmup=warmup)
    most = max(learning_rate(e, epochs=epochs, warmup=warmup, base=1.0) for e in range(epochs))
    said = unfinished_warmup(LESSON, Phase(), train)
    # without any warm-up the cosine begins just below its peak
    assert (said is None) == (most == 1 or warmup == 0)
    if said is not None:
        assert f"{most:.0%}" in said["message"]
    assert unfinished_warmup(LESSON, Phase(constant=True), train) is None
    assert unfinished_warmup(LESSON, Phase(epochs=100), train) is None


def test_a_spike_warns_once_a_phase_and_an_explosion_stops() -> None:
    watch = StepMonitor(LESSON, clips=False)
    for _ in range(30):
        assert watch.see(update(2.0)) == []
    (said,) = watch.see(update(900.0))
    assert said["event"] == "warning"
    for part in ("step 2", "epoch 3, iteration 7", "cases 2/5", "900", "train.clip_norm=8"):
        assert part in said["message"]
    for _ in range(8):
        assert watch.see(update(900.0)) == []
    with pytest.raises(TrainingError, match="explodes: 10 updates in a row") as err:
        watch.see(update(900.0))
    assert "cases 2/5" in str(err.value)


def test_a_penalty_far_below_the_loss_warns_once_at_the_end() -> None:
    def one(penalty: float) -> Any:
        return {**update(2.0), "loss": 1.0 + penalty, "terms": {"dice": 1.0, "penalty": penalty}}

    past = [one(0.0), one(3e-6)]
    watch = StepMonitor(LESSON, clips=False, penalties=("penalty",), past=past)
    assert watch.see(one(1e-6)) == []
    (said,) = [w for w in watch.end([]) if w["kind"] == "faint penalty"]
    for part in ("step 2", "penalty", "3.0e-06", "--set strategy"):
        assert part in said["message"]
    watch.see(one(1e-3))  # once it acted
    assert not any(w["kind"] == "faint penalty" for w in watch.end([]))
    watch = StepMonitor(replace(LESSON, number=1), clips=False, penalties=("penalty",), past=past)
    assert not any(w["kind"] == "faint penalty" for w in watch.end([]))
    assert not StepMonitor(LESSON, clips=False, past=past)._faint_penalty()


def test_a_clipped_explosion_goes_on_and_a_new_phase_starts_anew() -> None:
    watch = StepMonitor(LESSON, clips=True)
    for norm in (2.0,) * 30:
        watch.see(update(norm))
    assert len([w for _ in range(40) for w in watch.see(update(900.0))]) == 1
    for _ in range(30):  # another phase may have other norms
        assert watch.see(update(900.0, phase="again")) == []


def test_a_loss_scale_that_never_comes_down_far_enough_stops() -> None:
    watch = StepMonitor(LESSON, clips=True)
    for _ in range(19):
        watch.see(update(float("nan")))
    with pytest.raises(TrainingError, match="not finite in 20 updates"):
        watch.see(update(float("nan")))


def test_a_resumed_step_is_watched_as_if_it_had_never_stopped() -> None:
    past = [update(2.0, voxels=(0, 0, 4))] * 30
    watch = StepMonitor(LESSON, clips=False, past=past)
    assert len(watch.see(update(900.0))) == 1
    assert watch.end([]) == []


# ------------------------------------------------------------------------------------ the labels


def test_positive_voxels_are_counted_without_the_unknown() -> None:
    label = torch.zeros((2, 3, 2, 2, 2), dtype=torch.uint8)
    label[0, 0] = 1
    label[1, 0, 0] = 1
    label[:, 1] = 255
    assert count_positives(label).tolist() == [12, 0, 0]
    empty = torch.zeros((0, 2, 2, 2, 2), dtype=torch.uint8)
    assert count_positives(empty).tolist() == [0, 0]


def test_a_structure_that_no_crop_shows_is_warned_of() -> None:
    watch = StepMonitor(LESSON, clips=False)
    watch.see(update(1.0, voxels=(5, 0, 0)))
    held = case(("liver", "tumor"), {0: 900, 1: 90, 3: 10})
    (said,) = watch.end([held])  # the spleen is annotated by none
    assert "tumor" in said["message"]
    assert "step 2" in said["message"]
    assert "class_ratio" in said["message"]
    watch.see(update(1.0, voxels=(0, 0, 1)))
    assert watch.end([held]) == []


@pytest.mark.parametrize(("counts", "value"), [({0: 900, 1: 90}, 0), ({2: 400, 3: 600}, 1)])
def test_a_constant_label_of_a_new_structure_is_refused(
    counts: Mapping[int, int], value: int
) -> None:
    with pytest.raises(DataError, match=f"label of tumor is {value}") as err:
        refuse_constant_labels(LESSON, [case(("liver", "tumor"), counts)] * 2)
    for part in ("step 2", "lits", "2 training cases", "data check"):
        assert part in str(err.value)


def test_contrast_in_one_case_is_enough_and_what_is_not_annotated_proves_nothing() -> None:
    without, holds = ({0: 900, 1: 100}, {0: 900, 3: 100})
    names = ("liver", "tumor")
    refuse_constant_labels(LESSON, [case(names, without), case(names, holds)])
    refuse_constant_labels(LESSON, [case(names, without, hidden=("tumor",))])
    assert constant_labels(LESSON, [case(names, holds)]) == []


def test_what_the_one_training_case_lacks_warns() -> None:
    only = [case(("liver", "tumor"), {0: 900, 1: 100})]
    refuse_constant_labels(LESSON, only)
    (said,) = constant_labels(LESSON, only)
    assert "tumor" in said["message"]
    assert "the one training case does not hold" in said["message"]
    full = [case(("liver", "tumor"), {2: 1000})]
    with pytest.raises(DataError, match="label of tumor is 1"):
        refuse_constant_labels(LESSON, full)


def thin(folder: Path, spacing_mm: float) -> Volume:
    """A case whose tumor is one voxel between two voxels of the model grid."""
    image = np.full((20, 20, 20), 50, np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[4:14, 4:14, 4:14] = 1
    label[7, 7, 7] = 2
    source = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
    paths = folder / "i.nii", folder / "l.nii"
    for path, array in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0])), path)
    files = CaseFiles(case="0", image=paths[0], label=paths[1])
    pre = Preprocessing(spacing_mm=(spacing_mm,) * 3)
    return preprocess(read_case(files, source), source, pre)


def test_what_resampling_lost_is_blamed_on_it_and_the_spacing_advised_keeps_it(
    tmp_path: Path,
) -> None:
    lesson = Lesson(
        number=2, learns=("liver_tumor",), structures=("liver", "liver_tumor"), source="lits"
    )
    volume = thin(tmp_path, 3.0)
    with pytest.raises(DataError, match="liver_tumor is lost in resampling") as err:
        refuse_constant_labels(lesson, [volume] * 2)
    assert "2 voxels inside in the files of 2 case(s)" in str(err.value.got)
    (said,) = constant_labels(lesson, [volume])
    assert "none after resampling" in said["message"]
    (old,) = constant_labels(
        replace(lesson, learns=("liver",), structures=("liver_tumor", "liver")), [volume]
    )
    assert "none after resampling" in old["message"]
    with pytest.raises(DataError, match="liver_tumor is lost in resampling") as validating:
        refuse_lost_validation(lesson, [volume] * 2)
    assert "2 validation cases" in str(validating.value.where)
    assert str(err.value.next_step) in str(validating.value.next_step)
    advised = re.findall(r"spacing_mm=\[([\d.]+),", str(err.value.next_step))
    kept = thin(tmp_path, float(advised[0]))
    refuse_constant_labels(lesson, [kept] * 2)
    refuse_lost_validation(lesson, [kept] * 2)
    assert constant_labels(lesson, [kept]) == []
    assert 1.0 < float(advised[0]) < 3.0
    held = lambda volume: ("liver", "liver_tumor")  # noqa: E731
    (one,) = lost_in_some_cases(lesson, [volume, kept], held)
    assert one["kind"] == "lost in resampling"
    assert "lits case 0, liver_tumor: 1 voxels inside" in one["message"]
    assert str(err.value.next_step) in one["message"]
    assert lost_in_some_cases(lesson, [kept] * 2, held) == []
    assert lost_in_some_cases(lesson, [volume], lambda volume: ("liver",)) == []
    assert thin(tmp_path, 3.0).lost_in_resampling("liver") is None


def test_a_constant_label_of_an_old_structure_warns() -> None:
    (said,) = constant_labels(LESSON, [case(("spleen", "tumor"), {0: 900, 2: 100})])
    assert said["kind"] == "constant label"
    for part in ("step 2", "spleen in lits", "0 in every annotated voxel", "source.partial"):
        assert part in said["message"]


# ------------------------------------------------------------------------------- the saved model

SCORE = Score(
    bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="btcv", case="1",
    structure="liver", learned_at=1, scoring="strict", metric="dice", value=0.5, gt_vox=10,
    pred_vox=12, status="ok",
)  # fmt: skip


def test_scores_of_a_reloaded_model_are_compared_bit_by_bit() -> None:
    empty = replace(SCORE, structure="spleen", value=float("nan"))
    assert same_scores([SCORE, empty], [empty, SCORE], where="w", slack=0.0) == 0.0
    near = replace(SCORE, value=0.5 + 2**-50)
    with pytest.raises(TrainingError, match="does not score as the taught one") as err:
        same_scores([SCORE], [near], where="step1.pt, btcv case 1", slack=0.0)
    for part in ("step1.pt", "strict, dice, liver", "0.5, 12", "0.5000000000000009"):
        assert part in str(err.value)
    assert same_scores([SCORE], [near], where="w", slack=1e-3) == 2**-50
    for other in ([], [replace(SCORE, value=float("nan"))], [replace(SCORE, value=0.6)]):
        with pytest.raises(TrainingError):
            same_scores([SCORE], other, where="w", slack=1e-3)


def test_equal_bits_are_asked_for_where_the_device_promises_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert slack_of(torch.device("cpu")) == 0.0
    assert slack_of(torch.device("cuda")) == 1e-3
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert slack_of(torch.device("cuda")) == 0.0


# ---------------------------------------------------------------------------------- a whole course


@dataclass(frozen=True, kw_only=True)
class Hungry(Finetune):
    """Asks for more memory than there is, in the losses of step 2."""

    def losses(self, batch: Any, new: Any, old: Any, memory: Any) -> Any:
        if not all(batch.new):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return super().losses(batch, new, old, memory)


def planned(out: Path, cache: Path, strategy: Any, *overrides: str) -> Any:
    settings = RunSettings(
        bench="tumor_ext", strategy="made", profile="smoke", out=out, cache=cache,
        overrides=("phantom.test=1", "train.epochs=1", *overrides),
    )  # fmt: skip
    return resolve(settings, strategy=strategy)


def test_structures_of_stored_cases_are_no_matter_of_the_loop_s_crops(
    cache_root: Path, tmp_path: Path
) -> None:
    """A session that draws stored cases itself shows what the loop's own crops never do."""
    plan = planned(tmp_path, cache_root, registry.load("strategy", "der")(), "train.iterations=2")
    record = run_folder.read_record(run_plan(plan))
    assert record["ledger"]["2"]["train"] != []
    said = [w["message"] for w in record["warnings"] if w["kind"] == "never sampled"]
    assert not any("step 2" in message and "spleen" in message for message in said)


def test_a_run_is_watched_from_end_to_end(
    cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(
        tmp_path, cache_root, Finetune(), "data.patch_vox=16,16,16", "train.iterations=1"
    )
    folder = run_plan(plan)
    record = run_folder.read_record(folder)
    assert record["reexamined"] == {
        "1": {"case": "btcv/21", "largest_difference": 0.0},
        "2": {"case": "lits/20", "largest_difference": 0.0},
    }
    unseen = [w["message"] for w in record["warnings"] if w["kind"] == "never sampled"]
    assert unseen  # one small crop cannot show thirteen organs
    events = run_folder.read_events(folder / "events.jsonl")
    assert all(e["grad_norm"] > 0 for e in events if e["event"] == "update")
    out = io.StringIO()
    Progress(Console(file=out, width=400)).watch({"event": "finished", "folder": folder})
    assert all(f"WARNING: {message}" in out.getvalue() for message in unseen)

    # another strategy shares step 1: its warnings are this run's too; then memory runs out
    with pytest.raises(SettingError) as err:
        run_plan(planned(tmp_path, cache_root, Hungry(), "data.patch_vox=16,16,16",
                         "train.iterations=1"))  # fmt: skip
    assert "teaching step 2" in str(err.value)
    assert "train.amp=bf16" in str(err.value)
    hungry = run_folder.read_record(_other(folder))
    assert [w for w in hungry["warnings"] if w["step"] == 1] == [
        w for w in record["warnings"] if w["step"] == 1
    ]

    # a checkpoint that does not hold what was taught
    load = checkpoint.load

    def altered(path: Path) -> dict[str, Any]:
        content = load(path)
        if path.name == "step2.pt":
            for tensor in content["model"].values():
                if tensor.is_floating_point():
                    tensor += 0.5
        return content

    monkeypatch.setattr(checkpoint, "load", altered)
    (folder / "step2.pt").unlink()
    shutil.rmtree(tmp_path / "_shared")  # so that the step is taught, and not taken from there
    run_folder.write_record(folder, {**record, "status": "unfinished", "steps_done": 1})
    with pytest.raises(TrainingError, match="does not score as the taught one") as broken:
        run_plan(plan)
    assert "lits case 20" in str(broken.value)
    assert run_folder.read_record(folder)["steps_done"] == 1


def _other(folder: Path) -> Path:
    (found,) = [p for p in folder.parent.iterdir() if p != folder]
    return found


def test_a_constant_label_stops_the_run_before_it_teaches(
    cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, cache_root, Finetune())
    open_ = type(plan.catalog).open

    def without_spleen(catalog: Any, step: int, case: str, purpose: Any) -> Volume:
        volume: Volume = open_(catalog, step, case, purpose)
        bit = 1 << volume.names.index("spleen") if "spleen" in volume.names else 0
        return replace(volume, counts={p: n for p, n in volume.counts.items() if not p & bit})

    monkeypatch.setattr(type(plan.catalog), "open", without_spleen)
    events: list[str] = []
    with pytest.raises(DataError, match="label of spleen is 0"):
        run_plan(plan, lambda event: events.append(event["event"]))
    assert "update" not in events
