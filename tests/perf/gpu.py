"""How fast a GPU is taught: throughput against a plain MONAI loop, share of time busy, memory.

    python tests/perf/gpu.py --cache CACHE            # on a GPU, within five minutes
    python tests/perf/gpu.py --device cpu --tiny      # the same code with a tiny network, anywhere

Both loops teach the same network (Swin UNETR 48 and a softmax, from the same weights) on the same
phantom volumes, with crops of the same size and as many loader workers. The plain loop is written
as MONAI's tutorials are: dictionary transforms over cached volumes, `DataLoader`, `DiceCELoss`,
AdamW. Then the network alone, contiguous and channels-last, and one volume by sliding windows.
Ratios are of medians; goals are printed beside them. Without a GPU it says so, and what it
prints comes from the tiny network on a CPU: a proof that it runs, and no measurement.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandCropByPosNegLabeld,
    RandRotate90d,
    RandShiftIntensityd,
    SpatialPadd,
)
from torch import nn

from clbench.evaluation.cost.meter import Meter
from clbench.run import teach as runner
from clbench.run.models import predictor
from clbench.run.plan import Plan, RunSettings, load_strategy, resolve
from clbench.run.teach import StepState
from clbench.testing.harness import StrategyHarness
from clbench.training.batches import Material
from clbench.training.device_batches import loader_workers

STRATEGY = "softmax_finetune"
ON_GPU = (
    "phantom.train=4", "phantom.validation=1", "phantom.test=1", "phantom.spacing_mm=3",
    "data.spacing_mm=3,3,3", "train.epochs=1", "train.warmup=0",
)  # fmt: skip
"""Of the profile `paper`: four volumes larger than its crops of 96 voxels a side."""
WARM_UP = 3
"""Updates left out at the start of each loop."""
SAMPLE_MS = 200
"""Between two looks at how busy the GPU is."""


def planned(device: torch.device, cache: Path, folder: Path, *, tiny: bool) -> Plan:
    """What is taught.

    Args:
        device: where.
        cache: of the phantom and its volumes.
        folder: an empty one.
        tiny: the network and the course of the rules' kit.
    """
    if tiny:
        strategy = load_strategy(STRATEGY, {})
        return StrategyHarness(strategy, name=STRATEGY, folder=folder, cache=cache).plan
    settings = RunSettings(
        bench="tumor_ext",
        strategy=STRATEGY,
        profile="paper",
        out=folder,
        overrides=ON_GPU,
        cache=cache,
        device=str(device),
    )
    return resolve(settings).open()


def started(plan: Plan) -> tuple[StepState, Material]:
    """The first step, before its first update."""
    plan.catalog.step = 1
    start = runner.Start(model=None, teacher=None, memory={}, ledger={})
    state = runner.start_model(plan, plan.strategy.first_step(), plan.lesson(1), start)
    return state, runner.load_training_data(plan, state, {})


def taught(plan: Plan, state: StepState, material: Material, updates: int) -> list[float]:
    """Seconds between updates of clbench's loop.

    Args:
        plan: gives the settings.
        state: of the step; its model is trained.
        material: volumes.
        updates: of the phase.
    """
    plan = copy.copy(plan)
    train = replace(plan.profile.train, epochs=1, iterations=updates, accumulate=1)
    plan.profile = replace(plan.profile, train=train)
    ends: list[float] = []
    runner.train_step(
        plan,
        state,
        material,
        lambda event: ends.append(time.perf_counter()) if event["event"] == "update" else None,
    )
    return [b - a for a, b in itertools.pairwise(ends)]


def taught_plainly(
    plan: Plan, model: nn.Module, material: Material, structures: Sequence[str], updates: int
) -> list[float]:
    """Seconds between updates of a loop as MONAI's tutorials write it.

    Args:
        plan: gives batch size, crop size, learning rate and precision.
        model: image → an output with `logits`, background first; it is trained.
        material: volumes.
        structures: of the step; a voxel of several counts as the last.
        updates: of the loop.
    """
    train, patch = plan.profile.train, material.patch_vox
    whole = (slice(None),) * 3
    cases = []
    for volume in material.volumes.values():
        labels = volume.labels(structures, whole) == 1
        classes = np.zeros(labels.shape[1:], np.uint8)
        for k, mask in enumerate(labels, 1):
            classes[mask] = k
        cases.append({"image": volume.windowed(whole)[None], "label": classes[None]})
    both = ["image", "label"]
    transforms = Compose([
        SpatialPadd(both, patch),
        RandCropByPosNegLabeld(both, "label", patch, pos=2, neg=1, num_samples=1),
        RandRotate90d(both, prob=0.1, spatial_axes=(0, 1)),
        RandShiftIntensityd("image", offsets=0.1, prob=0.2),
        EnsureTyped(both),
    ])  # fmt: skip
    count = updates * train.batch
    dataset = Dataset([cases[i % len(cases)] for i in range(count)], transforms)
    loader = DataLoader(
        dataset,
        batch_size=train.batch,
        shuffle=True,
        num_workers=loader_workers(None, plan.device),
        pin_memory=plan.device.type == "cuda",
    )
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr)
    mixed = train.amp == "bf16"
    ends = []
    model.requires_grad_(True).train()
    for batch in loader:
        image, label = (batch[name].to(plan.device) for name in both)
        optimizer.zero_grad()
        with torch.autocast(plan.device.type, dtype=torch.bfloat16, enabled=mixed):
            loss = loss_of(model(image).logits, label)
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(ends)]


@contextmanager
def utilization(device: torch.device) -> Iterator[list[float]]:
    """Percent of time in which the GPU computed, by samples of nvidia-smi; empty without it.

    Args:
        device: the GPU.
    """
    samples: list[float] = []
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        yield samples
        return
    command = [
        program, f"--id={device.index or 0}", "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield samples
        finally:
            process.terminate()
            said = process.communicate()[0].split()
            samples += [float(word) for word in said if word.replace(".", "").isdigit()]


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of some work, the first time left out.

    Args:
        work: what to do.
        device: waited for afterwards.
        repeats: times it is measured.
    """
    spent = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def by_format(model: nn.Module, plan: Plan, repeats: int) -> float:
    """How many times as long forward and backward pass take channels-last as contiguous.

    Args:
        model: a copy of it is used.
        plan: gives batch, crop and device.
        repeats: times each is measured.
    """
    shape = (plan.profile.train.batch, 1, *plan.catalog.preprocessing.patch_vox)
    seconds = []
    for form in (torch.contiguous_format, torch.channels_last_3d):
        network = copy.deepcopy(model).to(plan.device)
        for weight in network.parameters():
            if weight.dim() == 5:
                weight.data = weight.data.to(memory_format=form)
        image = torch.rand(shape, device=plan.device).to(memory_format=form)

        def update(network: nn.Module = network, image: torch.Tensor = image) -> None:
            network.zero_grad()
            network(image).logits.square().mean().backward()

        seconds.append(seconds_of(update, plan.device, repeats))
    return seconds[1] / seconds[0]


