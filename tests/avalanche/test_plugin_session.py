"""Avalanche's plugins in our loop: Avalanche itself, three steps of the tiny course."""

from __future__ import annotations

import copy
import csv
import dataclasses
from collections import OrderedDict, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clbench.avalanche.lazy_import import load
from clbench.avalanche.plugin_state import KEY, pack, stored, unpack
from clbench.errors import AvalancheError, ClbenchError, UnknownName
from clbench.report.past_images import past_card
from clbench.run.course import run_plan
from clbench.run.plan import load_strategy
from clbench.run.teach import StepState
from clbench.spec import registry
from clbench.store import checkpoint, run_folder
from clbench.store.record import RunRecord
from clbench.strategies.avalanche_plugins.agem import Agem
from clbench.strategies.avalanche_plugins.ewc import Ewc
from clbench.strategies.avalanche_plugins.mas import Mas
from clbench.strategies.avalanche_plugins.replay import Replay
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Phase, Strategy
from clbench.testing.fixtures import perturb, reproducible, same
from clbench.testing.harness import StrategyHarness
from clbench.training.batches import draw_from

OWN: tuple[Strategy, ...] = (Ewc(), Mas(), Replay(), Agem())


@pytest.fixture(scope="module")
def harnesses(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Any:
    """Strategy → its test harness; each step is taught once."""
    made: dict[tuple[Strategy, str], StrategyHarness] = {}

    def harness(strategy: Strategy, *overrides: str) -> StrategyHarness:
        key = strategy, " ".join(overrides)
        if key not in made:
            made[key] = StrategyHarness(
                strategy,
                name=type(strategy).__name__.lower(),
                folder=tmp_path_factory.mktemp("harness"),
                cache=cache_root,
                overrides=overrides,
            )
        return made[key]

    with reproducible():
        yield harness


def user(name: str, **overrides: str) -> Strategy:
    return load_strategy(f"avalanche_users:{name}", overrides)


def plugin_of(harness: StrategyHarness, state: StepState) -> Any:
    """Plugin and clock as they lie in memory."""
    home = load("avalanche.training.plugins").EWCPlugin.__module__
    return unpack(
        state.memory, home=home, device=torch.device("cpu"), dataset=lambda keys: list(keys)
    )


# ------------------------------------------------------------------------------------ hooks in order


def test_the_hooks_come_in_the_order_of_avalanches_own_template(harnesses: Any) -> None:
    strategy = user("Recorder", zero_penalty="allowed")
    from avalanche_users import CALLS, HOOKS, Recorder

    harness = harnesses(strategy)
    CALLS.clear()
    harness.end(1)
    ours = list(CALLS)
    assert set(ours) == set(HOOKS)

    data = load("avalanche.benchmarks.utils.data").AvalancheDataset
    attribute = load("avalanche.benchmarks.utils.data_attribute").DataAttribute
    experience = load("avalanche.benchmarks.scenarios.dataset_scenario").DatasetExperience
    training = load("avalanche.training.supervised")

    def samples(count: int) -> Any:
        tasks = attribute([0] * count, "targets_task_labels", use_in_getitem=True)
        pairs = [(torch.ones(2), torch.ones(1)) for _ in range(count)]
        made = experience(dataset=data([pairs], data_attributes=[tasks]), current_experience=0)
        made.task_labels, made.origin_stream = [0], type("Stream", (), {"name": "train"})
        return made

    model = torch.nn.Linear(2, 1)
    naive = training.Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=lambda out, y: (out - y).pow(2).mean() + 1.0, train_mb_size=1, train_epochs=1,
        eval_mb_size=1, plugins=[Recorder()],
        evaluator=load("avalanche.training.plugins").EvaluationPlugin(),
    )  # fmt: skip
    CALLS.clear()
    naive.train(samples(2))
    naive.eval(samples(1))
    assert ours == CALLS


# --------------------------------------------------------------------------------- nothing but itself


@pytest.mark.parametrize("strategy", OWN, ids=lambda s: type(s).__name__)
def test_step_1_is_fine_tuning_to_the_bit(harnesses: Any, strategy: Strategy) -> None:
    ours, plain = harnesses(strategy).end(1), harnesses(Finetune()).end(1)
    assert same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))


