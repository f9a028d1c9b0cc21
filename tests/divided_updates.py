"""Every strategy taught by two processes, by accumulated batches, and by one large batch.

Two processes are forked from this one, which has imported everything and computes nothing. Both
teach each strategy two steps of the tiny course together, two crops each per update; then one of
them teaches them alone with four crops at once, the other with twice two. All with SGD, for AdamW
turns rounding into steps of its learning rate. Prints how far weights and memory are apart.

    python tests/divided_updates.py --cache CACHE [STRATEGY ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clbench.avalanche.lazy_import import load
from clbench.avalanche.supported import PluginStrategy
from clbench.run import teach as runner
from clbench.run.plan import Plan, load_strategy
from clbench.spec import registry
from clbench.strategy.contract import UNKNOWN, Memory, Strategy
from clbench.testing.harness import StrategyHarness
from clbench.training import batches, loop
from clbench.training.launch import Place
from clbench.training.ranks import Ranks, join

NAMES = [
    name
    for name, entry in registry.entries("strategy").items()
    if entry.value.startswith("clbench.strategies.")
] + [
    "universal pseudo=soft soft_limit_mib=0",
    "decoder_growth ema=0.9 body_range=true",
    "ilt where=old_and_background",
    "lwf_ct head=sigmoid",
    "softmax+mbs+derpp",
]
"""Strategies of clbench, and options that bring losses of their own."""
STEPS = (1, 2)


def made(words: str) -> Strategy:
    """`name option=value …` → the strategy."""
    name, *options = words.split()
    return load_strategy(name, dict(option.split("=") for option in options))


def sgd(groups: Sequence[dict[str, Any]], train: Any, device: torch.device) -> torch.optim.SGD:
    """In place of AdamW."""
    return torch.optim.SGD(groups, lr=train.lr)


def unevenly_known(crop: Callable[..., Any]) -> Callable[..., Any]:
    """Every other crop knows nothing of the last structure, nor of three slices: padding."""

    def cut(volume: Any, names: Sequence[str], **more: Any) -> tuple[Any, ...]:
        image, label, pseudo = crop(volume, names, **more)
        if more["seed"] % 2:
            label[-1] = label[:, :3] = UNKNOWN
        return image, label, pseudo

    return cut


def taught(
    plan: Plan,
    words: str,
    folder: Path,
    ranks: Ranks,
    first_steps: dict[str, tuple[nn.Module, Memory]],
    **sizes: int,
) -> dict[str, Tensor]:
    """Weights, and tensors of the memory, after each step of one update (of plugins: two).

    Args:
        plan: of the tiny course; its strategy is replaced.
        words: the strategy.
        folder: for pseudo labels.
        ranks: the processes that teach together.
        first_steps: strategy of step 1 → what it was taught; filled here.
        **sizes: `batch` and `accumulate`.
    """
    plan = copy.copy(plan)
    plan.strategy, plan.ranks = made(words), ranks
    plan.settings = replace(plan.settings, out=folder)
    plan.catalog.past = plan.strategy.declaration.past
    epochs = 2 if isinstance(plan.strategy, PluginStrategy) else 1
    train = replace(plan.profile.train, epochs=epochs, **sizes)
    plan.profile = replace(plan.profile, train=train)
    model: nn.Module | None = None
    teacher: nn.Module | None = None
    memory: Memory = {}
    after: dict[str, Tensor] = {}
    for number in STEPS:
        strategy = plan.strategy.first_step() if number == 1 else plan.strategy
        plan.catalog.step = number
        first = f"{strategy} {epochs}"
        if number > 1 or first not in first_steps:
            start = runner.Start(model=model, teacher=teacher, memory=memory, ledger={})
            state = runner.start_model(plan, strategy, plan.lesson(number), start)
            runner.make_pseudo_labels(plan, state, lambda event: None)
            material = runner.load_training_data(plan, state, {})
            material = replace(material, patch_vox=(8, 8, 8))
            runner.train_step(plan, state, material, lambda event: None)
            model, memory = state.model, state.memory
        if number == 1:
            if first not in first_steps:
                assert model is not None
                first_steps[first] = copy.deepcopy((model, memory))
            model, memory = copy.deepcopy(first_steps[first])
        assert model is not None
        teacher = copy.deepcopy(plan.strategy.serve(model, memory)).eval().requires_grad_(False)
        kept = {k: v for k, v in memory.items() if isinstance(v, Tensor)}
        after |= {f"{number}/{k}": v.clone() for k, v in {**model.state_dict(), **kept}.items()}
    return after


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of a number, in units of the larger of 1 and the tensor's largest.

    Of half precision, in which logits are stored, only what is beyond its own rounding.
    """
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    largest = 0.0
    for name, value in one.items():
        a, b = value.double(), other[name].double()
        if a.numel():
            gap = float((a - b).abs().max() / a.abs().max().clamp(min=1))
            if value.dtype == torch.float16:
                gap = max(0.0, gap - torch.finfo(torch.float16).eps)
            largest = max(largest, gap)
    return largest


def in_two_processes(work: Callable[[int], None]) -> None:
    """Fork two processes, and wait for both.

    Args:
        work: what each does, by its rank.
    """
    children = []
    for rank in range(2):
        sys.stdout.flush()
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(300)  # nobody waits for a child that hangs
            try:
                torch.set_num_threads(1)
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        raise AssertionError(f"a process failed, see above: {statuses}")


def process(rank: int, plan: Plan, folder: Path, names: Sequence[str]) -> None:
    """What each of the two processes does; the first one writes what came out."""
    loop.adamw = sgd  # type: ignore[assignment]
    batches.crop = unevenly_known(batches.crop)  # type: ignore[attr-defined]
    here = Place(rank=rank, local=rank, size=2, url=f"file://{folder}/meeting")
    ranks, alone = join(here, torch.device("cpu")), Ranks()
    sizes = {"batch": 2, "accumulate": 2} if rank else {"batch": 4}
    together, by_itself = {}, {}
    shared: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for i, name in enumerate(names):
        place = folder / f"{i}"
        together[name] = taught(plan, name, place, ranks, shared[0], batch=2, accumulate=2)
        by_itself[name] = taught(plan, name, place / f"{rank}", alone, shared[1], **sizes)
    whole, accumulated = ranks.gather(by_itself)
    first, second = ranks.gather(together)
    if rank == 0:
        differences = {
            name: {
                "two processes": apart(whole[name], first[name]),
                "between processes": apart(first[name], second[name]),
                "accumulated": apart(whole[name], accumulated[name]),
            }
            for name in names
        }
        (folder / "differences.json").write_text(json.dumps(differences))


def differences(names: Sequence[str], folder: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Strategy → comparison → how far weights and memory are apart.

    Args:
        names: the strategies.
        folder: an empty folder.
        cache: where the phantom is kept.
    """
    for name in names:  # import what the children need
        made(name)
    load("avalanche.training.templates")
    overrides = ("train.lr=0.01", "train.iterations=1")
    harness = StrategyHarness(
        made("finetune"), name="finetune", folder=folder, cache=cache, overrides=overrides
    )
    plan = harness.plan
    in_two_processes(lambda rank: process(rank, plan, folder, names))
    found: dict[str, dict[str, float]] = json.loads((folder / "differences.json").read_text())
    return found


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--cache", type=Path, required=True)
    words.add_argument("names", nargs="*", default=NAMES)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, apart_by in differences(asked.names, Path(folder), asked.cache).items():
            print(f"{name:<40}", *(f"{how}: {gap:.0e}" for how, gap in apart_by.items()))


if __name__ == "__main__":
    main()
