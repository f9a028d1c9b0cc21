"""The loop: schedule, order of cases, guards, frozen parameters, phases."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.overrides import TorchFunctionMode

import clbench
from clbench import reproducibility
from clbench.errors import SettingError, TrainingError
from clbench.nets.heads import UniversalHead
from clbench.nets.output import Output
from clbench.reproducibility import derive_seed
from clbench.run.course import bf16_notes
from clbench.run.identity import numerics
from clbench.spec.settings import DataSettings, TrainSettings, load_profile
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import (
    Batch,
    DrawBatches,
    Group,
    Lesson,
    Memory,
    Phase,
    PhaseResult,
    Strategy,
)
from clbench.testing.fixtures import same
from clbench.testing.harness import StrategyHarness
from clbench.training import ranks, update
from clbench.training.batches import Material, collate, draw_cases
from clbench.training.loop import (
    StepTraining,
    adamw,
    add_terms,
    compiled,
    freeze,
    learning_rate,
    rates,
    sum_terms,
    teach,
    to_host,
)
from clbench.training.ranks import Ranks
from clbench.training.resume import TrainingPosition, TrainingState
from clbench.training.update import divide

GOLDEN = json.loads((GOLDEN_FILES / "lr_schedule.json").read_text())
OWN = [(1, str(i)) for i in range(5)]


def test_learning_rate_equals_the_authors_schedule() -> None:
    ours = [learning_rate(e, epochs=100, warmup=15, base=1e-4) for e in range(101)]
    np.testing.assert_allclose(ours, GOLDEN["lr"], rtol=1e-9, atol=1e-17)


def test_what_generates_weights_has_a_rate_of_its_own() -> None:
    """`train.generator_lr` scales the controllers' steps, and nothing else's."""
    head = UniversalHead(16, 16, text_dim=4)
    head.add("liver", torch.ones(4))
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": head})
    groups = [Group(parameters=list(model.parameters()), lr=0.5)]
    found = rates(model, groups, generator_lr=0.1)
    generated = {id(p) for p in head.controllers.parameters()}
    assert [g["scale"] for g in found] == [0.5, 0.05]
    assert {id(p) for p in found[1]["params"]} == generated
    assert {id(p) for p in found[0]["params"]} == {id(p) for p in model.parameters()} - generated
    assert [g["scale"] for g in rates(nn.Linear(2, 2), groups[:0], generator_lr=0.1)] == []


def test_every_case_comes_once_before_any_comes_twice() -> None:
    weights = dict.fromkeys(OWN, 0.2)
    order = draw_cases(weights, 12, own=OWN, seed=3)
    assert set(order[:5]) == set(order[5:10]) == set(OWN)
    assert order == draw_cases(weights, 12, own=OWN, seed=3)
    assert order != draw_cases(weights, 12, own=OWN, seed=4)


def test_past_cases_are_drawn_by_weight() -> None:
    weights = dict.fromkeys(OWN, 0.2) | {(0, "a"): 0.5, (0, "b"): 0.5}
    order = draw_cases(weights, 4000, own=OWN, seed=1)
    past = Counter(step for step, _ in order)[0]
    assert 1850 < past < 2150  # half of 4000, within five standard deviations


def test_a_seed_is_the_same_everywhere() -> None:
    assert derive_seed(0, 1, "train", 2, 3) == 3013160689609816204
    assert derive_seed(0, 1) != derive_seed(0, 2)
    assert 0 <= derive_seed("x") < 2**63


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_its_place(bad: float) -> None:
    with pytest.raises(TrainingError, match="'bce' is not finite") as err:
        add_terms(
            {"dice": torch.tensor(1.0), "bce": torch.tensor(bad)},
            "step 2, phase train, epoch 1, iteration 4, cases 2/7",
        )
    for part in ("step 2", "iteration 4", "cases 2/7", "train.lr"):
        assert part in str(err.value)
    with pytest.raises(TrainingError, match="no loss term"):
        add_terms({}, "here")


def test_a_loss_term_of_several_elements_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="'bce' is not a single number") as err:
        sum_terms({"dice": torch.tensor(1.0), "bce": torch.ones(2, 3)}, "step 2")
    assert "shape (2, 3)" in str(err.value)


def test_numbers_reach_the_host_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    halves = [torch.randn(5, generator=rng).to(t) for t in (torch.bfloat16, torch.float16)]
    singles = torch.randn(5, generator=rng) * 1e-30
    counts = torch.tensor([2**31 + 1, 2**52 + 1])
    want = [float(v) for t in (*halves, singles) for v in t] + [2.0**31 + 1, 2.0**52 + 1]
    assert to_host([*halves, singles, counts]) == want


def test_missing_pseudo_labels_become_none() -> None:
    image, label = np.zeros((1, 2, 2, 2), np.float32), np.zeros((3, 2, 2, 2), np.uint8)
    a = {"image": image, "label": label, "pseudo": None, "case": "1/a"}
    b = {"image": image, "label": label, "pseudo": label + 254, "case": "1/b"}
    both = collate([a, b])
    assert both["pseudo"].shape == (2, 3, 2, 2, 2)
    assert bool((both["pseudo"][0] == 255).all())
    assert bool((both["pseudo"][1] == 254).all())
    assert collate([a, a])["pseudo"] is None


class Toy(nn.Module):
    """Two layers, so that one can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(1, 2, 1)
        self.b = nn.Conv3d(2, 1, 1)

    def forward(self, image: Tensor) -> Output:
        return Output(logits=self.b(self.a(image)))


