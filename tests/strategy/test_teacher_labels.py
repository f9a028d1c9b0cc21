"""What the tiny course tells of options: labels on line, pruning, copies of averages, old labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.nets.backbones import small_unet
from clbench.nets.output import Output
from clbench.strategies.decoder_growth.method import DecoderGrowth
from clbench.strategies.lwf import Lwf
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Batch, Kit, Lesson, Memory, Phase
from clbench.testing.strategy_check import check_strategy

RULE = "unknown voxels are treated as declared"


@pytest.fixture(scope="session")
def kit_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny phantom, made once."""
    return tmp_path_factory.mktemp("kit_cache")


class Stubborn(Universal):
    """Labels on line, and calls what no one annotated background all the same."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        terms = super().losses(batch, new, old, memory)
        outside = (batch.label == 255) & (batch.label != 255).any(1, keepdim=True)
        return {**terms, "leak": (new.logits.sigmoid() * outside).mean()}


def test_a_teacher_that_labels_the_crops_is_no_background(kit_cache: Path) -> None:
    report = check_strategy(Universal(pseudo="soft", soft_limit_mib=0), cache=kit_cache)
    assert report.ok, report
    assert {"the teacher is used", RULE} <= {f.rule for f in report.findings if f.status == "pass"}
    broken = check_strategy(Stubborn(pseudo="soft", soft_limit_mib=0), only=[RULE], cache=kit_cache)
    assert broken.failed == (RULE,), broken


def test_soft_labels_are_stored_up_to_a_size() -> None:
    step = Lesson(number=2, learns=("b",), structures=("a", "b"), source="x", voxels=2**20)
    for limit, on_line in ((0, True), (1, False)):
        made = Universal(pseudo="soft", soft_limit_mib=limit)
        assert made.takes_teacher(step) is on_line
        assert made.prepares(step) is not on_line
    assert not Universal(soft_limit_mib=0).takes_teacher(step)  # hard labels need the whole volume


def test_old_structures_that_no_term_looks_at_are_background(kit_cache: Path) -> None:
    report = check_strategy(Lwf(annotated_old="pseudo"), only=[RULE], cache=kit_cache)
    assert report.ok, report


def test_pruning_can_be_judged_on_the_tiny_course(kit_cache: Path) -> None:
    report = check_strategy(
        DecoderGrowth(prune=True, attempts=1), only=["a step can be taught"], cache=kit_cache
    )
    assert report.ok, report


def test_a_copied_decoder_starts_from_the_average_that_was_served() -> None:
    def lesson(number: int) -> Lesson:
        names = ("liver", "spleen", "stomach")
        return Lesson(
            number=number, learns=names[number - 1 : number], structures=names[:number], source="x"
        )

    kit = Kit(
        backbone=lambda: small_unet(8), encode=lambda names: torch.zeros(len(names), 512), seed=0
    )
    made, memory = DecoderGrowth(start="copy", ema=0.9), Memory()
    model: Any = made.build(kit, lesson(1))
    made.grow(model, kit, lesson(2))
    made.enter_phase(Phase(), model, memory)
    for _ in range(3):
        with torch.no_grad():
            for p in model.decoders[1].parameters():
                p.add_(0.1)
        made.after_update(model, memory)
    image = torch.rand(1, 1, 16, 16, 16)
    live = {n: w.clone() for n, w in model.decoders[1].state_dict().items()}
    with torch.no_grad():
        served = made.serve(model, memory).eval()(image).logits
        made.finish(lesson(2), model, None, memory)
        assert not [k for k in memory if k.startswith("ema")]
        assert torch.equal(made.serve(model, memory).eval()(image).logits, served)
    made.grow(model, kit, lesson(3))
    old, new = (model.decoders[i].state_dict() for i in (1, 2))
    assert all(torch.equal(new[n], w) for n, w in old.items())
    assert any(not torch.equal(new[n], w) for n, w in live.items())
