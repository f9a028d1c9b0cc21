"""An update in shards: on several processes, one after the other, or both."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_updates import NAMES, differences, in_two_processes
from torch import Tensor, nn

from clbench import signals
from clbench.errors import SettingError, TrainingError
from clbench.nets.output import Output
from clbench.run import teach as step_teaching
from clbench.signals import Stopped
from clbench.spec.settings import TrainSettings
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Batch, Memory, Session
from clbench.strategy.sharding import denominator
from clbench.testing.harness import StrategyHarness
from clbench.training.launch import Place
from clbench.training.loop import StepTraining, teach
from clbench.training.ranks import Ranks, join
from clbench.training.resume import StepCheckpointer
from clbench.training.update import Division, UpdateWork, divide, refuse_batch_statistics


def test_two_processes_and_accumulated_batches_equal_one_large_batch(
    tmp_path: Path, cache_root: Path
) -> None:
    """Every strategy, with SGD; the crops know unequally much, so that counts of a part differ."""
    found = differences(NAMES, tmp_path, cache_root)
    assert set(found) == set(NAMES)
    for name, apart in found.items():
        assert apart["between processes"] == 0.0, name
        assert max(apart.values()) < 1e-6, (name, apart)


def test_a_stop_is_agreed_upon_and_resumed_to_the_bit(tmp_path: Path, cache_root: Path) -> None:
    """One of two processes is asked to stop: both do after the same update, and go on to the bit."""
    harness = StrategyHarness(Finetune(), name="finetune", folder=tmp_path, cache=cache_root)
    plan = harness.plan
    train = replace(plan.profile.train, batch=2, iterations=3)
    material = replace(harness.material(harness.start(1)), patch_vox=(8, 8, 8))

    def work(rank: int) -> None:
        here = Place(rank=rank, local=rank, size=2, url=f"file://{tmp_path}/meeting")
        ranks = join(here, plan.device)

        def attempt(path: Path, ask_at: int | None) -> tuple[dict[str, Tensor], list[int]]:
            state, done = harness.start(1), list[int]()

            def watch(event: dict[str, Any]) -> None:
                done.append(event["iteration"])
                if event["iteration"] == ask_at and rank == 1:
                    signals.ask("SIGTERM")

            checkpointer = StepCheckpointer(path, every_s=1e9, ranks=ranks)
            step = StepTraining(
                strategy=Finetune(), state=state, teacher=None, lesson=state.lesson,
                material=material, train=train, seed=0, device=plan.device, ranks=ranks,
                watch=watch, checkpointer=checkpointer,
            )  # fmt: skip
            with signals.listening(), suppress(Stopped):
                teach(step)
            return state.model.state_dict(), done

        calm, _ = attempt(tmp_path / "calm.pt", None)
        _, before = attempt(tmp_path / "torn.pt", 0)
        ranks.gather(None)
        torn, after = attempt(tmp_path / "torn.pt", None)
        assert (before, after) == ([0, 1], [2])  # asked after update 0, agreed in update 1
        assert all(torch.equal(calm[name], torn[name]) for name in calm)

    in_two_processes(work)


class Several(Ranks):
    """One of several processes that are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("batch", "accumulate", "size"), [(2, 3, 1), (2, 2, 2), (6, 1, 3)])
def test_no_crop_is_lost_or_doubled(batch: int, accumulate: int, size: int) -> None:
    train = TrainSettings(batch=batch, accumulate=accumulate)
    parts = [divide(train, Several(rank, size)) for rank in range(size)]
    crops = [i for part in parts for i in part.own(5)]
    assert crops == list(range(5 * train.crops, 6 * train.crops))
    assert all(len(part.own(5)) <= batch * part.passes for part in parts)


def test_crops_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(SettingError, match="cannot be divided") as err:
        divide(TrainSettings(batch=2), Several(0, 3))
    assert "train.accumulate=3" in str(err.value)


def test_batch_statistics_are_refused_in_shards_alone() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    refuse_batch_statistics(model, Division(crops=2, passes=1, ranks=Ranks()))
    with pytest.raises(TrainingError, match="normalizes over the batch"):
        refuse_batch_statistics(model, Division(crops=2, passes=2, ranks=Ranks()))
    refuse_batch_statistics(model.eval(), Division(crops=2, passes=2, ranks=Ranks()))