@pytest.mark.parametrize("strategy", OWN, ids=lambda s: type(s).__name__)
def test_settings_of_fine_tuning_are_those_of_fine_tuning(strategy: Strategy) -> None:
    plain = dataclasses.asdict(Finetune())
    assert plain == {name: getattr(strategy, name) for name in plain}


@pytest.mark.parametrize("strategy", OWN, ids=lambda s: type(s).__name__)
def test_later_steps_are_not(harnesses: Any, strategy: Strategy) -> None:
    # A-GEM projects where gradients of old and new cases disagree: not in the first few updates
    more = ("train.iterations=6",) if isinstance(strategy, Agem) else ()
    ours, plain = (harnesses(each, *more).end(3) for each in (strategy, Finetune()))
    assert not same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))


def test_evaluation_and_a_plugin_that_looks_on_leave_training_as_it_is(harnesses: Any) -> None:
    harness = harnesses(user("Recorder", zero_penalty="allowed"))
    for number in (1, 2, 3):
        ours, plain = harness.end(number), harnesses(Finetune()).end(number)
        assert same(dict(ours.model.state_dict()), dict(plain.model.state_dict()))
        assert ours.model.training
    left = []
    for each in (harness, harnesses(Finetune())):
        torch.manual_seed(5)
        each.teach(each.start(1))
        left.append(torch.get_rng_state())
    assert torch.equal(*left), "the loop's random numbers are not touched"
    from avalanche_users import CALLS

    assert CALLS.count("after_eval") >= 2


# ---------------------------------------------------------------------------------------- penalties


def crops(harness: StrategyHarness, state: StepState) -> list[tuple[Tensor, Tensor]]:
    """What a plugin saw in after_training_exp: one crop of every training case."""
    draw = draw_from(state.lesson, Phase(), harness.material(state), seed=0)
    number = state.lesson.number
    return [
        draw((number, case), ("plugin", "end", i, f"{number}/{case}"))
        for i, case in enumerate(state.lesson.cases, 1)
    ]


def penalty_after(harness: StrategyHarness) -> tuple[StepState, Tensor]:
    """The state at the start of step 2 with its weights moved, and the penalty there."""
    state = harness.start(2)
    harness.enter(state)
    perturb(state.model)
    return state, harness.terms(state, harness.crops(state))["penalty"]


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_penalty_of_ewc_is_that_of_a_plain_avalanche_run(harnesses: Any, mode: str) -> None:
    decay = None if mode == "separate" else 0.5
    harness = harnesses(Ewc(ewc_lambda=1e3, mode=mode, decay_factor=decay))  # type: ignore[arg-type]
    after_1 = harness.end(1)
    module = load("clbench.avalanche.plugin_session")
    data = load("avalanche.benchmarks.utils.data").AvalancheDataset
    attribute = load("avalanche.benchmarks.utils.data_attribute").DataAttribute
    experience = load("avalanche.benchmarks.scenarios.dataset_scenario").DatasetExperience
    plugins, training = load("avalanche.training.plugins"), load("avalanche.training.supervised")

    def step(state: StepState) -> Any:
        pairs = crops(harness, state)
        tasks = attribute([0] * len(pairs), "targets_task_labels", use_in_getitem=True)
        made = experience(dataset=data([pairs], data_attributes=[tasks]), current_experience=0)
        made.task_labels, made.origin_stream = [0], type("Stream", (), {"name": "train"})
        return made

    class Spy(plugins.clock.SupervisedPlugin):  # type: ignore[misc, name-defined]
        penalty = 0.0

        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            self.penalty = float(strategy.loss) - float(strategy.criterion())

    def naive(state: StepState, epochs: int, *more: Any) -> Any:
        def loss(out: Tensor, y: Tensor) -> Tensor:
            proxy.context = _PhaseContext(state)
            return proxy.loss_of(out, y)

        model = module.Logits(state.model)
        return training.Naive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-9), criterion=loss,
            train_mb_size=1, train_epochs=epochs, plugins=list(more),
            evaluator=plugins.EvaluationPlugin(),
        )  # fmt: skip

    proxy = object.__new__(module.AvalancheStrategyProxy)
    reference, spy = plugins.EWCPlugin(1e3, mode, decay), Spy()
    naive(after_1, 0, reference).train(step(after_1))
    state, ours = penalty_after(harness)
    two = naive(state, 1, reference, spy)
    two.clock.train_exp_counter = 1
    two.train(step(state))
    assert float(ours) > 0.01
    assert float(ours) == pytest.approx(spy.penalty, rel=1e-4, abs=1e-6)


