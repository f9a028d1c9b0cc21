"""What an update of training costs beside its network: processor seconds, as shares and ratios.

    python tests/perf/update.py share      # where the seconds of a step's training go
    python tests/perf/update.py loop       # the loop against a plain one, updates of 1 ms
    python tests/perf/update.py monai      # `universal` on Swin UNETR against MONAI's own step
    python tests/perf/update.py            # all three
    python tests/perf/update.py monai --ours CLBENCH_KEEP_MEMORY=0 --ours THP_MEM_ALLOC_ENABLE=1

`--ours` sets an environment variable of our side alone, here memory as glibc takes and gives it,
in huge pages: MONAI's side is always as it comes.

Prints one JSON object a measurement. Both sides of a ratio are measured in turns in one run, and
the least of the rounds counts, so that other work on the machine moves it little. `--record` adds
the ratios to `results/calibration/ratios.csv`, which the table in `tests/README.md` is made from.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from clbench.evaluation.cost.allocator import environment
from clbench.nets.backbones import new_backbone
from clbench.nets.output import Output
from clbench.run import teach as teaching
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec.settings import BackboneSettings, DataSettings, TrainSettings
from clbench.spec.taxonomy import STRUCTURES
from clbench.store.run_folder import EventLog
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Batch, Kit, Lesson, Memory, Phase, Strategy, Terms
from clbench.training import batches, device_batches, loop, update
from clbench.training.batches import Crops, Material
from clbench.training.monitors import StepMonitor
from clbench.training.resume import StepCheckpointer, TrainingState

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record

SCRIPT = "tests/perf/update.py"


class Stopwatch:
    """Processor seconds by name; those of an inner name are not the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        began = time.process_time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.process_time() - began
            self.seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.running(name):
                return function(*args, **kwargs)

        return wrapper


WORK = ("network, head, loss, backward", "optimizer step")
PARTS = (
    (update.UpdateWork, "gradients", WORK[0]),
    (torch.optim.AdamW, "step", WORK[1]),
    (update, "count_positives", "voxels counted"),
    (batches.Crops, "__getitem__", "crops"),
    (loop, "collate", "crops"),
    (device_batches, "to_batch", "crops"),
    (loop, "reseed", "seeds"),
    (loop, "_gradient_norm", "gradient norm"),
    (loop, "_transfer", "numbers to the host"),
    (loop, "_update_event", "events"),
    (loop, "_save", "saving"),
    (loop, "_validate", "validation"),
)


def share(profile: str, strategy: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Shares of the processor seconds of training, of all steps of a short course."""
    watch = Stopwatch()
    real = teaching.teach

    def teach(step: loop.StepTraining) -> None:
        step = replace(step, watch=watch.timed("events", step.watch))
        with watch.running("the rest"):
            real(step)

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for where, name, part in PARTS:
            timed = watch.timed(part, getattr(where, name))
            stack.enter_context(patch.object(where, name, timed))
        stack.enter_context(patch.object(teaching, "teach", teach))
        run_course(
            RunSettings(
                bench="tumor_ext",
                strategy=strategy,
                profile=profile,
                out=Path(folder),
                overrides=tuple(overrides),
            )
        )
    total = sum(watch.seconds.values())
    shares = {name: round(s / total, 4) for name, s in sorted(watch.seconds.items())}
    return {
        "measurement": "share",
        "profile": profile,
        "strategy": strategy,
        "cpu_s": round(total, 2),
        "shares": shares,
        "outside": round(1 - sum(shares[name] for name in WORK), 4),
    }


class Small(nn.Module):
    """A network whose update takes about a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Output:
        return Output(logits=self.layers(image))


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch.image).logits - batch.label.float()).square().mean()


class Squared(Strategy):
    """Trains everything, by the squared error."""

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        return {"mse": (new.logits - batch.label.float()).square().mean()}


def cut(volume: object, structures: Sequence[str], **more: Any) -> tuple[np.ndarray, ...]:
    """Stands for `clbench.data.crops.crop`: what a crop costs is part of both sides."""
    rng = np.random.default_rng(more["seed"])
    image = rng.random((1, *more["patch_vox"]), dtype=np.float32)
    label = np.concatenate([image > 0.5, image > 0.7]).astype(np.uint8)
    return image, label, None


