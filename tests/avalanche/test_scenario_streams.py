"""A course as an Avalanche scenario, driven by Avalanche itself: streams, strategies, metrics."""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from locations import ROOT
from rounding import assert_same_to_rounding, assert_untouched, weights_of
from torch import nn
from torch.optim import SGD

from clbench import avalanche as bridge
from clbench.avalanche import metrics as metrics_module
from clbench.errors import SettingError, TrainingError
from clbench.evaluation.metrics import continual
from clbench.nets import backbones
from clbench.run.course import run_plan
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.run.rescore import score_run
from clbench.spec import registry
from clbench.store import checkpoint, run_folder
from clbench.store.run_folder import Score
from clbench.strategy.contract import Phase
from clbench.testing.fixtures import OVERRIDES, tiny_course
from clbench.training.batches import Crops, Material

# Masks of an untaught network that teaching empties slowly: scores that differ from 0 and change.
SLOW = (
    *(word for word in OVERRIDES if not word.startswith(("train.lr=", "train.prior="))),
    "train.lr=7.5e-5",
    "train.prior=0.5",
)


@pytest.fixture(scope="module")
def course(cache_root: Path) -> Any:
    """Three steps of 3, 1 and 2 structures; steps 1 and 3 share a source."""
    return bridge.scenario(tiny_course(), profile="smoke", overrides=SLOW, cache=cache_root)


@pytest.fixture(scope="module", autouse=True)
def _published_controllers() -> Iterator[None]:
    """With the narrow controllers of other tests, step 1 would have no Dice to compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "small_unet", inspect.unwrap(backbones.small_unet))
        yield


@pytest.fixture(scope="module")
def native(cache_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The same course run by clbench itself, as `bridge.criterion` teaches it."""
    settings = RunSettings(
        bench="kit", strategy="finetune", profile="smoke", out=tmp_path_factory.mktemp("native"),
        overrides=(*SLOW, "strategy.unlabelled=ignore"), cache=cache_root, device="cpu",
    )  # fmt: skip
    plan = resolve(settings, benchmark=tiny_course())
    run_plan(plan)
    return plan