class _PhaseContext:
    def __init__(self, state: StepState) -> None:
        self.strategy, self.lesson, self.memory = state.strategy, state.lesson, state.memory


def test_fisher_and_penalty_of_ewc_by_hand(harnesses: Any) -> None:
    harness = harnesses(Ewc(ewc_lambda=1e3))
    after_1 = harness.end(1)
    old = {name: p.detach().clone() for name, p in after_1.model.named_parameters()}
    fisher = {name: torch.zeros_like(p) for name, p in old.items()}
    pairs = crops(harness, after_1)
    for image, label in pairs:
        after_1.model.zero_grad()
        batch = harness.crops(after_1)
        batch = type(batch)(
            image=image[None], label=label[None], pseudo=None, structures=batch.structures,
            new=batch.new, cases=("one",),
        )  # fmt: skip
        after_1.model.eval()
        losses = Finetune().losses(batch, after_1.model(batch.image), None, {})
        torch.stack(list(losses.values())).sum().backward()
        for name, p in after_1.model.named_parameters():
            fisher[name] += (torch.zeros_like(p) if p.grad is None else p.grad).pow(2) / len(pairs)
    state, ours = penalty_after(harness)
    new = dict(state.model.named_parameters())
    expected = 1e3 * sum((fisher[n] * (new[n].detach() - old[n]).pow(2)).sum() for n in old)
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)
    grown = [p for name, p in new.items() if name not in old]
    assert grown, "step 2 brings parameters of its own"
    grads = torch.autograd.grad(ours, grown, allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in grads), "nothing holds what is new"


def test_the_importance_of_mas_by_hand(harnesses: Any) -> None:
    harness = harnesses(Mas())
    after_1 = harness.end(1)
    expected = {n: torch.zeros_like(p) for n, p in after_1.model.named_parameters()}
    pairs = crops(harness, after_1)
    for image, _ in pairs:
        after_1.model.zero_grad()
        logits = after_1.model(image[None]).logits
        (logits.pow(2).sum() / logits[:, 0].numel()).backward()
        for name, p in after_1.model.named_parameters():
            expected[name] += (torch.zeros_like(p) if p.grad is None else p.grad.abs()) / len(pairs)
    plugin, _ = plugin_of(harness, after_1)
    assert {k.removeprefix("model.") for k in plugin.importance} == set(expected)
    for name, found in plugin.importance.items():
        torch.testing.assert_close(found.data, expected[name.removeprefix("model.")])
    _, penalty = penalty_after(harness)
    assert float(penalty) > 0


@pytest.mark.parametrize(
    "weak", [Ewc(ewc_lambda=1e-6), Mas(lambda_reg=1e-6)], ids=lambda s: s.plugin
)
def test_a_penalty_that_rounding_swallows_is_none_of_zero(harnesses: Any, weak: Strategy) -> None:
    """Its value is lost beside the loss; its gradient is not, and weights go their own way."""
    harness = harnesses(weak, "train.lr=1e-5")
    harness.end(2)
    values = [e["terms"].get("penalty", 0.0) for e in harness.events[2] if e["event"] == "update"]
    assert values
    assert not any(values)


def test_looking_for_a_gradient_leaves_training_as_it_is(harnesses: Any) -> None:
    looked, free = (
        harnesses(replace(Ewc(ewc_lambda=1e-6), zero_penalty=word), "train.lr=1e-5").end(2)
        for word in ("fault", "allowed")
    )
    assert same(dict(looked.model.state_dict()), dict(free.model.state_dict()))
    assert same(looked.memory, free.memory)


