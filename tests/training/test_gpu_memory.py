"""Out of memory: the error names where, what was in force, and the first smaller setting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clbench.errors import SettingError, TrainingError
from clbench.nets.output import Output
from clbench.run.course import run_plan
from clbench.spec.settings import load_profile
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Batch, Memory
from clbench.testing.harness import StrategyHarness
from clbench.training.gpu_memory import enough_memory, smaller_setting
from clbench.training.ranks import Ranks
from clbench.training.update import divide

PATCH = (96, 96, 64)


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_smaller_settings_come_in_a_stated_order() -> None:
    profile = load_profile("paper")
    train, examine = profile.train, profile.examine
    assert (train.batch, train.amp) == (2, "off")
    half = "try --set train.batch=1 --set train.accumulate=2"  # the same crops per update
    assert smaller_setting(profile, PATCH) == half
    compiled = replace(profile, train=replace(train, compile=True))  # refuses accumulated batches
    assert smaller_setting(compiled, PATCH) == half.replace("try", "try --set train.compile=false")
    # of two processes each holds one crop of the two: halving the batch would change nothing
    assert smaller_setting(profile, PATCH, processes=2) == "try --set train.amp=bf16"
    four = replace(profile, train=replace(train, batch=4))
    assert smaller_setting(four, PATCH, processes=2) == (
        "try --set train.batch=1 --set train.accumulate=4"
    )
    single = replace(profile, train=replace(train, batch=1))
    assert smaller_setting(single, PATCH) == "try --set train.amp=bf16"
    mixed = replace(profile, train=replace(train, batch=1, amp="bf16"))
    assert smaller_setting(mixed, (128, 96, 64)) == "try --set data.patch_vox=96,96,64"
    assert smaller_setting(mixed, (80, 64, 48)) == "try --set data.patch_vox=64,64,48"
    assert smaller_setting(mixed, (64, 64, 48)).startswith("take a smaller network")
    wide = replace(mixed, examine=replace(examine, windows=4))
    assert smaller_setting(wide, PATCH, teaching=False) == "try --set examine.windows=2"


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
def test_the_advice_is_taken_by_the_next_command(processes: int) -> None:
    """It makes the same update, of crops that the processes can share out."""
    profile, ranks = load_profile("paper"), Ranks()
    ranks.size = processes
    for batch, accumulate in itertools.product(range(1, 17), range(1, 5)):
        train = replace(profile.train, batch=batch, accumulate=accumulate)
        try:
            divide(train, ranks)
        except SettingError:
            continue
        said = smaller_setting(replace(profile, train=train), PATCH, processes=processes)
        if "train.batch" in said:
            b, a = (int(word.rpartition("=")[2]) for word in said.split() if "train." in word)
            assert (b < batch, b * a) == (True, batch * accumulate)
            divide(replace(train, batch=b, accumulate=a), ranks)


@pytest.mark.parametrize(
    "error",
    [full(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")],
)
def test_the_error_says_where_what_and_the_next_step(error: RuntimeError) -> None:
    with (
        pytest.raises(SettingError, match="the GPU is out of memory") as err,
        enough_memory("teaching step 2", load_profile("paper"), PATCH),
    ):
        raise error
    for part in ("teaching step 2", "train.batch = 2", "96x96x64", "try --set train.batch=1"):
        assert part in str(err.value)
    assert str(error).splitlines()[0] in str(err.value)
    assert "more" not in str(err.value)


def test_a_loader_process_that_was_killed_is_no_traceback() -> None:
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
    profile = load_profile("paper")
    with (
        pytest.raises(TrainingError, match="a loader process was killed") as err,
        enough_memory("teaching step 2", profile, PATCH),
    ):
        raise killed
    assert "--workers" in str(err.value)
    assert "teaching step 2" in str(err.value)


def test_other_errors_pass() -> None:
    profile = load_profile("paper")
    with pytest.raises(RuntimeError, match="shape"), enough_memory("teaching", profile, PATCH):
        raise RuntimeError("shape '[2]' is invalid")


class Hungry(Finetune):
    """Fine-tuning on a card that holds one crop."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, torch.Tensor]:
        if len(batch.cases) > 1:
            raise full()
        return super().losses(batch, new, old, memory)


def test_a_run_names_update_and_cases(tmp_path: Path, cache_root: Path) -> None:
    harness = StrategyHarness(Hungry(), name="hungry", folder=tmp_path, cache=cache_root)
    plan = harness.plan_run("out")
    plan.profile = replace(plan.profile, train=replace(plan.profile.train, batch=2))
    with pytest.raises(SettingError) as err:
        run_plan(plan)
    for part in (
        "teaching step 2",
        "phase train, epoch 0, iteration 0, cases 2/",
        "try --set train.batch=1",
    ):
        assert part in str(err.value)


class Blind(Finetune):
    """Fine-tuning that cannot decode as many windows as are asked for."""

    def decode(self, logits: torch.Tensor, structures: tuple[str, ...]) -> torch.Tensor:
        raise full()


def test_examining_names_the_case(tmp_path: Path, cache_root: Path) -> None:
    harness = StrategyHarness(Blind(), name="blind", folder=tmp_path, cache=cache_root)
    plan = harness.plan_run("out")
    plan.profile = replace(plan.profile, examine=replace(plan.profile.examine, windows=2))
    with pytest.raises(SettingError, match="examining after step 1, case") as err:
        run_plan(plan)
    assert "try --set examine.windows=1" in str(err.value)
