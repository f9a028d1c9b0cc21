"""Teaching a step: what is refused before anything is trained."""

from __future__ import annotations

import pytest
import torch

from clbench.errors import TrainingError
from clbench.nets.backbones import small_unet
from clbench.run.plan import load_strategy
from clbench.run.teach import _refuse_nothing_to_train
from clbench.strategy.contract import Kit, Lesson


@pytest.mark.parametrize(
    "name", ["frozen", "frozen_softmax", "lora", "independent", "decoder_growth"]
)
def test_a_strategy_of_new_parts_alone_is_refused_where_nothing_is_new(name: str) -> None:
    first = Lesson(number=1, learns=("liver",), structures=("liver",), source="btcv")
    lesson = Lesson(number=2, learns=(), again=("liver",), structures=("liver",), source="lits")
    assert lesson.old == lesson.taught == ("liver",)
    strategy = load_strategy(name, {})
    kit = Kit(backbone=lambda: small_unet(8), encode=lambda of: torch.zeros(len(of), 512), seed=0)
    model = strategy.first_step().build(kit, first)
    assert len(list(model.parameters())) > 10
    with pytest.raises(TrainingError, match="nothing to train"):
        _refuse_nothing_to_train(strategy, model, lesson, {})
    _refuse_nothing_to_train(load_strategy("finetune", {}), model, lesson, {})