def weights(plan: Plan, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(plan.folder / f"step{step}.pt")["model"]
    return found


def evaluator(*metrics: Any, loggers: Any = ()) -> Any:
    from avalanche.training.plugins import EvaluationPlugin

    return EvaluationPlugin(*metrics, loggers=[Silent(), *loggers])


class Silent:
    """A logger that says nothing; without any, Avalanche warns."""

    def log_metrics(self, values: Any) -> None:
        return None


def strategy(net: nn.Module, *metrics: Any, kind: str = "Naive", **options: Any) -> Any:
    from avalanche import training

    settings: dict[str, Any] = {
        "optimizer": SGD(net.parameters(), lr=1e-3), "criterion": bridge.criterion, "train_mb_size": 1,
        "evaluator": evaluator(*metrics),
    }  # fmt: skip
    return getattr(training, kind)(model=net, **{**settings, **options})


# ------------------------------------------------------------------------------ streams and samples


def test_streams_and_experiences_have_avalanches_names(course: Any) -> None:
    from avalanche.benchmarks.scenarios import CLScenario, DatasetExperience, EagerCLStream

    assert isinstance(course, CLScenario)
    assert sorted(course.streams) == ["test", "train", "valid"]
    assert (course.n_experiences, course.n_classes) == (3, 6)
    for name in ("train", "test", "valid"):
        stream = getattr(course, f"{name}_stream")
        assert isinstance(stream, EagerCLStream)
        assert (stream.name, len(stream), stream.benchmark) == (name, 3, course)
        assert [e.current_experience for e in stream[1:]] == [1, 2]
    second = course.train_stream[1]
    assert isinstance(second, DatasetExperience)
    assert second.origin_stream is course.train_stream
    assert second.benchmark is course
    assert second.classes_in_this_experience == [3]
    assert second.previous_classes == [0, 1, 2]
    assert second.classes_seen_so_far == [0, 1, 2, 3]
    assert second.future_classes == [4, 5]
    assert (second.task_label, second.task_labels) == (0, [0])
    assert second.structures == ("liver_tumor",)
    assert second.logging().current_experience == 1
    with pytest.raises(ValueError, match="not available"):
        _ = second.train().current_experience  # hidden from strategies, as ever in Avalanche


def test_data_on_disk_gives_the_samples_that_the_phantom_gives(
    course: Any, native: Plan, cache_root: Path
) -> None:
    folders = {
        name: Path(next(iter(cases.values())).files[0]).parents[1]
        for name, cases in native.catalog.files.items()
    }
    there = bridge.scenario(
        tiny_course(), data=",".join(f"{n}={p}" for n, p in folders.items()), profile="smoke",
        splits=dict(zip(("organs", "tumor", "more"), native.catalog.splits, strict=True)),
        overrides=SLOW, cache=cache_root,
    )  # fmt: skip
    for number in range(3):
        mine, theirs = there.train_stream[number], course.train_stream[number]
        assert mine.cases == theirs.cases
        for a, b in zip(mine.dataset[0], theirs.dataset[0], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_an_experience_holds_its_cases_and_no_other(course: Any) -> None:
    first, third = course.test_stream[0], course.test_stream[2]
    assert len(first.cases) == 2
    assert first.cases == third.cases  # one source: its test cases count for both
    assert course.train_stream[0].volume(course.train_stream[0].cases[0]).source == "first"
    with pytest.raises(SettingError, match="does not hold this case"):
        course.train_stream[0].volume(first.cases[0])


def test_samples_are_the_crops_of_our_own_loop(course: Any, native: Plan) -> None:
    lesson = native.lesson(2)
    native.catalog.step = 2
    volumes = {(2, c): native.catalog.open(2, c, "train") for c in lesson.cases}
    ours = Crops(
        lesson, Phase(),
        Material(volumes=volumes, weights=dict.fromkeys(volumes, 0.5), pseudo={},
                 patch_vox=native.catalog.preprocessing.patch_vox, data=native.profile.data),
        epochs=1, per_epoch=2, seed=0,
    )  # fmt: skip
    dataset = course.train_stream[1].dataset
    assert len(dataset) == len(ours) == 2
    for i in (1, 0, 1):  # in any order, any number of times
        x, y = dataset[i]
        assert x.numpy().tobytes() == ours[i]["image"].tobytes()
        assert y.numpy()[:4].tobytes() == ours[i]["label"].tobytes()
        assert (y[4:] == 255).all()  # taught later
        assert (y[0] == 255).all()  # the spleen is not annotated in this source
        assert set(y[1].unique().tolist()) <= {0, 1, 255}
    assert (dataset[0][1][1] != 255).any()  # the liver is
    with pytest.raises(IndexError):
        course.train_stream[1].dataset[2]


def test_mini_batches_carry_a_task_label_and_mix_steps(course: Any) -> None:
    first, second = course.train_stream[0].dataset, course.train_stream[1].dataset
    both = first.concat(second)
    loader = torch.utils.data.DataLoader(both, batch_size=4, collate_fn=both.collate_fn)
    (x, y, t), = loader  # fmt: skip
    assert x.shape == (4, 1, 16, 16, 16)
    assert (x.dtype, y.dtype) == (torch.float32, torch.uint8)
    assert y.shape == (4, 6, 16, 16, 16)
    assert t.tolist() == [0, 0, 0, 0]
    last = [int((s == 1).flatten(1).any(1).nonzero().max()) if (s == 1).any() else -1 for s in y]
    assert list(both.targets) == last


def test_test_samples_are_one_fixed_view_of_each_case(course: Any) -> None:
    experience = course.test_stream[1]
    assert len(experience.dataset) == len(experience.cases)
    (x, y), (again, _) = experience.dataset[0], experience.dataset[0]
    assert torch.equal(x, again)
    assert (x.min() >= 0) & (x.max() <= 1)  # no shift of intensity
    assert y.shape == (6, 16, 16, 16)


def test_what_a_scenario_cannot_take_is_said(cache_root: Path) -> None:
    with pytest.raises(SettingError, match="no strategy whose settings"):
        bridge.scenario("tumor_ext", profile="smoke", overrides=["strategy.pseudo=soft"])
    made = bridge.scenario(tiny_course(), profile="smoke", overrides=SLOW, cache=cache_root)
    with pytest.raises(SettingError, match="no such head"):
        bridge.model(made, head="softmax")
    with pytest.raises(SettingError, match="only teaches again") as err:
        bridge.scenario("domain_ext", profile="smoke", cache=cache_root)
    assert "clbench run" in str(err.value.next_step)


# ----------------------------------------------------------------------------- network and criterion


def test_the_network_is_the_one_of_our_own_runs_and_grows_like_it(
    course: Any, native: Plan
) -> None:
    net, state = bridge.model(course), torch.get_rng_state()
    ours = native.strategy.build(native.kit, native.lesson(1))
    x = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    before, first = net(x), weights_of(net)
    assert torch.equal(before, ours(x).logits)
    net.train()
    for number, experience in enumerate(course.train_stream, 1):
        net.adaptation(experience)
        if number > 1:
            native.strategy.grow(ours, native.kit, native.lesson(number))
        assert net.structures == ours.structures == native.lesson(number).structures
        assert torch.equal(net(x), ours(x).logits)
    assert_untouched(net, first)
    assert_same_to_rounding(net(x)[:, :3], before)  # growth alone changes no old output
    assert torch.equal(torch.get_rng_state(), state)
    twin = copy.deepcopy(net)
    assert twin._blueprint is net._blueprint
    assert twin(x).shape[1] == 6
    with pytest.raises(SettingError, match="no such step"):
        net.grow(4)


def test_the_network_does_not_grow_in_evaluation(course: Any) -> None:
    net = bridge.model(course, head="conv").eval()
    net.adaptation(course.test_stream[2])
    assert net.structures == ("spleen", "liver", "left_kidney")
    assert not any("controllers" in name for name, _ in net.named_parameters())


def test_the_criterion_leaves_out_what_nobody_annotated() -> None:
    y = torch.full((1, 3, 2, 2, 2), 255, dtype=torch.uint8)
    y[0, 0] = 0
    y[0, 0, 0] = 1
    logits = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    loss = bridge.criterion(logits, y)
    # one pair known: Dice 1 - 2·(4·0.5) / (8·0.5 + 4 + 1) and cross-entropy ln 2
    assert loss.item() == pytest.approx(1 - 4 / 9 + math.log(2), rel=1e-6)
    loss.backward()
    grad = logits.grad
    assert grad is not None
    assert grad[:, 1].abs().max() == 0
    assert grad[:, 0].abs().min() > 0
    # as background the second structure is known too: Dice 1 - 0 / (4 + 0 + 1)
    background = bridge.Criterion("background")(torch.zeros(1, 2, 2, 2, 2), y)
    assert background.item() == pytest.approx((1 - 4 / 9 + 1) / 2 + math.log(2), rel=1e-6)
    with pytest.raises(TrainingError, match="do not fit"):
        bridge.criterion(torch.zeros(1, 4, 2, 2, 2), y)
    with pytest.raises(TrainingError, match="not finite"):
        bridge.criterion(torch.full((1, 2, 2, 2, 2), math.nan), y)
    with pytest.raises(SettingError, match="unlabelled"):
        bridge.Criterion("other")  # type: ignore[arg-type]


# --------------------------------------------------------------------- the same numbers as clbench run


def test_avalanche_teaches_what_our_own_loop_teaches(course: Any, native: Plan) -> None:
    """Same crops, same loss, same optimizer: the same weights after every step, to the bit."""
    net = bridge.model(course)
    for number, experience in enumerate(course.train_stream, 1):
        strategy(net, optimizer=net.optimizer()).train(experience, shuffle=False)
        for name, value in weights(native, number).items():
            assert torch.equal(net.segmenter.state_dict()[name], value), f"step {number}, {name}"


def test_scores_are_those_of_a_run_for_the_same_weights(
    course: Any, native: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "benchmark", lambda name: tiny_course())
    score_run(native.folder, metrics=("nsd",))
    rows = run_folder.read_scores(native.folder / "scores.csv")
    sources = [native.catalog.source(n).name for n in (1, 2, 3)]
    taught = {s: native.benchmark.learned_at(s) for s in course.structures}
    net = bridge.model(course)
    guest = strategy(
        net,
        bridge.dice_metrics(structures=True), bridge.surface_dice_metrics(structures=True),
        bridge.forgetting_metrics(), bridge.bwt_metrics(), optimizer=SGD(net.parameters(), lr=0.0),
    )  # fmt: skip
    for number, experience in enumerate(course.train_stream, 1):
        guest.train(experience)  # grows the network and tells the metrics; teaches nothing
        net.segmenter.load_state_dict(weights(native, number))
        found = guest.eval(course.test_stream)
        known = {s: n for s, n in taught.items() if n <= number}
        for word, label in (("dice", "Dice"), ("nsd", "SurfaceDice")):
            r = continual.matrix(rows, sources, scoring="strict", metric=word)
            for name, own in taught.items():
                key = f"Class{label}_Exp/eval_phase/test_stream/Task000/Exp{own - 1:03}/{name}"
                value = r[number, name] if name in known else math.nan
                assert found[key] == value or (math.isnan(found[key]) and math.isnan(value))
            for own in (1, 2, 3):
                key = f"{label}_Exp/eval_phase/test_stream/Task000/Exp{own - 1:03}"
                value = continual.accuracy(r, taught, number, own.__eq__)
                assert found[key] == value or (math.isnan(found[key]) and math.isnan(value))
            key = f"{label}_Stream/eval_phase/test_stream/Task000"
            whole = continual.accuracy(r, known, number, lambda s: True)
            assert found[key] == whole
            assert whole > 0 or word == "nsd" or number > 1  # else nothing was compared
        r = continual.matrix(rows, sources, scoring="strict")
        lost = continual.forgetting_first_last(r, known, number)
        for label, sign in (("Forgetting", 1), ("BWT", -1)):
            key = f"Stream{label}/eval_phase/test_stream/Task000"
            assert (key in found) == (number > 1)
            if number > 1:
                assert found[key] == continual.mean(sign * v for v in lost.values())
                key = f"Experience{label}/eval_phase/test_stream/Task000/Exp000"
                first = [sign * v for s, v in lost.items() if taught[s] == 1]
                assert found[key] == continual.mean(first)
    assert any(v != 0 for v in lost.values())


# --------------------------------------------------------------- Avalanche's own strategies and loggers


class Look:
    """Stands on both sides of another plugin and sees what that one adds to the loss."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.losses.append(float(strategy.loss.detach()))


def plugin(name: str) -> Callable[[], Any]:
    def made() -> Any:
        from avalanche.training import plugins

        return {
            "none": list,
            "replay": lambda: [plugins.ReplayPlugin(mem_size=2)],
            "ewc": lambda: [plugins.EWCPlugin(1e3)],
            "class balanced": lambda: [plugins.GDumbPlugin(mem_size=6)],
        }[name]()

    return made


@pytest.mark.parametrize("name", ["none", "replay", "ewc", "class balanced"])
def test_avalanches_strategies_train_three_steps(course: Any, name: str) -> None:
    from avalanche.training.templates import SupervisedTemplate

    before: list[float] = []
    after: list[float] = []
    net = bridge.model(course)
    guest = SupervisedTemplate(
        model=net, optimizer=SGD(net.parameters(), lr=1e-2), criterion=bridge.criterion, train_mb_size=1,
        plugins=[Look(before), *plugin(name)(), Look(after)], evaluator=evaluator(bridge.dice_metrics()),
    )  # fmt: skip
    sizes = []
    for experience in course.train_stream:
        old = {n: p.detach().clone() for n, p in guest.model.named_parameters()}
        guest.train(experience)
        sizes.append(len(guest.model.structures))
        optimized = {id(p) for g in guest.optimizer.param_groups for p in g["params"]}
        now = dict(guest.model.named_parameters())
        assert optimized >= {id(p) for p in now.values()}  # the new outputs are trained too
        assert any(not torch.equal(now[n], p) for n, p in old.items() if n in now)
    assert sizes == [3, 4, 6]
    assert all(map(math.isfinite, after))
    added = [b - a for a, b in zip(before, after, strict=True)]
    assert added[:2] == [0.0, 0.0]
    assert (max(added[2:]) > 0) == (name == "ewc")  # a penalty from the second step on
    found = guest.eval(course.test_stream[2])
    assert "Dice_Exp/eval_phase/test_stream/Task000/Exp002" in found


def test_replay_mixes_old_crops_into_new_batches(course: Any) -> None:
    seen = []

    class Watch:
        def after_forward(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(strategy.mb_y)

    net = bridge.model(course)
    guest = strategy(net, kind="Replay", mem_size=4, plugins=[Watch()])
    guest.train(course.train_stream[:2])
    late = seen[-1]
    assert late.shape[0] == 2  # one crop of LiTS, one of before
    annotated = [(crop != 255).flatten(1).any(1).tolist() for crop in late]
    assert [a[3] for a in annotated] == [True, False]  # the old case knows nothing of tumors
    assert annotated[1][:3] != [False] * 3


def test_every_logger_shows_the_metrics(
    course: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from avalanche.logging import InteractiveLogger, TensorboardLogger, TextLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = io.StringIO()
    board = TensorboardLogger(tmp_path)
    net = bridge.model(course)
    guest = strategy(
        net,
        evaluator=evaluator(
            bridge.dice_metrics(structures=True), bridge.surface_dice_metrics(),
            bridge.forgetting_metrics(), loggers=[TextLogger(text), InteractiveLogger(), board],
        ),
    )  # fmt: skip
    for experience in course.train_stream[:2]:
        guest.train(experience)
        found = guest.eval(course.test_stream[:2])
    board.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    printed = capsys.readouterr().out
    # experiences, structures, stream; of surface Dice experiences and stream; two of forgetting
    assert len(found) == 2 + 4 + 1 + 2 + 1 + 2
    for name, value in found.items():
        line = f"\t{name} = {value:.4f}\n"
        assert line in text.getvalue()
        assert line in printed
        last = events.Scalars(name)[-1]
        assert (last.value, last.step) == (pytest.approx(value, rel=1e-6), 4)  # after 4 updates


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("often", ["epoch", "iteration"])
def test_evaluation_leaves_training_as_it_was(course: Any, often: str) -> None:
    def taught(**options: Any) -> tuple[Any, torch.Tensor, list[bool]]:
        torch.manual_seed(5)  # what Avalanche shuffles with
        net = bridge.model(course)
        guest = strategy(net, bridge.dice_metrics(), peval_mode=often, **options)
        for experience in course.train_stream[:2]:
            guest.train(experience, eval_streams=[course.test_stream[1:]])
            net.segmenter.backbone.eval()  # a frozen part stays so
            if options:
                guest.eval(course.test_stream[1:])
        return net, torch.get_rng_state(), [m.training for m in net.modules()]

    plain, state, modes = taught()
    watched, same_state, same_modes = taught(eval_every=1)
    assert torch.equal(state, same_state)
    assert modes == same_modes
    assert not all(modes)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Fixed(nn.Module):
    """A user's own network, with all outputs from the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def test_a_network_of_ones_own_is_scored_too(course: Any) -> None:
    guest = strategy(Fixed(6), bridge.dice_metrics(), criterion=bridge.Criterion("background"))
    guest.train(course.train_stream[0])
    found = guest.eval(course.test_stream[1:])
    assert all(math.isfinite(v) for v in found.values())  # it answers for what it was never taught
    assert len(found) == 3
    with pytest.raises(TrainingError, match="more structures than the course"):
        strategy(Fixed(7), bridge.dice_metrics(), criterion=lambda out, y: out.sum()).eval(
            course.test_stream[:1]
        )


def test_metrics_are_means_over_patients_as_in_tables(
    course: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = course.plan.catalog.source(1).name
    worth = {"7": 1.0, "8": 0.25, "8b": 0.25}

    def rows(scores: Any, names: Any, *_: Any) -> list[Score]:
        return [
            Score(
                bench="kit", bench_version=1, strategy="s", seed=0, step=3, eval_set=source,
                case=case, structure=name, learned_at=1, scoring="strict", metric="dice",
                value=value, gt_vox=8, pred_vox=8, status="ok",
            )
            for name in names for case, value in worth.items()
        ]  # fmt: skip

    of_course = types.SimpleNamespace(patient_of={f"{source}/8b": "8"})
    monkeypatch.setattr(metrics_module, "metric_rows", rows)
    monkeypatch.setattr(metrics_module, "course_of", lambda *_: of_course)
    guest = strategy(Fixed(6), bridge.dice_metrics(), criterion=lambda out, y: out.sum())
    found = guest.eval(course.test_stream[:1])
    assert {*found.values()} == {(1.0 + 0.25) / 2}


@pytest.mark.usefixtures("course")
def test_metrics_say_where_they_cannot_work() -> None:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset

    pairs = torch.utils.data.TensorDataset(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))
    other = benchmark_from_datasets(test=[AvalancheDataset([pairs])])
    guest = strategy(Fixed(1), bridge.dice_metrics(), criterion=lambda out, y: out.sum())
    with pytest.raises(SettingError, match="whole volumes"):
        guest.eval(other.test_stream)


# ------------------------------------------------------------------------------------------ the page


def test_the_readme_shows_three_strategies_in_25_lines(
    monkeypatch: pytest.MonkeyPatch, cache_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "strategies" / "README.md").read_text(encoding="utf-8")
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "clbench.avalanche" in block
    ]
    assert len(code.splitlines()) <= 25
    assert "Naive" in code
    assert "Replay" in code
    monkeypatch.setenv("CLBENCH_CACHE", str(cache_root))
    bridge.scenario  # noqa: B018  # the door, before Avalanche
    from avalanche.logging import TextLogger

    # its default file is what stdout was when Avalanche was imported
    monkeypatch.setattr(TextLogger.__init__, "__defaults__", (sys.stdout,))
    module = types.ModuleType("readme_avalanche")
    exec(compile(code, "strategies/README.md", "exec"), module.__dict__)  # noqa: S102  # our page
    printed = capsys.readouterr().out
    for name in ("Dice_Exp/eval_phase/test_stream/Task000/Exp001", "StreamForgetting/"):
        assert printed.count(name) >= 3