def overhead(edge: int, updates: int, rounds: int, at_least_ms: float) -> dict[str, Any]:
    """The loop with its log, monitor and checkpointer, against five plain lines.

    Args:
        edge: of the crops to begin with; grows until a plain update takes long enough.
        updates: of a round.
        rounds: of each side.
        at_least_ms: of a plain update.
    """
    cases = ("a", "b")
    lesson = Lesson(
        number=1,
        learns=("liver", "spleen"),
        structures=("liver", "spleen"),
        source="x",
        cases=cases,
    )
    weights = {(1, case): 0.5 for case in cases}
    volumes: Any = dict.fromkeys(weights)

    def material() -> Material:
        patch = (edge,) * 3
        return Material(
            volumes=volumes, weights=weights, pseudo={}, patch_vox=patch, data=DataSettings()
        )

    train = TrainSettings(epochs=1, iterations=updates, batch=1)

    def step(folder: Path, watch: Callable[[dict[str, Any]], None]) -> loop.StepTraining:
        torch.manual_seed(0)
        return loop.StepTraining(
            strategy=Squared(),
            state=TrainingState(model=Small(), memory={}),
            teacher=None,
            lesson=lesson,
            material=material(),
            train=train,
            seed=0,
            device=torch.device("cpu"),
            watch=watch,
            checkpointer=StepCheckpointer(folder / "step1.pt", every_s=300.0),
        )

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            monitor = StepMonitor(lesson, clips=False)
            with EventLog(Path(folder) / "events.jsonl", keep=lambda event: False) as log:

                def watch(event: dict[str, Any]) -> None:
                    log.write(event)
                    monitor.see(event)

                training = step(Path(folder), watch)
                began = time.process_time()
                loop.teach(training)
                return time.process_time() - began

    def plain() -> float:
        training = step(Path(), lambda event: None)
        model, device = training.state.model, training.device
        phase = Phase()
        began = time.process_time()
        crops = Crops(lesson, phase, training.material, epochs=1, per_epoch=updates, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        loader = loop._loader(crops, training, [range(i, i + 1) for i in range(updates)])
        for batch in device_batches.batches_on_device(loader, lesson, device):
            optimizer.zero_grad()
            loss = squared_error(model, batch)
            loss.backward()
            optimizer.step()
            loss.item()
        return time.process_time() - began

    watch = Stopwatch()
    with patch.object(batches, "crop", cut):
        plain()  # the first one warms up
        while min(plain(), plain()) < at_least_ms / 1e3 * updates:
            edge += 1
        best = in_turns({"ours": ours, "plain": plain}, rounds)
        with ExitStack() as stack:
            for where, name, part in (*PARTS, (EventLog, "write", "events")):
                timed = watch.timed(part, getattr(where, name))
                stack.enter_context(patch.object(where, name, timed))
            ours()
    return {
        "measurement": "loop",
        "edge": edge,
        "plain_ms": round(best["plain"] / updates * 1e3, 3),
        "more_us": round((best["ours"] - best["plain"]) / updates * 1e6, 1),
        "ratio": round(best["ours"] / best["plain"], 3),
        "parts_us": {part: round(s / updates * 1e6, 1) for part, s in watch.seconds.items()},
    }


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The least of some rounds of each side, measured in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: min(of[1:]) for name, of in seconds.items()}


# ----------------------------------------------------------------------- against MONAI's own step


def our_updates(edge: int, classes: int, backbone: BackboneSettings, pipe: Connection) -> None:
    """`universal`, with the loop around it; says what each update took, and waits for its turn."""
    names = tuple(STRUCTURES)[:classes]
    lesson = Lesson(number=1, learns=names, structures=names, source="x", cases=("a",))
    strategy = Universal()
    vectors = torch.randn(classes, 512, generator=torch.Generator().manual_seed(0))
    kit = Kit(backbone=lambda: new_backbone(backbone), encode=lambda of: vectors[: len(of)], seed=0)
    turns = Turns(pipe)

    def cut(volume: object, structures: Sequence[str], **more: Any) -> tuple[np.ndarray, ...]:
        return (*drawn(edge, classes), None)

    weights = {(1, "a"): 1.0}
    volumes: Any = dict.fromkeys(weights)
    with patch.object(batches, "crop", cut):
        loop.teach(
            loop.StepTraining(
                strategy=strategy,
                state=TrainingState(model=strategy.build(kit, lesson), memory={}),
                teacher=None,
                lesson=lesson,
                material=Material(
                    volumes=volumes,
                    weights=weights,
                    pseudo={},
                    patch_vox=(edge,) * 3,
                    data=DataSettings(),
                ),
                train=TrainSettings(epochs=1, iterations=turns.count, batch=1),
                seed=0,
                device=torch.device("cpu"),
                watch=lambda event: turns.next() if event["event"] == "update" else None,
            )
        )


def monai_updates(edge: int, classes: int, backbone: BackboneSettings, pipe: Connection) -> None:
    """The same network with an output layer, MONAI's Dice and torch's cross-entropy."""
    from monai.losses import DiceLoss
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=classes, feature_size=backbone.size)
    dice, bce = DiceLoss(sigmoid=True), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    turns = Turns(pipe)
    for _ in range(turns.count):
        image, label = (torch.from_numpy(a)[None] for a in drawn(edge, classes))
        target = label.float()
        optimizer.zero_grad()
        logits = model(image)
        loss = dice(logits, target) + bce(logits, target)
        loss.backward()
        optimizer.step()
        loss.item()
        turns.next()