def test_a_penalty_seen_before_a_stop_is_not_asked_for_again(harnesses: Any) -> None:
    harness = harnesses(user("Silent", zero_penalty="fault"))
    module = load("clbench.avalanche.plugin_session")
    state = harness.start(2)
    batch = harness.crops(state)
    for seen in (False, True):
        session = harness.session(state, batch)
        session.context = replace(session.context, updates=2)
        session.last = batch
        if seen:
            session.seen = True
            session.after_update()
            assert state.memory[module.PENALIZED] == 1
            session = harness.session(state, batch)
            session.context, session.last = replace(session.context, updates=2), batch
            session._judge()
        else:
            with pytest.raises(AvalancheError, match="neither a value nor a gradient"):
                session._judge()
    assert module.PENALIZED not in harnesses(Ewc()).end(2).memory


# --------------------------------------------------------------------------------------- stored cases


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_agem_cuts_at_least_one_crop_of_every_earlier_step(harnesses: Any, size: int) -> None:
    """Also where there are more steps than crops: the loader would have batches of none."""
    harness = harnesses(Agem(sample_size=size))
    for number in (2, 3):
        state = harness.start(number)
        batch = harness.crops(state)
        session = harness.session(state, batch)
        plugin = session.proxy.plugins[0]
        with session._moment("looked at"):
            crops, *_ = plugin.sample_from_memory()
        steps, kept = number - 1, 2
        assert len(crops) == steps * min(max(size // steps, 1), kept)
    harness.end(3)


@pytest.mark.parametrize("strategy", [Replay(), Agem()], ids=lambda s: type(s).__name__)
def test_ids_of_stored_cases_do_not_leave_with_a_published_model(
    harnesses: Any, strategy: Strategy
) -> None:
    memory = {**harnesses(strategy).end(1).memory, "own": 1}
    assert stored(memory)
    assert strategy.published(memory) == {"own": 1}


def test_what_a_plugin_knows_of_weights_leaves_with_the_model(harnesses: Any) -> None:
    memory = harnesses(Ewc()).end(1).memory
    assert Ewc().published(memory).keys() == memory.keys()


def test_replay_stores_cases_by_id_and_every_batch_holds_some(harnesses: Any) -> None:
    harness = harnesses(Replay())
    assert stored(harness.end(1).memory) == [(1, case) for case in sorted(harness.lesson(1).cases)]
    state = harness.start(2)
    assert set(state.strategy.extra_cases(state.lesson, state.memory).values()) == {0.0}
    assert {step for step, _ in stored(harness.end(2).memory)} == {1, 2}
    assert not any(isinstance(v, Tensor) and v.numel() > 8 for v in harness.end(2).memory.values())


def test_a_run_of_replay_books_the_cases_and_says_first_how_it_resumes(
    harnesses: Any,
) -> None:
    harness = harnesses(Replay())
    events: list[dict[str, Any]] = []
    folder = run_plan(harness.plan_run("booked"), events.append)
    kinds = [e["event"] for e in events]
    assert kinds.index("note") < kinds.index("step")
    (word,) = [e["what"] for e in events if e["event"] == "note"]
    assert "cannot go on in the middle of a step" in word
    record = run_folder.read_record(folder)
    past = {f"first/{case}" for case in harness.lesson(1).cases}
    assert past <= set(record["ledger"]["2"]["train"])
    assert record["past"] == "cases"
    card = past_card(RunRecord.read(folder))
    assert card.startswith("stored cases: ")
    assert all(case in card for case in past)
    with (folder / "cost.csv").open(newline="") as file:
        costs = list(csv.DictReader(file))
    assert [row["step"] for row in costs] == ["1", "2", "3"]
    assert all(int(row["forward_macs"]) > 0 and float(row["train_s"]) > 0 for row in costs)
    updates = [e for e in events if e["event"] == "update" and e["step"] == 2]
    for event in updates:
        assert sorted(case.split("/")[0] for case in event["cases"]) == ["1", "2"]
    assert checkpoint.load(folder / "step3.pt")["memory"][KEY]
    assert {r.strategy for r in run_folder.read_scores(folder / "scores.csv")} == {"replay"}


def test_agem_takes_out_what_points_against_kept_cases(harnesses: Any) -> None:
    harness = harnesses(Agem())
    state = harness.start(2)
    harness.enter(state)
    seen: list[Tensor] = []
    module = load("clbench.avalanche.plugin_session")
    made: list[Any] = []

    class Spied(module.PluginSession):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PluginSession", Spied)
        harness.terms(state, harness.crops(state))
    (session,) = made
    reference = session.proxy.plugins[0].reference_gradients
    place = 0
    for p in state.model.parameters():
        p.grad = -reference[place : place + p.numel()].view_as(p).clone() + 0.01
        place += p.numel()
        seen.append(p.grad.flatten())
    assert float(torch.cat(seen) @ reference) < 0
    session.after_backward()
    now = torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])
    assert float(now @ reference) == pytest.approx(0.0, abs=1e-3 * float(reference @ reference))


