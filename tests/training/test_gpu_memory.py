"""Out of memory: the error names where, and a setting that was tried and fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.errors import SettingError
from clbench.nets.output import Output
from clbench.run.course import run_plan
from clbench.spec.settings import load_profile
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Batch, Memory
from clbench.testing.harness import StrategyHarness
from clbench.training.gpu_memory import enough_memory, smaller

PATCH = (96, 96, 64)


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def test_settings_get_smaller_in_a_stated_order() -> None:
    profile = load_profile("paper")
    assert list(smaller(profile, PATCH)) == [
        {"train.batch": 1},
        {"train.batch": 1, "train.amp": "bf16"},
        {"train.batch": 1, "train.amp": "bf16", "data.patch_vox": (64, 64, 64)},
    ]
    wide = replace(profile, examine=replace(profile.examine, windows=4))
    assert list(smaller(wide, (64, 64, 64), teaching=False)) == [
        {"examine.windows": 2},
        {"examine.windows": 1},
    ]


def test_the_first_setting_that_fits_is_named() -> None:
    tried: list[dict[str, Any]] = []

    def attempt(change: Mapping[str, Any]) -> None:
        tried.append(dict(change))
        if "train.amp" not in change:
            raise full()

    with (
        pytest.raises(SettingError, match="the GPU is out of memory") as err,
        enough_memory("teaching step 2", load_profile("paper"), PATCH, attempt=attempt),
    ):
        raise full()
    assert tried == [{"train.batch": 1}, {"train.batch": 1, "train.amp": "bf16"}]
    for part in (
        "teaching step 2", "train.batch = 2", "2.00 GiB",
        "what fits, tried here: --set train.batch=1 --set train.amp=bf16;",
    ):  # fmt: skip
        assert part in str(err.value)
    assert "more" not in str(err.value)


def test_where_nothing_fits_or_nothing_can_be_tried_that_is_said() -> None:
    def attempt(change: Mapping[str, Any]) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    profile = load_profile("paper")
    with (
        pytest.raises(SettingError, match=r"nothing tried fits, down to .*patch_vox=64,64,64"),
        enough_memory("teaching", profile, PATCH, attempt=attempt),
    ):
        attempt({})
    with (
        pytest.raises(SettingError, match=r"try --set train\.batch=1;"),
        enough_memory("teaching", profile, PATCH),
    ):
        raise full()
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


def test_a_run_names_update_cases_and_what_fits(tmp_path: Path, cache_root: Path) -> None:
    harness = StrategyHarness(Hungry(), name="hungry", folder=tmp_path, cache=cache_root)
    plan = harness.plan_run("out")
    plan.profile = replace(plan.profile, train=replace(plan.profile.train, batch=2))
    with pytest.raises(SettingError) as err:
        run_plan(plan)
    said = str(err.value)
    for part in (
        "teaching step 2", "phase train, epoch 0, iteration 0, cases 2/",
        "what fits, tried here: --set train.batch=1",
    ):  # fmt: skip
        assert part in said


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
    assert "what fits, tried here: --set examine.windows=1" in str(err.value)