def drawn(edge: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels."""
    rng = np.random.default_rng(0)
    image = rng.random((1, edge, edge, edge), dtype=np.float32)
    return image, (rng.random((classes, edge, edge, edge), dtype=np.float32) > 0.9).astype(np.uint8)


class Turns:
    """Lets one of several processes work at a time; the first two updates are not counted."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        torch.set_num_threads(1)
        self.count: int = pipe.recv()
        self.began = time.process_time()

    def next(self) -> None:
        self.pipe.send((time.process_time() - self.began, peak_bytes()))
        self.pipe.recv()
        self.began = time.process_time()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def beside_monai(
    edge: int, classes: int, size: int, updates: int, ours: Mapping[str, str]
) -> dict[str, Any]:
    """Processor seconds of an update and peak memory of each side's process.

    Args:
        ours: environment variables that our side's process has besides.
    """
    backbone = BackboneSettings(name="swin_unetr", size=size)
    sides: dict[str, Connection] = {}
    context = multiprocessing.get_context("spawn")
    processes = []
    for name, side in (("ours", our_updates), ("monai", monai_updates)):
        sides[name], there = multiprocessing.Pipe()
        processes.append(context.Process(target=side, args=(edge, classes, backbone, there)))
        started = {**ours, **environment({**os.environ, **ours})}  # as `clbench run` starts
        with patch.dict(os.environ, started if name == "ours" else {}):
            processes[-1].start()
        sides[name].send(updates)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}
    for turn in range(updates):
        for name, pipe in sides.items():
            if turn:
                pipe.send("go")
            spent, peaks[name] = pipe.recv()
            seconds[name].append(spent)
    for pipe, process in zip(sides.values(), processes, strict=True):
        pipe.send("end")
        process.join()
    best = {name: min(of[1:]) for name, of in seconds.items()}
    return {
        "measurement": "monai",
        "edge": edge,
        "classes": classes,
        "size": size,
        "monai_s": round(best["monai"], 2),
        "ratio": round(best["ours"] / best["monai"], 3),
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "memory_ratio": round(peaks["ours"] / peaks["monai"], 3),
    }


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("what", nargs="*", default=["share", "loop", "monai"])
    words.add_argument("--edge", type=int, default=64, help="of the volume beside MONAI")
    words.add_argument("--classes", type=int, default=38)
    words.add_argument("--size", type=int, default=48, help="of Swin UNETR")
    words.add_argument("--updates", type=int, default=4, help="of each side beside MONAI")
    words.add_argument("--ours", action="append", default=[], metavar="NAME=VALUE")
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    torch.set_num_threads(1)
    ratios = []
    if "share" in asked.what:
        # imported by torch's first optimizer: seconds, once a process
        torch.optim.AdamW([torch.zeros(1)]).zero_grad()
        small = ("train.epochs=2", "phantom.train=2", "phantom.validation=1", "phantom.test=1")
        shares = share("quick", "universal", (*small, "examine.overlap=0"))
        print(json.dumps(shares), flush=True)
        what = "share of an update beside network, head, loss and optimizer, quick"
        ratios.append(Ratio(f"{SCRIPT} share", what, shares["outside"], "<= 0.05"))
        ratios += [
            Ratio(f"{SCRIPT} share", f"of it: {part}", value)
            for part, value in shares["shares"].items()
            if part not in WORK
        ]
    if "loop" in asked.what:
        loops = overhead(edge=8, updates=200, rounds=5, at_least_ms=1.0)
        print(json.dumps(loops), flush=True)
        what = "the loop / five plain lines, updates of 1 ms"
        ratios.append(Ratio(f"{SCRIPT} loop", what, loops["ratio"], "<= 1.02"))
    if "monai" in asked.what:
        ours = dict(word.split("=", 1) for word in asked.ours)
        beside = beside_monai(asked.edge, asked.classes, asked.size, asked.updates, ours)
        print(json.dumps(beside), flush=True)
        with_ours = f" ({', '.join(asked.ours)})" if asked.ours else ""
        network = f"universal{with_ours} / MONAI, Swin UNETR {asked.size}, {asked.edge}^3"
        network = f"{network}, {asked.classes} classes"
        ratios.append(Ratio(f"{SCRIPT} monai", f"{network}: time", beside["ratio"], "<= 1.03"))
        memory = Ratio(f"{SCRIPT} monai", f"{network}: memory", beside["memory_ratio"], "<= 1.10")
        ratios.append(memory)
    if asked.record:
        record(ratios, threads=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
