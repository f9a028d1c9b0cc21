"""Decoder growth and the Universal Model's variants: sizes, what growing leaves alone, pruning."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from locations import GOLDEN_FILES
from rounding import assert_same_to_rounding, assert_untouched, weights_of
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.backbones import small_unet, swin_unetr
from clbench.nets.growing_decoders import GrowingDecoders, one_winner
from clbench.nets.heads import SharedHead, UniversalHead
from clbench.nets.output import count_parameters
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec import registry
from clbench.store import checkpoint, run_folder
from clbench.strategies.decoder_growth import axial_range, pruning
from clbench.strategies.decoder_growth.method import DecoderGrowth
from clbench.strategies.decoder_growth.pruning import (
    SPARSITIES,
    apply_masks,
    magnitude_masks,
    prunable,
    steps_of,
)
from clbench.strategies.universal_variants.universal_onehot import UniversalOnehot
from clbench.strategies.universal_variants.universal_v1 import UniversalV1
from clbench.strategy.contract import Batch, Kit, Lesson, Memory, Phase, PhaseResult
from clbench.training.loop import freeze

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "growth.json").read_text())
PARTS = (("liver", "spleen"), ("stomach",), ("aorta", "pancreas", "liver_tumor"))


def lesson(number: int) -> Lesson:
    return Lesson(
        number=number,
        learns=PARTS[number - 1],
        structures=tuple(s for p in PARTS[:number] for s in p),
        source="x",
    )


def kit(prior: float | None = 0.01) -> Kit:
    def encode(names: Any) -> Tensor:
        rows = [torch.full((512,), float(len(n))) for n in names]
        return torch.stack(rows)

    return Kit(backbone=lambda: small_unet(8), encode=encode, seed=0, prior=prior)


def sizes(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -------------------------------------------------------------------------------------- sizes


def test_controllers_have_the_published_sizes() -> None:
    built = UniversalHead(48, 768, text_dim=0, hidden=128)
    built.add("liver", torch.zeros(0))
    assert sizes(built.controllers["liver"]) == 52_633
    clean = UniversalHead(48, 768)
    clean.add("liver", torch.zeros(512))
    assert sizes(clean.controllers["liver"]) == 472_217
    first = SharedHead(48, 768)
    assert (sizes(first.controller), sizes(first.project)) == (78_489, 131_328)


def test_a_new_decoder_of_swin_unetr_has_the_published_size() -> None:
    model = GrowingDecoders(swin_unetr(48), ("liver",), None)
    before = sizes(model)
    model.add(("stomach", "colon"), None)
    assert sizes(model) - before == 19_597_824 + 2 * (48 + 1)


# ------------------------------------------------------------------------------------ growing


@pytest.mark.parametrize(
    "made",
    [DecoderGrowth(), DecoderGrowth(start="copy"), UniversalV1(), UniversalOnehot(),
     UniversalOnehot(as_built=True)],
    ids=repr,
)  # fmt: skip
def test_growing_leaves_old_logits_alone(made: Any) -> None:
    image = torch.rand(1, 1, 16, 16, 16)
    model = made.build(kit(), lesson(1)).eval()
    with torch.no_grad():
        for number in (2, 3):
            before, weights = model(image).logits, weights_of(model)
            made.grow(model, kit(), lesson(number))
            after = model.eval()(image).logits
            assert after.shape[1] == len(lesson(number).structures)
            assert_untouched(model, weights)
            if isinstance(made, DecoderGrowth):  # every decoder keeps its shape: equal bits
                assert torch.equal(after[:, : before.shape[1]], before)
            else:
                assert_same_to_rounding(after[:, : before.shape[1]], before)


def test_text_alone_tells_structures_of_the_first_model_apart() -> None:
    made = UniversalV1()
    model = made.build(kit(), lesson(1))
    before = sizes(model)
    made.grow(model, kit(), lesson(2))
    assert sizes(model) == before
    logits = model.eval()(torch.rand(1, 1, 16, 16, 16)).logits
    assert not torch.allclose(logits[:, 0], logits[:, 2])


def test_onehot_vectors_are_one_hot_and_stay_when_the_course_goes_on() -> None:
    made = UniversalOnehot()
    rows = torch.cat([made.vectors(kit(), lesson(n)) for n in (1, 2, 3)])
    assert rows.shape == (6, 512)
    assert ((rows != 0).sum(1) == 1).all()
    assert len(set(rows.argmax(1).tolist())) == 6


def batch(number: int) -> Batch:
    torch.manual_seed(number)
    names = lesson(number).structures
    label = (torch.rand(1, len(names), 16, 16, 16) > 0.7).to(torch.uint8)
    return Batch(
        image=torch.rand(1, 1, 16, 16, 16), label=label, pseudo=None, structures=names,
        new=lesson(number).new_flags, cases=("1",),
    )  # fmt: skip


def train(made: DecoderGrowth, model: nn.Module, number: int, memory: Memory) -> None:
    groups = made.groups(model, lesson(number), memory)
    chosen = [p for g in groups for p in g.parameters]
    freeze(model, chosen)
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        b = batch(number)
        loss = torch.stack(list(made.losses(b, model(b.image), None, memory).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.after_update(model, memory)


def test_training_and_storing_leave_old_answers_alone(tmp_path: Path) -> None:
    made, memory = DecoderGrowth(ema=0.99), Memory()
    model = made.build(kit(), lesson(1))
    image = torch.rand(1, 1, 16, 16, 16)
    answers: dict[int, Tensor] = {}
    for number in (1, 2, 3):
        if number > 1:
            made.grow(model, kit(), lesson(number))
        made.enter_phase(Phase(), model, memory)
        train(made, model, number, memory)
        with torch.no_grad():
            answers[number] = made.serve(model, memory).eval()(image).logits
    for number, k in ((1, 2), (2, 3)):
        assert torch.equal(answers[3][:, :k], answers[number][:, :k])
    assert not torch.equal(answers[3], model.eval()(image).logits)  # the average is served

    checkpoint.save(tmp_path / "x.pt", {"model": model.state_dict(), "memory": memory})
    kept = checkpoint.load(tmp_path / "x.pt")
    again = made.build(kit(), lesson(1))
    for number in (2, 3):
        made.grow(again, kit(), lesson(number))
    again.load_state_dict(kept["model"])
    with torch.no_grad():
        assert torch.equal(made.serve(again, kept["memory"]).eval()(image).logits, answers[3])


def test_the_encoder_feels_nothing_after_step_1() -> None:
    made, memory = DecoderGrowth(), Memory()
    model: Any = made.build(kit(), lesson(1))
    made.grow(model, kit(), lesson(2))
    before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    train(made, model, 2, memory)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.backbone.named_parameters())
    assert not model.backbone.encoder.training


def test_a_new_output_layer_has_a_rate_of_its_own() -> None:
    made, memory = DecoderGrowth(classifier_lr=7.0), Memory()
    model: Any = made.build(kit(), lesson(1))
    for number in (1, 2):
        if number == 2:
            made.grow(model, kit(), lesson(2))
        rest, output = made.groups(model, lesson(number), memory)
        assert (rest.lr, output.lr) == (1.0, 7.0)
        assert [id(p) for p in output.parameters] == [id(p) for p in model.heads[-1].parameters()]


def test_the_encoder_of_step_1_rests_once_pruning_begins() -> None:
    made, memory = DecoderGrowth(prune=True), Memory()
    model: Any = made.build(kit(), lesson(1))
    made.enter_phase(Phase(), model, memory)
    taught = [p for group in made.groups(model, lesson(1), memory) for p in group.parameters]
    assert {id(p) for p in taught} == {id(p) for p in model.parameters()}
    made.enter_phase(Phase(name="prune 0.0"), model, memory)
    before = {n: p.clone() for n, p in model.backbone.named_parameters()}
    train(made, model, 1, memory)
    assert all(torch.equal(p, before[n]) for n, p in model.backbone.named_parameters())


def test_of_exclusive_structures_the_more_probable_has_the_voxel() -> None:
    p = torch.tensor([0.9, 0.8, 0.7]).view(1, 3, 1)  # liver, spleen, liver tumor
    found = one_winner(p, ("liver", "spleen", "liver_tumor")).flatten().tolist()
    assert found == pytest.approx([0.9, 0.5, 0.5])  # the spleen beats the tumor, the liver both
    found = one_winner(p, ("liver", "liver_tumor", "spleen")).flatten().tolist()
    assert found == pytest.approx([0.9, 0.8, 0.5])  # a tumor is liver, too


# ------------------------------------------------------------------------------------ pruning


def test_the_schedule_is_that_of_the_released_code() -> None:
    g = GOLDEN["clnet_prune_schedule"]
    assert list(SPARSITIES) == g["cumulative_percent"]
    assert steps_of(SPARSITIES) == pytest.approx(g["incremental"], abs=1e-9)


def test_the_smallest_weights_go_whatever_their_layer() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, affine=True), nn.Conv3d(2, 1, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.1, -4.0]).view(2, 1, 1, 1, 1))
        net[2].weight.copy_(torch.tensor([-0.2, 3.0]).view(1, 2, 1, 1, 1))
    masks = magnitude_masks(net, {}, 0.5)
    assert masks["0.weight"].flatten().tolist() == [False, True]
    assert masks["2.weight"].flatten().tolist() == [False, True]
    masks = magnitude_masks(net, masks, 0.5)  # half of what is left
    assert (int(masks["0.weight"].sum()), int(masks["2.weight"].sum())) == (1, 0)
    apply_masks(net, masks)
    every, left = count_parameters(net)
    assert every == 2 + 2 + 2 + 2 + 2 + 1
    assert left == every - 3 - 2  # three weights, and the two zero biases of the normalization


def result(name: str, *dice: float) -> PhaseResult:
    return PhaseResult(phase=Phase(name=name), validation=dice)


@pytest.mark.parametrize(
    ("history", "then"),
    [
        ([], "train"),
        ([result("train", 0.7, 0.9)], "prune 0.0"),
        ([result("train", 0.7, 0.9), result("prune 0.0", 0.79)], "prune 1.0"),  # within 2 %
        ([result("train", 0.7, 0.9), result("prune 0.0", 0.78)], "prune 0.1"),
        ([result("train", 0.8), result("prune 3.1", 0.1)], "recover, rolled back"),
        ([result("train", 0.8), result("prune 14.0", 0.9)], "recover"),
        ([result("train", 0.8), result("recover")], None),
        ([result("train", 0.8), result("prune 0.0", math.nan)], "prune 0.1"),
    ],
)
def test_the_next_prune_phase_follows_from_the_history(
    history: list[PhaseResult], then: str | None
) -> None:
    phase = pruning.next_prune_phase(history, tolerance=0.02, attempts=2)
    assert (None if phase is None else phase.name) == then


def test_pruning_needs_something_to_be_judged_by() -> None:
    with pytest.raises(TrainingError, match="cannot be judged") as err:
        pruning.next_prune_phase([result("train", math.nan)], tolerance=0.02, attempts=2)
    assert "validation" in str(err.value)


def sparsity(decoder: nn.Module) -> float:
    weights = torch.cat([w.detach().flatten() for w in prunable(decoder).values()])
    return 1 - weights.count_nonzero().item() / weights.numel()


def test_pruning_rewinds_survivors_and_can_be_taken_back() -> None:
    torch.manual_seed(0)
    decoder, memory = nn.Sequential(nn.Conv3d(4, 25, 1), nn.Conv3d(25, 4, 1)), Memory()
    head = nn.Linear(4, 2)
    outputs, newest = head.weight.detach().clone(), [decoder, head]
    pruning.enter_phase(Phase(), newest, memory)
    assert not pruning.pruning_has_begun(memory)
    pruning.enter_phase(Phase(name="prune 0.0"), newest, memory)
    assert pruning.pruning_has_begun(memory)
    assert sparsity(decoder) == pytest.approx(0.8)
    first = {n: w.detach().clone() for n, w in prunable(decoder).items()}
    with torch.no_grad():  # an epoch of retraining
        for w in [*decoder.parameters(), head.weight]:
            w.add_(1.0)
    pruning.apply_masks(decoder, pruning.current_masks(memory))
    assert sparsity(decoder) == pytest.approx(0.8)
    pruning.enter_phase(Phase(name="prune 0.1"), newest, memory)  # tried again
    assert torch.equal(head.weight, outputs)
    assert all(torch.equal(w, first[n]) for n, w in prunable(decoder).items())
    pruning.enter_phase(Phase(name="prune 1.0"), newest, memory)
    assert sparsity(decoder) == pytest.approx(0.82)
    pruning.enter_phase(Phase(name="recover, rolled back"), newest, memory)
    assert all(torch.equal(w, first[n]) for n, w in prunable(decoder).items())
    with torch.no_grad():
        for w in decoder.parameters():
            w.add_(1.0)
    pruning.apply_masks(decoder, pruning.current_masks(memory))
    assert sparsity(decoder) == pytest.approx(0.8)
    model: Any = SimpleNamespace(decoders=[decoder], heads=[head])
    pruning.finish_step(model, memory)
    assert not [k for k in memory if k.startswith("prune")]


# --------------------------------------------------------------------------------- body range


def test_a_range_is_learned_as_a_share_of_the_body_and_moves_with_it() -> None:
    memory = Memory()
    places = torch.arange(40, 61) / 100
    axial_range.store_ranges([{"spleen": places[:10]}, {"spleen": places[10:]}], memory)
    image = np.full((3, 3, 120), -1000, dtype=np.int16)
    image[1, 1, 10:110] = 40  # a body of 100 slices
    assert axial_range.body_extent(image) == (10, 110)
    low, high = axial_range.slice_ranges(image, ("spleen", "liver"), memory)["spleen"]
    # 0.401 to 0.599, widened by a quarter of 0.198
    assert (low, high) == (10 + 35, 10 + 65)
    assert axial_range.slice_ranges(image, ("liver",), memory) == {}


def test_the_range_of_a_tumor_is_its_extremes_widened_by_their_spread() -> None:
    image = np.full((4, 4, 20), -1000, np.int16)
    image[1:3, 1:3, 4:14] = 40  # ten slices of body

    def labels(names: Sequence[str], at: Any) -> np.ndarray:
        shown = np.zeros((len(names), 4, 4, 20), np.uint8)
        shown[names.index("liver_tumor"), 1, 1, [6, 7, 11]] = 1
        shown[names.index("spleen")] = 255  # nobody looked for it
        return shown

    volume: Any = SimpleNamespace(image=image, labels=labels)
    found = axial_range.slice_heights(volume, ["liver", "spleen", "liver_tumor"])
    assert set(found) == {"liver_tumor"}
    torch.testing.assert_close(found["liver_tumor"], torch.tensor([0.25, 0.35, 0.75]))
    memory = Memory()
    axial_range.store_ranges([found], memory)
    spread = float(np.std([0.25, 0.35, 0.75]))
    want = [0.25 - spread, 0.75 + spread]
    assert memory[axial_range.KEY + "liver_tumor"] == pytest.approx(want, abs=1e-6)
    assert axial_range.slice_ranges(image, ("liver_tumor",), memory) == {
        "liver_tumor": (math.floor(4 + 10 * want[0]), math.ceil(4 + 10 * want[1]))
    }


# ------------------------------------------------------------------------------ whole courses


def course(out: Path, cache: Path, strategy: str, *overrides: str) -> Path:
    return run_course(
        replace(
            RunSettings(
                bench="tumor_ext", strategy=strategy, profile="smoke", out=out, cache=cache
            ),
            overrides=("train.epochs=1", "backbone.size=8", *overrides),
        )
    )


def test_decoder_growth_forgets_exactly_nothing(tmp_path: Path, cache_root: Path) -> None:
    folder = course(tmp_path, cache_root, "decoder_growth", "strategy.body_range=true")
    rows = [r for r in run_folder.read_scores(folder / "scores.csv") if r.learned_at == 1]
    after = {
        step: {(r.eval_set, r.case, r.structure, r.scoring, r.metric): repr(r.value)
               for r in rows if r.step == step}
        for step in (1, 2)
    }  # fmt: skip
    assert after[1]
    assert after[1] == after[2]
    memory = checkpoint.load(folder / "step2.pt")["memory"]
    assert len([k for k in memory if k.startswith(axial_range.KEY)]) == 14


def test_a_pruned_course_holds_real_zeros(tmp_path: Path, cache_root: Path) -> None:
    folder = course(
        tmp_path, cache_root, "decoder_growth", "strategy.prune=true", "strategy.ema=0.9",
        "strategy.tolerance=1.0", "phantom.train=1", "train.iterations=1",
        "data.patch_vox=16,16,16",
    )  # fmt: skip
    state = checkpoint.load(folder / "step2.pt")["model"]
    for number in (0, 1):
        weights = torch.cat([
            w.flatten() for n, w in state.items()
            if n.startswith(f"decoders.{number}.") and n.endswith("weight") and w.ndim == 5
        ])  # fmt: skip
        left = weights.count_nonzero().item() / weights.numel()
        assert left == pytest.approx(0.002, abs=2e-4)
    phases = [e["phase"] for e in run_folder.read_events(folder / "events.jsonl") if e["step"] == 2]
    assert list(dict.fromkeys(phases))[-1] == "recover"
    cost = run_folder.read_record(folder)["cost"]["2"]["train"]
    gone = sum(int((w == 0).sum()) for n, w in state.items() if n.startswith("decoders."))
    assert cost["parameters"] - cost["nonzero_parameters"] >= gone > 0


def test_the_variants_start_apart() -> None:
    starts = [registry.load("strategy", n)().first_step()
              for n in ("universal", "universal_onehot", "universal_v1", "decoder_growth")]  # fmt: skip
    assert len({repr(s) for s in starts}) == 4
    assert UniversalOnehot(pseudo="soft").first_step() == UniversalOnehot()


def test_step_1_is_taught_once_for_all_that_reads_nothing_in_it() -> None:
    plain = DecoderGrowth()
    assert plain.first_step() == plain
    later = DecoderGrowth(start="copy", exclusive=True, tolerance=0.1, attempts=2)
    assert later.first_step() == plain
    assert DecoderGrowth(ema=0.9, body_range=True).first_step() != plain
    pruned = DecoderGrowth(start="copy", exclusive=True, tolerance=0.1, attempts=2, prune=True)
    assert pruned.first_step() == replace(pruned, start="random")  # decoded where validated


def test_pruning_without_validation_cases_is_refused_before_step_1(
    tmp_path: Path, cache_root: Path
) -> None:
    settings = RunSettings(
        bench="tumor_ext", strategy="decoder_growth", profile="smoke", out=tmp_path,
        cache=cache_root,
        overrides=(
            "strategy.prune=true", "phantom.train=2", "phantom.test=1", "phantom.validation=0",
        ),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"a step has none[\s\S]*step 1"):
        run_course(settings)
    assert not list(tmp_path.iterdir())
