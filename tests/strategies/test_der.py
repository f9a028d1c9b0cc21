"""DER and DER++: golden numbers, the reservoir, and stored logits that follow their crop."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor
from torch.nn import functional

from clbench.errors import SettingError
from clbench.nets.output import Output
from clbench.strategies.composition.compose import composed
from clbench.strategies.finetune import Finetune
from clbench.strategies.logit_replay.der import (
    LOGITS,
    Der,
    StoredLogits,
    reservoir_place,
    stored,
)
from clbench.strategies.logit_replay.derpp import Derpp
from clbench.strategy.contract import Batch, Kit, Lesson, Memory, Strategy
from clbench.strategy.distillation import stored_logits_mse
from clbench.testing.fixtures import same
from clbench.testing.harness import StrategyHarness

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
NAMES = ("liver", "spleen", "stomach")


# --------------------------------------------------------------------------------- golden numbers


def test_the_reservoir_is_the_originals() -> None:
    case = GOLDEN["der_reservoir"]
    kept: list[int] = []
    for number, draw in enumerate(case["draws"]):
        place = reservoir_place(number, case["size"], draw)
        if place is not None:
            kept[place : place + 1] = [number]
    assert kept == case["buffer_item_numbers"]


@pytest.mark.parametrize("name", ["der_update", "derpp_update"])
def test_an_update_is_the_originals(name: str) -> None:
    case = GOLDEN[name]
    weight = torch.tensor(case["weight"], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
    bias = torch.tensor(case["bias"], dtype=torch.float64)
    weight.requires_grad_(), bias.requires_grad_()

    def logits(images: Any) -> Tensor:
        return functional.conv3d(torch.tensor(images, dtype=torch.float64), weight, bias)

    kept = torch.tensor(case["buffer_logits"])
    replayed = logits(case["buffer_images"])
    mse = stored_logits_mse(replayed, list(kept), torch.ones(2, 1, 2, 2, 2, dtype=torch.bool))
    stream = functional.cross_entropy(
        logits(case["stream_image"]), torch.tensor(case["stream_labels"])
    )
    total = stream + case["alpha"] * mse
    if name == "derpp_update":
        labels = torch.tensor(case["buffer_labels"])
        total = total + case["beta"] * functional.cross_entropy(replayed, labels)
    assert mse.item() == pytest.approx(case["logit_mse"], rel=1e-6)
    assert total.item() == pytest.approx(case["total"], rel=1e-6)
    total.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    wanted = torch.tensor(case["gradient_weight"], dtype=torch.float64)
    torch.testing.assert_close(weight.grad.reshape(3, 1), wanted, rtol=1e-5, atol=1e-6)
    wanted = torch.tensor(case["gradient_bias"], dtype=torch.float64)
    torch.testing.assert_close(bias.grad, wanted, rtol=1e-5, atol=1e-6)


def replayed_crop() -> tuple[Batch, Output, list[Tensor]]:
    """The golden crop of a case stored after two structures, met when three are learned."""
    case = GOLDEN["der_segmentation_port"]
    batch = Batch(
        image=torch.zeros(1, 1, 2, 2, 2),
        label=torch.tensor(case["label"], dtype=torch.uint8),
        pseudo=None,
        structures=NAMES,
        new=(False, False, True),
        cases=("1/a",),
    )
    new = Output(logits=torch.tensor(case["logits"]), features={})
    return batch, new, [*torch.tensor(case["stored_logits"])]


def test_the_port_to_sigmoids_and_partial_labels() -> None:
    case, (batch, new, logits) = GOLDEN["der_segmentation_port"], replayed_crop()
    der = Der().stored_logits_loss(batch, new, logits).item()
    assert der == pytest.approx(case["der_loss_alpha_0_3"], rel=1e-6)
    halves = [z.half() for z in logits]
    der = Der(alpha=1.0).stored_logits_loss(batch, new, halves).item()
    assert der == pytest.approx(case["stored_as_float16_logit_mse"], rel=1e-6)
    both = Derpp().replayed()
    assert list(both) == ["der", "replay"]
    total = sum(of(batch, new, logits).item() for of in both.values())
    assert total == pytest.approx(case["derpp_loss_alpha_0_1_beta_0_5"], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"annotated_old": "pseudo"}, {"legacy_unannotated_background": "true"}]
)
@pytest.mark.parametrize("name", ["softmax+derpp", "softmax+plop+derpp"])
def test_stored_labels_count_as_they_were_stored(name: str, options: dict[str, str]) -> None:
    """To the step that draws them all their structures are old, and its own are not annotated."""
    batch, new, logits = replayed_crop()
    assert bool((batch.label[:, 2] == 255).all())
    background = torch.zeros_like(new.logits[:, :1])
    softmax = replace(new, logits=torch.cat([background, new.logits], dim=1))
    made: list[Any] = [composed(name, o) for o in (options, {})]
    found, wanted = (m.replayed()["replay"](batch, softmax, logits).item() for m in made)
    assert found == wanted > 0


def test_structures_learned_later_get_no_gradient() -> None:
    batch, new, logits = replayed_crop()
    free = replace(new, logits=new.logits.clone().requires_grad_())
    for of in Derpp().replayed().values():
        (grad,) = torch.autograd.grad(of(batch, free, logits), free.logits)
        assert grad[:, :2].abs().max() > 0
        assert (grad[:, 2] == 0).all()


def test_centred_logits_ignore_a_shift_of_all_channels() -> None:
    batch, new, logits = replayed_crop()
    shifted = [z + 5 for z in logits]
    plain, centred = Der(), Der(centred=True)
    assert plain.stored_logits_loss(batch, new, shifted) > plain.stored_logits_loss(
        batch, new, logits
    )
    assert centred.stored_logits_loss(batch, new, shifted).item() == pytest.approx(
        centred.stored_logits_loss(batch, new, logits).item(), rel=1e-5
    )


# ------------------------------------------------------------------------------ what is stored


def lesson(number: int, cases: int = 5) -> Lesson:
    names = tuple(f"c{i}" for i in range(cases))
    return Lesson(
        number=number,
        learns=NAMES[number - 1 : number],
        structures=NAMES[:number],
        source="btcv",
        past=dict.fromkeys(range(1, number), names),
    )


def kit(seed: int) -> Kit:
    return Kit(backbone=torch.nn.Identity, encode=lambda names: torch.zeros(1), seed=seed)


def test_cases_are_dropped_with_their_logits_and_never_come_back() -> None:
    memory: Memory = {}
    method = Der(mem_size=3)
    first = method.store_cases(lesson(2), kit(0), memory)
    assert sorted(first) == sorted(stored(memory))
    assert len(first) == 3
    made = {f"1/{case}": {"logits": torch.zeros(1)} for _, case in first}
    method.prepare(lesson(2), made, memory)
    second = method.store_cases(lesson(3), kit(0), memory)
    kept = stored(memory)
    assert len(kept) == 3
    assert {key for key in kept if key[0] == 1} < set(first)
    assert sorted(second) == sorted(key for key in kept if key[0] == 2)
    names = sorted(name for name in memory if name.startswith(LOGITS))
    assert names == sorted(f"{LOGITS}1/{case}" for step, case in kept if step == 1)
    assert memory["der_offered"] == 10
    assert method.extra_cases(lesson(3), memory) == dict.fromkeys(kept, 0.0)


def test_seeds_store_other_cases_and_repeat_theirs() -> None:
    memories: list[Memory] = [{}, {}, {}]
    for seed, memory in zip((0, 0, 1), memories, strict=True):
        Der().store_cases(lesson(2, cases=40), kit(seed), memory)
    assert memories[0] == memories[1] != memories[2]


def test_nothing_of_a_patient_leaves_with_a_published_model() -> None:
    memory: Memory = {"thresholds": torch.zeros(2)}
    method = Der()
    cases = method.store_cases(lesson(2), kit(0), memory)
    made = {f"1/{case}": {"logits": torch.zeros(1)} for _, case in cases}
    method.prepare(lesson(2), made, memory)
    assert len(memory) > 3
    assert method.published(memory).keys() == {"thresholds"}


@pytest.mark.parametrize("setting", [{"mem_size": 0}, {"batch_size_mem": 0}])
def test_a_memory_of_no_case_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=f"strategy.{next(iter(setting))}"):
        Der(**setting)  # type: ignore[arg-type]  # numbers


def test_the_method_below_is_told_of_its_own_cases_alone() -> None:
    told: list[list[str]] = []

    @dataclass(frozen=True, kw_only=True)
    class Counts(Finetune):
        def prepare(self, step: Lesson, per_case: Any, memory: Memory) -> None:
            told.append(list(per_case))

    @dataclass(frozen=True, kw_only=True)
    class Both(StoredLogits, Counts):
        pass

    memory: Memory = {}
    (key,) = Both(mem_size=1).store_cases(lesson(2), kit(0), memory)
    logits = torch.zeros(1)
    made = {"a": {"entropy": torch.ones(1)}, f"1/{key[1]}": {"logits": logits}}
    Both(mem_size=1).prepare(lesson(2), made, memory)
    assert told == [["a"]]
    assert memory[f"{LOGITS}1/{key[1]}"] is logits


def harness(strategy: Strategy, tmp_path: Path, cache_root: Path) -> StrategyHarness:
    return StrategyHarness(strategy, name="der", folder=tmp_path, cache=cache_root)


def test_a_step_stores_whole_cases_and_replays_crops_of_them(
    tmp_path: Path, cache_root: Path
) -> None:
    """Without weights it is fine-tuning, to the bit; logits are those of the old model."""
    one = harness(Der(), tmp_path / "der", cache_root)
    state = one.start(2)
    step, case = stored(state.memory)[0]
    volume = one.plan.catalog.open(step, case, "pseudo")
    logits = state.memory[f"{LOGITS}{step}/{case}"]
    assert isinstance(logits, Tensor)
    assert logits.dtype == torch.float16
    assert logits.shape == (3, *volume.image.shape)
    assert state.teacher is not None
    old = one.predictor(state, state.teacher, state.lesson.old)
    whole = torch.cat([z for _, _, z in old.logits(volume)], dim=1)
    torch.testing.assert_close(logits.float(), whole, rtol=1e-3, atol=1e-3)
    batch = one.crops(state)
    plain = harness(Finetune(), tmp_path / "finetune", cache_root)
    wanted = plain.terms(plain.start(2), batch)
    terms = Derpp().replayed().keys() | wanted.keys()
    one.strategy = state.strategy = Derpp()
    assert one.terms(state, batch).keys() == terms
    one.strategy = state.strategy = Derpp(alpha=0.0, beta=0.0)
    assert same(one.terms(state, batch), wanted)


@pytest.mark.parametrize("part", ["der", "derpp"])
def test_plop_is_taught_beside_stored_cases(part: str, tmp_path: Path, cache_root: Path) -> None:
    """Both prepare cases before a step: one its new ones, one those it stores."""
    one = harness(composed(f"softmax+plop+{part}", {}), tmp_path, cache_root)
    terms = one.terms(state := one.start(2), one.crops(state))
    assert {"pod", "der"} <= terms.keys()
    assert {key.partition("/")[0] for key in state.memory} >= {"plop_thresholds", "der_logits"}