def by_windows(state: StepState, plan: Plan, material: Material) -> tuple[float, int]:
    """How many times as fast a volume is predicted as by one window at a time, and by how many.

    Args:
        state: gives strategy and model.
        plan: of the run.
        material: of its volumes the first is predicted.
    """
    volume = next(iter(material.volumes.values()))
    lesson, seconds, fits = state.lesson, [], 1
    for windows in (1, None):
        server = predictor(plan, state.strategy, state.model, lesson.structures, state.memory)
        server.windows = windows
        seconds.append(seconds_of(lambda s=server: s.predict(volume), plan.device, 1))
        fits = server.count.now
    return seconds[0] / seconds[1], fits


def measured(plan: Plan, updates: int) -> Iterator[str]:
    """The report, line by line.

    Args:
        plan: what is taught.
        updates: of each loop, `WARM_UP` of them left out.
    """
    state, material = started(plan)
    model = copy.deepcopy(state.model).cpu()  # each loop has the device to itself
    train, gpu = plan.profile.train, plan.device.type == "cuda"
    patch = "x".join(map(str, material.patch_vox))
    yield (
        f"{sum(p.numel() for p in model.parameters()):,} parameters, batch {train.batch}, crops "
        f"{patch}, amp={train.amp}, {loader_workers(None, plan.device)} loader workers"
    )
    key = "peak_cuda_bytes" if gpu else "peak_rss_bytes"
    rates, peaks = [], []
    loops = (
        ("clbench", lambda: taught(plan, state, material, updates)),
        (
            "plain MONAI",
            lambda: taught_plainly(
                plan, model.to(plan.device), material, state.lesson.structures, updates
            ),
        ),
    )
    for name, loop in loops:
        meter = Meter(plan.device)
        with utilization(plan.device) as samples:
            seconds = loop()[WARM_UP - 1 :]
        rates.append(train.batch / statistics.median(seconds))
        peaks.append(meter.peaks()[key])
        state.model.zero_grad()
        state.model.cpu()
        busy = f"{statistics.mean(samples):.0f} % busy (goal 90 %)" if samples else "not sampled"
        yield (
            f"{name:12} {rates[-1]:8.2f} crops/s, GPU {busy}, peak {peaks[-1] / 2**30:.2f} GiB "
            f"{'on the GPU' if gpu else 'resident'}"
        )
    yield f"throughput of clbench against plain MONAI: {rates[0] / rates[1]:.2f}x (goal 1.3x)"
    yield f"peak memory against plain MONAI: {peaks[0] / peaks[1]:.2f}x"
    model.cpu()
    ratio = by_format(state.model, plan, 3)
    yield f"forward and backward pass, channels-last against contiguous: {ratio:.2f}x the time"
    state.model.to(plan.device)
    faster, fits = by_windows(state, plan, material)
    yield f"sliding windows, {fits} at once against one at a time: {faster:.2f}x as fast"


def main(words: Sequence[str] | None = None) -> int:
    """Print the report; 0 also where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny network of the rules' kit")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--amp", choices=("off", "bf16"), default="off")
    parser.add_argument("--cache", type=Path, help="keeps the phantom between calls")
    asked = parser.parse_args(words)
    device, tiny = torch.device(asked.device), asked.tiny
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible: nothing is measured; a dry run of the same code on the CPU:")
        device, tiny = torch.device("cpu"), True
    updates = max(asked.updates if device.type == "cuda" else 4, WARM_UP + 1)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    with tempfile.TemporaryDirectory(prefix="clbench-gpu-") as folder:
        home = Path(folder)
        plan = planned(device, asked.cache or home / "cache", home, tiny=tiny)
        train = replace(plan.profile.train, amp=asked.amp)
        plan.profile = replace(plan.profile, train=train)
        for line in measured(plan, updates):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
