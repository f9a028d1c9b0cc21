"""Teaching a step: what is refused before anything is trained."""

from __future__ import annotations

import pytest
import torch

from clbench.errors import TrainingError
from clbench.run.plan import load_strategy
from clbench.run.teach import _refuse_nothing_to_train
from clbench.strategy.contract import Lesson


@pytest.mark.parametrize(
    "name", ["frozen", "frozen_softmax", "lora", "independent", "decoder_growth"]
)
def test_a_strategy_of_new_parts_alone_is_refused_where_nothing_is_new(name: str) -> None:
    lesson = Lesson(number=2, learns=(), again=("liver",), structures=("liver",), source="lits")
    strategy = load_strategy(name, {})
    with pytest.raises(TrainingError, match="nothing to train"):
        _refuse_nothing_to_train(strategy, torch.nn.Identity(), lesson, {})
    assert lesson.old == lesson.taught == ("liver",)
    _refuse_nothing_to_train(load_strategy("finetune", {}), torch.nn.Linear(1, 1), lesson, {})
