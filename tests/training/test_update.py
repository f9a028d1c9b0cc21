"""An update in shards: on several processes, one after the other, or both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from divided_updates import NAMES, differences
from torch import Tensor, nn

from clbench.errors import SettingError, TrainingError
from clbench.nets.output import Output
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import Batch, Memory, Session
from clbench.strategy.sharding import denominator
from clbench.training.ranks import Ranks
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