@dataclass(frozen=True, kw_only=True)
class Plain(Strategy):
    """Squared error on the label; trains `b` only."""

    bad: bool = False

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        assert isinstance(model, Toy)
        return [Group(parameters=list(model.b.parameters()), lr=0.5)]

    def takes_teacher(self, step: Lesson) -> bool:
        return step.number > 1

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        return [Phase(), Phase(name="again", effort=2.0, lr=0.1), None][len(history)]

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        assert (old is not None) == (not all(batch.new))
        if old is not None:
            assert not old.logits.requires_grad
        value = ((new.logits - batch.label.float()) ** 2).mean()
        return {"mse": value * float("nan") if self.bad else value}


class Counting(Toy):
    """A teacher that counts, and says how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, bool]] = []

    def forward(self, image: Tensor) -> Output:
        self.asked.append((torch.is_grad_enabled(), self.training))
        return super().forward(image)


class FakeVolume:
    """Stands where a preprocessed case stands: `crop` is replaced in these tests."""


def fake_crop(volume: object, structures: Sequence[str], **more: object) -> tuple[object, ...]:
    rng = np.random.default_rng(more["seed"])  # type: ignore[arg-type]
    image = rng.random((1, 4, 4, 4), dtype=np.float32)
    return image, (image > 0.5).astype(np.uint8), None


@pytest.fixture
def lesson_and_material(monkeypatch: pytest.MonkeyPatch) -> tuple[Lesson, Material]:
    from clbench.training import batches

    monkeypatch.setattr(batches, "crop", fake_crop)
    lesson = Lesson(
        number=1, learns=("spleen",), structures=("spleen",), source="x", cases=("a", "b", "c")
    )
    keys = {(1, c): 1 / 3 for c in lesson.cases}
    material = Material(
        volumes=dict.fromkeys(keys, FakeVolume()),  # type: ignore[arg-type]
        weights=keys,
        pseudo={},
        patch_vox=(4, 4, 4),
        data=DataSettings(),
    )
    return lesson, material


TRAIN = TrainSettings(epochs=3, iterations=2, batch=2, lr=0.1, warmup=1)


def run(
    lesson: Lesson, material: Material, strategy: Plain, workers: int = 0
) -> tuple[Toy, list[dict[str, object]]]:
    torch.manual_seed(0)
    model, events = Toy(), []
    teach(
        StepTraining(
            strategy=strategy,
            state=TrainingState(model=model, memory={}),
            teacher=None,
            lesson=lesson,
            material=material,
            train=TRAIN,
            seed=7,
            device=torch.device("cpu"),
            workers=workers,
            watch=events.append,
        )
    )
    return model, events


def test_a_teacher_is_frozen_and_asked_once_per_batch_without_gradient(
    lesson_and_material: tuple[Lesson, Material],
) -> None:
    lesson, material = lesson_and_material
    second = replace(lesson, number=2, learns=(), structures=("spleen",))
    material = replace(
        material, volumes={(2, c): v for (_, c), v in material.volumes.items()},
        weights={(2, c): w for (_, c), w in material.weights.items()},
    )  # fmt: skip
    teacher, events = Counting().train(), []
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teach(
        StepTraining(
            strategy=Plain(),
            state=TrainingState(model=Toy(), memory={}),
            teacher=teacher,
            lesson=second,
            material=material,
            train=TRAIN,
            seed=7,
            device=torch.device("cpu"),
            watch=events.append,
        )
    )
    updates = sum(e["event"] == "update" for e in events)
    assert updates > 0
    assert teacher.asked == [(False, False)] * updates
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_phases_groups_and_events(lesson_and_material: tuple[Lesson, Material]) -> None:
    torch.manual_seed(0)
    start = Toy()
    model, events = run(*lesson_and_material, Plain())
    assert torch.equal(model.a.weight, start.a.weight)  # in no group: frozen
    assert not torch.equal(model.b.weight, start.b.weight)
    assert not model.a.weight.requires_grad
    assert [e["phase"] for e in events] == ["train"] * 6 + ["again"] * 12
    assert events[0]["lr"] == pytest.approx(0.1)
    assert events[6]["lr"] == pytest.approx(0.01)
    assert {"step", "epoch", "iteration", "loss", "terms", "cases"} <= set(events[0])


def test_workers_change_nothing(lesson_and_material: tuple[Lesson, Material]) -> None:
    alone, _ = run(*lesson_and_material, Plain())
    helped, _ = run(*lesson_and_material, Plain(), workers=2)
    for a, b in zip(alone.parameters(), helped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cpu_trains_in_bfloat16_where_that_is_asked_for(
    lesson_and_material: tuple[Lesson, Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for amp in ("off", "bf16", "bf16"):
        monkeypatch.setitem(globals(), "TRAIN", replace(TRAIN, amp=amp))
        weights.append(run(*lesson_and_material, Plain())[0].b.weight)
    assert not torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[1], atol=0.05)
    assert torch.equal(weights[1], weights[2])


def test_precision_that_a_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(SettingError, match=r"train\.amp=off"):
        reproducibility.refuse_fp16_on_cpu("fp16", cpu)
    reproducibility.refuse_fp16_on_cpu("fp16", gpu)
    reproducibility.refuse_fp16_on_cpu("bf16", cpu)
    monkeypatch.setattr(reproducibility, "bf16_instructions", tuple)
    assert "slower than in float32" in str(reproducibility.slow_bf16("bf16", cpu))
    assert reproducibility.slow_bf16("bf16", gpu) is reproducibility.slow_bf16("off", cpu) is None
    monkeypatch.setattr(reproducibility, "bf16_instructions", lambda: ("amx_bf16",))
    assert reproducibility.slow_bf16("bf16", cpu) is None


def test_a_gpu_whose_bf16_convolutions_are_reported_wrong_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.__version__", "2.8.0+cu128")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91002)
    gpu = torch.device("cuda", 0)
    (note,) = bf16_notes("bf16", gpu)
    assert "silently wrong" in note
    assert bf16_notes("off", gpu) == bf16_notes("off", torch.device("cpu")) == []
    monkeypatch.setattr("torch.__version__", "2.9.1+cu130")
    assert "nvidia-cudnn-cu13>=" in bf16_notes("bf16", gpu)[0]


def test_a_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = []
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert ranks.own_device("cuda:1", None) == "cuda:1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("cuda:1", "cuda:7", "auto", "cpu"):
        assert ranks.own_device(name, None) == name
    assert current == ["cuda:1"]


def test_bfloat16_has_numbers_of_its_own() -> None:
    profile = load_profile("smoke")
    half = replace(profile, train=replace(profile.train, amp="bf16"))
    assert (numerics(profile), numerics(half)) == (clbench.NUMERICS, clbench.NUMERICS_BF16)


def test_seeds_are_those_of_torch() -> None:
    reproducibility.reseed("a", 1)
    drawn = torch.rand(3)
    torch.manual_seed(derive_seed("a", 1))
    assert torch.equal(drawn, torch.rand(3))


def test_training_stops_at_a_bad_loss(lesson_and_material: tuple[Lesson, Material]) -> None:
    with pytest.raises(TrainingError, match="step 1, phase train, epoch 0, iteration 0"):
        run(*lesson_and_material, Plain(bad=True))


class Transfers(TorchFunctionMode):
    """Counts the calls that make the host wait for a tensor's values."""

    WAIT: ClassVar[set[str]] = {
        "item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__",
        "__array__", "__contains__", "equal", "nonzero",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAIT:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class TwoTerms(Plain):
    """As many loss terms as are asked for, so that a transfer per term would show."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        value = super().losses(batch, new, old, memory)["mse"]
        return {"mse": value, "size": new.logits.square().mean()}


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_one_transfer_from_the_device_per_update(
    lesson_and_material: tuple[Lesson, Material],
    clip_norm: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a CPU stands for a device, where voxels are counted there and not by numpy
    monkeypatch.setattr(update, "count_positives", lambda label: (label == 1).sum((0, 2, 3, 4)))
    lesson, material = lesson_and_material
    per_update: list[list[str]] = []
    events: list[dict[str, Any]] = []
    with Transfers() as transfers:

        def watch(event: dict[str, Any]) -> None:
            per_update.append(transfers.calls[:])
            transfers.calls.clear()
            events.append(event)

        teach(
            StepTraining(
                strategy=TwoTerms(),
                state=TrainingState(model=Toy(), memory={}),
                teacher=None,
                lesson=lesson,
                material=material,
                train=replace(TRAIN, clip_norm=clip_norm),
                seed=7,
                device=torch.device("cpu"),
                watch=watch,
            )
        )
    first_of_phase = ["item", "tolist"]  # a loader draws its seed, on the host, when it starts
    assert per_update == [first_of_phase if i in (0, 6) else ["tolist"] for i in range(18)]
    for event in events:
        assert event["loss"] == pytest.approx(sum(event["terms"].values()), rel=1e-6)
        assert all(type(n) is int for n in event["voxels"])


def test_a_bad_loss_changes_no_weight(lesson_and_material: tuple[Lesson, Material]) -> None:
    lesson, material = lesson_and_material
    model = Toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    events: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match="loss term 'mse' is not finite"):
        teach(
            StepTraining(
                strategy=Plain(bad=True),
                state=TrainingState(model=model, memory={}),
                teacher=None,
                lesson=lesson,
                material=material,
                train=TRAIN,
                seed=7,
                device=torch.device("cpu"),
                watch=events.append,
            )
        )
    assert events == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@dataclass(frozen=True, kw_only=True)
class Phased(Plain):
    """Trains `b`, then `a` for as long as validation says so; looks at crops when it has done."""

    seen: list[object] = field(default_factory=list)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        assert isinstance(model, Toy)
        return [Group(parameters=list(getattr(model, str(memory["part"])).parameters()))]

    def enter_phase(self, phase: Phase, model: nn.Module, memory: Memory) -> None:
        memory["part"] = "b" if phase.name == "train" else "a"

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        self.seen.append([r.validation for r in history])
        if not history:
            return Phase(validations=2)
        if history[-1].validation and history[-1].validation[-1] < 3:
            name = f"again {len(history)}"
            return Phase(name=name, epochs=1, constant=True, lr=0.5, validations=1)
        return None

    def finish(self, step: Lesson, model: nn.Module, draws: DrawBatches, memory: Memory) -> None:
        self.seen.append([list(draws(2)), list(draws(2))])


def phased(
    lesson: Lesson,
    material: Material,
    strategy: Strategy,
    validate: Callable[[nn.Module], float] | None,
    *,
    train: TrainSettings = TRAIN,
    state: TrainingState | None = None,
    watch: Callable[[Mapping[str, object]], None] = lambda event: None,
) -> tuple[Toy, list[Mapping[str, object]]]:
    torch.manual_seed(0)
    model, events = Toy(), []

    def see(event: Mapping[str, object]) -> None:
        events.append(event)
        watch(event)

    teach(
        StepTraining(
            strategy=strategy,
            state=state or TrainingState(model=model, memory={}),
            teacher=None,
            lesson=lesson,
            material=material,
            train=train,
            seed=7,
            device=torch.device("cpu"),
            watch=see,
            validate=validate,
        )
    )
    return model, events


def test_phases_follow_what_validation_says(lesson_and_material: tuple[Lesson, Material]) -> None:
    strategy = Phased(seen=[])
    answers = iter([0.0, 1.0, 2.0, 3.0])
    asked: list[nn.Module] = []

    def validate(model: nn.Module) -> float:
        asked.append(model)
        return next(answers)

    model, events = phased(*lesson_and_material, strategy, validate)
    assert strategy.seen[:-1] == [
        [],
        [(0.0, 1.0)],  # after each of the last two epochs
        [(0.0, 1.0), (2.0,)],
        [(0.0, 1.0), (2.0,), (3.0,)],
    ]
    assert asked == [model] * 4
    updates = [e for e in events if e["event"] == "update"]
    assert [e["phase"] for e in updates] == ["train"] * 6 + ["again 1"] * 2 + ["again 2"] * 2
    assert {e["lr"] for e in updates[6:]} == {0.05}  # constant, at half the rate
    assert [e["epoch"] for e in events if e["event"] == "validation"] == [1, 2, 0, 0]
    assert model.a.weight.requires_grad  # the groups of the last phase
    assert not model.b.weight.requires_grad


def test_validation_changes_no_bit(lesson_and_material: tuple[Lesson, Material]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Watched(Plain):
        def next_phase(
            self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
        ) -> Phase | None:
            phase = super().next_phase(step, memory, history)
            return None if phase is None else replace(phase, validations=3)

    plain, _ = run(*lesson_and_material, Plain())
    watched, _ = phased(*lesson_and_material, Watched(), lambda model: 0.5)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validation_without_cases_is_refused(lesson_and_material: tuple[Lesson, Material]) -> None:
    seen: list[object] = []
    with pytest.raises(TrainingError, match="no validation cases") as err:
        phased(*lesson_and_material, Phased(), None, watch=seen.append)
    assert "step 1, phase train" in str(err.value)
    assert "--split x=" in str(err.value)
    assert not seen  # before the first update, not after the last


def test_a_warmup_that_outlasts_the_training_is_said_once(
    lesson_and_material: tuple[Lesson, Material],
) -> None:
    """Before the first update, and once more neither in later phases nor after a stop."""
    long = replace(TRAIN, warmup=15)
    _, events = phased(*lesson_and_material, Plain(), None, train=long)
    assert [e["event"] for e in events].index("warning") == 0
    (said,) = [e for e in events if e["event"] == "warning"]
    for part in ("step 1", "phase train", "warm-up of 15", "after 3", "21%", "train.warmup=3"):
        assert part in str(said["message"])
    updates = [e for e in events if e["event"] == "update"]
    assert max(float(str(e["lr"])) for e in updates) == pytest.approx(0.1 * 3 / 14)
    groups = Plain().groups(model := Toy(), lesson_and_material[0], {})
    stopped = TrainingPosition(
        phase=Phase(),
        history=(),
        updates=5,
        measured=(),
        groups=groups,
        optimizer=adamw(rates(model, groups, 1.0), long, torch.device("cpu")).state_dict(),
        scaler={},
    )
    state = TrainingState(model=model, memory={}, position=stopped)
    _, rest = phased(*lesson_and_material, Plain(), None, train=long, state=state)
    assert {e["event"] for e in rest} == {"update"}
    _, ordinary = phased(*lesson_and_material, Plain(), None)
    assert {e["event"] for e in ordinary} == {"update"}


def test_finish_draws_the_same_own_crops_again(
    lesson_and_material: tuple[Lesson, Material],
) -> None:
    lesson, material = lesson_and_material
    past = replace(
        material,
        volumes={**material.volumes, (0, "old"): FakeVolume()},
        weights={**material.weights, (0, "old"): 50.0},
    )
    strategy = Phased(seen=[])
    phased(lesson, past, strategy, lambda model: 3.0)
    first, again = strategy.seen[-1]  # type: ignore[misc]
    assert len(first) == 2
    assert [b.image.shape for b in first] == [(2, 1, 4, 4, 4)] * 2
    assert {c.partition("/")[0] for b in first for c in b.cases} == {"1"}  # none of the past
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.image, b.image)
        assert a.cases == b.cases


def test_what_is_frozen_as_a_whole_is_in_evaluation_mode() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Dropout3d(0.5))

    model = nn.ModuleDict({"old": block(), "new": block()})
    freeze(model, list(model["new"].parameters()))
    before = {k: v.clone() for k, v in model["old"].state_dict().items()}
    x = torch.rand(4, 1, 3, 3, 3)
    assert torch.equal(model["old"](x), model["old"](x))  # no dropout
    assert all(torch.equal(v, before[k]) for k, v in model["old"].state_dict().items())
    assert model.training
    assert model["new"][2].training
    assert not any(p.requires_grad for p in model["old"].parameters())
    freeze(model, [model["new"][0].weight])
    assert not model["new"][1].training  # nothing of the normalization is trained
    assert model["new"][0].training


def test_a_network_is_compiled_for_each_phase_and_as_it_was_afterwards(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth comes between two phases; a stand-in for the compiler shows when it is asked."""
    asked: list[int] = []
    calls: list[int] = []

    def stand_in(model: nn.Module, **_: Any) -> None:
        asked.append(sum(p.numel() for p in model.parameters()))

        def call(*args: Any) -> Any:
            calls.append(1)
            return model._call_impl(*args)  # type: ignore[no-untyped-call]  # torch

        model._compiled_call_impl = call  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", stand_in)
    ends = []
    for on in (False, True):
        harness = StrategyHarness(Finetune(), name="finetune", folder=tmp_path, cache=cache_root)
        plan = harness.plan
        plan.profile = replace(plan.profile, train=replace(plan.profile.train, compile=on))
        ends.append(harness.end(2).model)
        assert ends[-1]._compiled_call_impl is None
        assert len(asked) == 2 * on
    assert len(calls) == 2 * plan.profile.train.iterations
    assert asked[0] < asked[1]  # the grown network
    assert same(dict(ends[0].state_dict()), dict(ends[1].state_dict()))


def test_where_a_network_cannot_be_compiled_the_error_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(1, 1)
    twice = replace(TRAIN, batch=1, accumulate=2, compile=True)
    with pytest.raises(SettingError, match="accumulated"):
        divide(twice, Ranks())
    monkeypatch.setattr(nn.Module, "compile", lambda model, **_: None)
    with (
        pytest.raises(SettingError, match="cannot compile") as err,
        compiled(model, on=True),
    ):
        raise TorchDynamoException("no compiler here\nmore")
    assert "TorchDynamoException: no compiler here" in str(err.value)
    assert "--set train.compile=false" in str(err.value)
    with pytest.raises(RuntimeError, match="other"), compiled(model, on=False):
        raise RuntimeError("other")


@dataclass(frozen=True, kw_only=True)
class Grouped(Plain):
    """Trains a given number of times what `Plain` trains once."""

    times: int = 1

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        return super().groups(model, step, memory) * self.times


@pytest.mark.parametrize(("times", "says"), [(0, "trains nothing"), (2, "a parameter twice")])
def test_groups_that_no_optimizer_takes_are_refused(
    times: int, says: str, lesson_and_material: tuple[Lesson, Material]
) -> None:
    with pytest.raises(TrainingError, match=says) as err:
        run(*lesson_and_material, Grouped(times=times))
    assert "step 1, phase train, groups" in str(err.value)