# ------------------------------------------------------------------------------- a user's own plugin


def test_a_users_plugin_keeps_its_model_over_three_steps(harnesses: Any) -> None:
    strategy = user("Teacher", weight="2.5")
    assert strategy.weight == 2.5  # type: ignore[attr-defined]
    assert type(strategy).__name__ == "avalanche_users:Teacher"
    harness = harnesses(strategy)
    state, penalty = penalty_after(harness)
    assert float(penalty) > 0
    plugin, clock = unpack(
        harness.end(3).memory, home="avalanche_users", device=torch.device("cpu"), dataset=list
    )
    assert plugin.notes == {"steps": [0, 1, 2], "loud": False}
    assert clock.train_exp_counter == 3
    assert clock.train_iterations == 6
    mine = {k.removeprefix("model."): v for k, v in plugin.model.state_dict().items()}
    assert same(mine, dict(harness.end(3).model.state_dict()))
    image = harness.crops(state).image
    with torch.no_grad():
        assert torch.equal(plugin.model(image), harness.end(3).model.eval()(image).logits)


def test_a_plugin_of_avalanche_by_its_full_name_is_the_registered_one(harnesses: Any) -> None:
    named = load_strategy(
        "avalanche.training.plugins:EWCPlugin", {"ewc_lambda": str(Ewc().ewc_lambda)}
    )
    ours, theirs = harnesses(Ewc()).end(2), harnesses(named).end(2)
    assert same(dict(ours.model.state_dict()), dict(theirs.model.state_dict()))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Silent", "penalty is exactly 0"),
        ("Hasty", "stops training early"),
        ("Scheduler", "changes the learning rate"),
        ("Unsaved", r"plugin\[0\].stream"),
        ("Empty", "gives no batch"),
        ("Si", "SynapticIntelligencePlugin is refused: it keeps a view"),
    ],
)
def test_what_would_go_wrong_in_silence_is_said(harnesses: Any, name: str, says: str) -> None:
    harness = harnesses(user(name))
    with pytest.raises(AvalancheError, match=says) as err:
        harness.end(2)
    assert err.value.fields()


def test_a_penalty_may_stay_zero_where_that_is_said(harnesses: Any) -> None:
    harnesses(user("Silent", zero_penalty="allowed")).end(2)


@pytest.mark.parametrize(
    "name",
    ["LwFPlugin", "EarlyStoppingPlugin", "LRSchedulerPlugin", "RWalkPlugin", "GEMPlugin", "MIRPlugin",
     "LFLPlugin", "FeatureDistillationPlugin"],
)  # fmt: skip
def test_plugins_known_to_be_wrong_here_are_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(AvalancheError, match=f"{name} is refused: "):
        load_strategy(f"avalanche.training.plugins:{name}", {})


