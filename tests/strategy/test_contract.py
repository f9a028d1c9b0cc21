"""The contract at work: a softmax method in phases, with validation, prepared tensors and ranges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench.data.volume import Volume
from clbench.errors import StoreError
from clbench.evaluation.predictions import read_prediction
from clbench.nets.heads import ConvHead, Segmenter
from clbench.nets.output import Output
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec import registry
from clbench.store import checkpoint
from clbench.strategies.finetune import Finetune
from clbench.strategies.mib import Mib
from clbench.strategies.universal import Universal
from clbench.strategy.contract import (
    Batch,
    Declaration,
    DrawBatches,
    Kit,
    Lesson,
    Memory,
    Phase,
    PhaseResult,
    Predictor,
    Strategy,
)
from clbench.strategy.teacher_labels import pseudo_labels


@dataclass(frozen=True, kw_only=True)
class Softmax(Strategy):
    """A background channel, a teacher, two phases, prepared tensors, Fisher-like work, ranges."""

    past: ClassVar[Any] = "predictions"

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        with kit.fresh(1, "model"):
            backbone = kit.backbone()
            model = Segmenter(backbone, ConvHead(backbone.final_channels, background=True))
            model.add(step.learns)
        return model

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        assert isinstance(model, Segmenter)
        with kit.fresh(step.number, "grow"):
            model.add(step.learns)

    def takes_teacher(self, step: Lesson) -> bool:
        return bool(step.old)

    def prepares(self, step: Lesson) -> bool:
        return True

    def prepare_case(
        self, step: Lesson, volume: Volume, old: Predictor | None
    ) -> Mapping[str, Tensor]:
        mark = {"mean_hu": torch.tensor(float(volume.image.mean()))}
        if old is None:
            return mark
        return {**mark, "pseudo": pseudo_labels(old, volume, hard=True)}

    def prepare(
        self, step: Lesson, per_case: Mapping[str, Mapping[str, Tensor]], memory: Memory
    ) -> None:
        memory["means"] = [float(per_case[c]["mean_hu"]) for c in step.cases]

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        if len(history) == 2:
            memory["validation"] = [v for r in history for v in r.validation]
            return None
        return [Phase(validations=1), Phase(name="more", epochs=1, validations=1)][len(history)]

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        assert new.logits.shape[1] == 1 + len(batch.structures)
        terms = {"size": (new.logits**2).mean()}
        if old is not None:
            assert old.logits.shape[1] == 1 + len(batch.old_index)
            terms["keep"] = ((new.logits[:, : old.logits.shape[1]] - old.logits) ** 2).mean()
        return terms

    def finish(self, step: Lesson, model: nn.Module, draws: DrawBatches, memory: Memory) -> None:
        memory["drawn"] = [float(b.image.sum()) for b in draws(3)]

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        # everything everywhere, so that only the ranges can empty a voxel
        return torch.softmax(logits, dim=1)[:, 1:] * 0 + 1

    def axial_ranges(
        self,
        image_hu: NDArray[np.int16],
        spacing_mm: tuple[float, float, float],
        structures: tuple[str, ...],
        memory: Memory,
    ) -> Mapping[str, tuple[int, int]]:
        assert spacing_mm == pytest.approx((12.0, 12.0, 12.0))
        return {"liver": (1, image_hu.shape[2] // 2)}


class Stop(Exception):
    pass


def stop(event: Mapping[str, Any]) -> None:
    if event["event"] == "update" and event["step"] == 2:
        raise Stop


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    load = registry.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            registry, "load", lambda kind, name: Softmax if name == "softmax" else load(kind, name)
        )
        yield


@pytest.fixture(scope="module")
def stopped(cache_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """A run that was stopped at the first update of step 2."""
    settings = RunSettings(
        bench="tumor_ext",
        strategy="softmax",
        profile="smoke",
        out=tmp_path_factory.mktemp("stopped"),
        cache=cache_root,
    )
    with pytest.raises(Stop):
        run_course(settings, stop)
    return settings


def copied(settings: RunSettings, out: Path) -> RunSettings:
    shutil.copytree(settings.out, out)
    return replace(settings, out=out)


def change_step_1(settings: RunSettings, **change: Any) -> None:
    (path,) = settings.out.glob("tumor_ext/*/*/step1.pt")
    content = {**checkpoint.load(path), **change}
    del content["schema"]
    checkpoint.save(path, content)


def test_a_softmax_method_runs_stops_and_goes_on(stopped: RunSettings, tmp_path: Path) -> None:
    assert len(list(stopped.out.glob("_shared/*/pseudo/step2/*.pt"))) == 3
    first = copied(stopped, tmp_path / "whole")
    shutil.rmtree(first.out / "tumor_ext")
    for left in first.out.glob("_shared/*/pseudo"):
        shutil.rmtree(left)
    whole = run_course(first)
    again = run_course(copied(stopped, tmp_path / "again"))
    assert (whole / "scores.csv").read_bytes() == (again / "scores.csv").read_bytes()
    a, b = (checkpoint.load(f / "step2.pt") for f in (whole, again))
    assert a["memory"] == b["memory"]  # the prepared tensors survived the stop
    assert len(a["memory"]["means"]) == 3
    assert len(a["memory"]["drawn"]) == 3
    assert len(a["memory"]["validation"]) == 2
    assert a["model"]["head.weight.background"].shape == (16, 1, 1, 1)

    ledger = json.loads((whole / "run.json").read_text())["ledger"]
    assert ledger["1"]["validation"] == ["btcv/13"]
    assert ledger["2"]["validation"] == ["lits/16"]
    names = [json.loads(x)["event"] for x in (whole / "events.jsonl").read_text().splitlines()]
    assert names.count("validation") == 4

    kept = read_prediction(next((whole / "predictions" / "step2").glob("*.npz")))
    liver = kept.bits >> kept.structures.index("liver") & 1
    half = liver.shape[2] // 2
    assert liver[:, :, 1:half].all()
    assert not liver[:, :, :1].any()
    assert not liver[:, :, half:].any()


def test_prepared_work_of_another_model_is_refused(stopped: RunSettings, tmp_path: Path) -> None:
    settings = copied(stopped, tmp_path / "out")
    (path,) = settings.out.glob("tumor_ext/*/*/step1.pt")
    model = checkpoint.load(path)["model"]
    change_step_1(settings, model={**model, "head.bias.liver": model["head.bias.liver"] + 1})
    with pytest.raises(StoreError, match="another model") as err:
        run_course(settings)
    assert "delete" in str(err.value)


def test_a_checkpoint_of_another_step_is_refused(stopped: RunSettings, tmp_path: Path) -> None:
    settings = copied(stopped, tmp_path / "out")
    change_step_1(settings, step=2)
    with pytest.raises(StoreError, match="a checkpoint of another step") as err:
        run_course(settings)
    assert "step 2: " in str(err.value)


# The three ways to declare: the default, class attributes (clbench 0.1.0), and `declares`.


@dataclass(frozen=True, kw_only=True)
class Attributes(Universal):
    """Written against clbench 0.1.0: a fact as attribute, one as property, one as option."""

    past: ClassVar[Any] = "images"
    keeps_old_logits: bool = False

    @property
    def penalties(self) -> tuple[str, ...]:
        return ("kd",) if self.keeps_old_logits else ()


@dataclass(frozen=True, kw_only=True)
class Extends(Attributes):
    """Overrides `declares` below a class of attributes."""

    def declares(self) -> Declaration:
        return replace(super().declares(), resumes="step")


class Mixin:
    """Is no strategy, and stands before one."""

    resumes = "step"


class Mixed(Mixin, Mib):
    """An attribute of a mix-in, over options of a method that overrides `declares`."""


def test_what_a_plain_method_promises_follows_from_its_options() -> None:
    assert Strategy().declaration == Declaration()
    assert Finetune().declaration == Declaration(unlabelled="background")
    assert Finetune(unlabelled="ignore").declaration == Declaration()
    both = [Mib(splits_background=b).declaration.keeps_old_logits for b in (True, False)]
    assert both == [False, True]


def test_class_attributes_declare_as_in_0_1_0() -> None:
    declared = Attributes(unlabelled="background").declaration
    assert declared == Declaration(past="images", unlabelled="background", keeps_old_logits=False)
    assert Attributes(keeps_old_logits=True).declaration.penalties == ("kd",)
    assert Mixed().declaration == replace(Mib().declaration, resumes="step")


def test_the_nearest_class_decides() -> None:
    """`Extends` asks its parents, so `Universal`'s promise stands between; attributes reach it."""
    assert Universal().declaration.past == "predictions"
    declared = Extends(keeps_old_logits=True).declaration
    assert declared == Declaration(past="predictions", penalties=("kd",), resumes="step")


class Raised(Mib):
    version: ClassVar[int] = 3


class RaisedInTraining(Mib):
    version: ClassVar[int] = 3
    serves_from: ClassVar[int | None] = 2


class Inherits(RaisedInTraining):
    pass


@pytest.mark.parametrize(
    ("kind", "served"),
    [(Finetune, [1]), (Mib, [1, 2]), (Raised, [3]), (RaisedInTraining, [2, 3]), (Inherits, [2, 3])],
)
def test_a_version_that_changed_training_alone_serves_older_models(
    kind: type[Strategy], served: list[int]
) -> None:
    """Whoever raises a version has to say so anew: what a parent says is of the parent's versions."""
    assert [v for v in range(5) if kind.serves(v)] == served