class ByItsAnswer(Session):
    """Divides by how many voxels the model answers for, which no one knows ahead."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.context.model(batch.image).logits
        return {"loss": logits.square().sum() / denominator((logits > 0).sum())}


class OneLayer(nn.Conv3d):
    def forward(self, image: Tensor) -> Output:
        return Output(logits=super().forward(image))


def test_counts_of_the_answer_are_noticed_where_they_were_taken_ahead() -> None:
    model = OneLayer(1, 1, 1)
    session = ByItsAnswer.__new__(ByItsAnswer)
    session.context = type("Context", (), {"model": model, "memory": Memory()})()
    work = UpdateWork(
        session=session, division=Division(crops=2, passes=2, ranks=Ranks()), whole=False,
        trained=list(model.parameters()), autocast=torch.enable_grad, scaled=lambda loss: loss,
    )  # fmt: skip
    batch = Batch(
        image=torch.rand(2, 1, 2, 2, 2) + 1, label=torch.zeros(2, 1, 2, 2, 2, dtype=torch.uint8),
        pseudo=None, structures=("liver",), new=(True,), cases=("1/a", "1/b"),
    )  # fmt: skip
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.0)  # type: ignore[union-attr]
    of_update = work.gradients(batch, lambda terms: terms["loss"], lambda *place: None)
    assert of_update.misses is not None
    assert float(of_update.misses) > 0
    assert "forward" not in vars(model)


class NotAlways(Session):
    """Asks for no count where its own crops hold nothing."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.context.model(batch.image).logits.square().sum()
        return {"loss": loss / denominator(batch.label.sum()) if batch.label.any() else loss}


def one_layer_work(session_type: type[Session], passes: int, ranks: Ranks) -> UpdateWork:
    model = OneLayer(1, 1, 1)
    session = session_type.__new__(session_type)
    session.context = type("Context", (), {"model": model, "memory": Memory()})()
    return UpdateWork(
        session=session, division=Division(crops=2 * passes, passes=passes, ranks=ranks),
        whole=False, trained=list(model.parameters()), autocast=torch.enable_grad,
        scaled=lambda loss: loss,
    )  # fmt: skip


@pytest.mark.parametrize("passes", [1, 2])
def test_counts_that_one_process_does_not_ask_for_are_named(tmp_path: Path, passes: int) -> None:
    def work(rank: int) -> None:
        here = Place(rank=rank, local=rank, size=2, url=f"file://{tmp_path}/meeting")
        of = one_layer_work(NotAlways, passes, join(here, torch.device("cpu")))
        batch = Batch(
            image=torch.rand(passes, 1, 2, 2, 2),
            label=torch.full((passes, 1, 2, 2, 2), rank, dtype=torch.uint8),
            pseudo=None, structures=("liver",), new=(True,), cases=("1/a",) * passes,
        )  # fmt: skip
        # the one that asks is told, at the latest, that the other has ended
        told = "different number" if rank == 0 or passes == 2 else "different number|has ended"
        with pytest.raises(TrainingError, match=told):
            of.gradients(batch, lambda terms: terms["loss"], lambda *place: None)

    in_two_processes(work)


class Drawn(Session):
    """Counts what it has drawn."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        chosen = torch.rand(batch.label.shape) < 0.5
        logits = self.context.model(batch.image).logits
        return {"loss": logits[chosen].square().sum() / denominator(chosen.sum())}


def test_a_loss_that_draws_what_it_counts_draws_the_same_ahead() -> None:
    work = one_layer_work(Drawn, 2, Ranks())
    batch = Batch(
        image=torch.rand(2, 1, 4, 4, 4), label=torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8),
        pseudo=None, structures=("liver",), new=(True,), cases=("1/a", "1/b"),
    )  # fmt: skip

    def reseed(name: str, number: int) -> None:
        torch.manual_seed(number)

    of_update = work.gradients(batch, lambda terms: terms["loss"], reseed)
    assert of_update.misses is not None
    assert float(of_update.misses) == 0


def test_validation_cases_are_divided_and_decide_alike(tmp_path: Path, cache_root: Path) -> None:
    """The mean over two processes' cases has the bits of one process's; both enter every case."""
    harness = StrategyHarness(Finetune(), name="finetune", folder=tmp_path, cache=cache_root)
    state = harness.start(1)
    cases = (*state.lesson.cases, *state.lesson.validation)
    assert len(cases) % 2 == 1  # one process has more
    state.lesson = replace(state.lesson, validation=cases)
    harness.plan.catalog.past = "images"  # training cases may be looked at, too
    harness.plan.catalog.ledger.clear()
    validate = step_teaching._validate(harness.plan, state)
    assert validate is not None
    alone, entered = validate(state.model), harness.plan.catalog.opened()
    assert 0 < alone < 1

    def work(rank: int) -> None:
        here = Place(rank=rank, local=rank, size=2, url=f"file://{tmp_path}/meeting")
        plan = harness.plan
        plan.ranks, asked = join(here, plan.device), list[str]()
        plan.catalog.ledger.clear()
        opens = plan.catalog.open

        def noting(step: int, case: str, purpose: Any) -> Any:
            asked.append(case)
            return opens(step, case, purpose)

        plan.catalog.open = noting  # type: ignore[method-assign]
        together = step_teaching._validate(plan, state)
        assert together is not None
        assert together(state.model) == alone
        assert asked == list(cases[rank::2])
        assert plan.catalog.opened() == entered

    in_two_processes(work)