@pytest.mark.parametrize(
    ("spec", "overrides", "kind", "says"),
    [
        ("no_such_module:X", {}, UnknownName, "No module named"),
        (".relative:X", {}, UnknownName, "there is no strategy"),
        ("avalanche_users:Missing", {}, UnknownName, "Missing"),
        ("avalanche_users:NotAPlugin", {}, AvalancheError, "no plugin of Avalanche"),
        ("avalanche_users:Needs", {}, AvalancheError, "needs the argument 'weight'"),
        ("avalanche_users:Teacher", {"weigth": "1"}, ClbenchError, "did you mean strategy.weight"),
    ],
)
def test_a_wrong_name_or_argument_is_explained(
    spec: str, overrides: dict[str, str], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        load_strategy(spec, overrides)


def test_a_strategy_of_clbench_may_be_named_by_module_too() -> None:
    made = load_strategy("clbench.strategies.finetune:Finetune", {"unlabelled": "ignore"})
    assert made == Finetune(unlabelled="ignore")
    assert user("Needs", weight="3").weight == 3  # type: ignore[attr-defined]
    assert "ewc" in registry.entries("strategy")


def test_a_strategy_named_by_module_has_a_folder_of_its_own(
    cache_root: Path, tmp_path: Path
) -> None:
    strategy = user("Teacher")
    harness = StrategyHarness(
        strategy, name="avalanche_users:Teacher", folder=tmp_path, cache=cache_root
    )
    assert harness.plan_run("named").folder.parent.name == "avalanche_users.Teacher"
    assert harness.plan_run("named").strategy_name == "avalanche_users.Teacher"


# ------------------------------------------------------------------------------------------ keeping


def test_state_comes_back_as_it_was() -> None:
    shared = torch.arange(3.0)
    module = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.ReLU())
    value = {
        "a": [1, 2.5, None, True, "x", float("inf")], 3: (shared, shared), "s": {2, 1},
        "d": defaultdict(dict, {0: {"k": shared}}), "o": OrderedDict(z=1, a=2),
        "n": np.arange(4), "t": torch.float16, "v": torch.device("cpu"), "m": module,
        "f": torch.zeros, "c": torch.nn.ReLU, "p": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    packed = pack(value, home="tests")
    again = unpack(copy.deepcopy(packed), home="tests", device=torch.device("cpu"), dataset=list)
    assert list(again) == list(value)
    assert again[3][0] is again[3][1] is again["d"][0]["k"]
    assert same({k: again[k] for k in ("a", 3, "o")}, {k: value[k] for k in ("a", 3, "o")})
    assert again["d"]["new"] == {}
    assert same(again["n"], value["n"])
    assert (again["s"], again["t"], again["v"]) == ({1, 2}, torch.float16, torch.device("cpu"))
    assert again["f"] is torch.zeros
    assert again["c"] is torch.nn.ReLU
    assert isinstance(again["p"], torch.nn.Parameter)
    image = torch.rand(1, 1, 2, 2, 2)
    assert torch.equal(again["m"](image), module(image))
    assert same(pack(value, home="tests"), packed)


@pytest.mark.parametrize(
    "value", [lambda: 0, Path("x"), iter([1]), torch.Generator(), {"deep": [open]}]
)
def test_what_is_more_than_its_attributes_is_refused_by_name(value: object) -> None:
    with pytest.raises(AvalancheError, match="no checkpoint can hold"):
        pack([value], home="tests")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.array(["a"]), "<U1"),
        (np.array([{}]), "|O"),
        (np.arange(3, dtype=">f4"), ">f4"),
        (np.longdouble(1), "float"),
        (defaultdict(partial(dict, a=1)), "defaultdict of partial"),
        (defaultdict(lambda: 0), "defaultdict of <lambda>"),
        (defaultdict(type("int", (), {})), "defaultdict of int"),
    ],
    ids=["text", "objects", "big-endian", "longdouble", "partial", "lambda", "namesake"],
)
def test_what_numpy_and_defaultdict_may_hold_is_refused_by_name(value: object, says: str) -> None:
    with pytest.raises(AvalancheError, match="no checkpoint can hold") as err:
        pack({"deep": [value]}, home="tests")
    assert "plugin.deep[0]" in str(err.value)
    assert says in str(err.value)


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "clbench.run.course:shutil", "torch:load"]
)
def test_a_checkpoint_cannot_name_what_is_not_for_plugins(name: str) -> None:
    tree = f'{{"as": 0, "object": "{name}", "dict": []}}'
    with pytest.raises(AvalancheError, match="names a class"):
        unpack({KEY: tree}, home="tests", device=torch.device("cpu"), dataset=list)
