"""The universal head's blockwise form against three grouped convolutions, in one run: ratios.

`python tests/perf/universal_head.py [classes] [edge]`. Time: fewest processor seconds of some
repetitions, so that a busy machine moves it little; `--clock` takes the seconds that went by, which
is what a user of a busy machine waits for. Memory: what each form needs beyond its inputs, its logits and their gradients, as the growth of the process's
peak resident memory, each form in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from clbench.nets.heads import dynamic_head

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import dynamic_head_plain
from ratios import Ratio, record

Form = Callable[[Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {"plain": dynamic_head_plain, "blockwise": dynamic_head}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    name: str, classes: int, edge: int, repeats: int, threads: int, clock: bool, pipe: Connection
) -> None:
    now = time.perf_counter if clock else time.process_time
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    features = torch.randn(1, 8, edge, edge, edge, requires_grad=True)
    params = torch.randn(1, classes, 153, requires_grad=True)
    weight = torch.randn(1, classes, edge, edge, edge)  # also the size of the logits
    spare = torch.empty_like(weight).fill_(1.0)  # the logits' own room is no overhead
    del spare
    form = FORMS[name]
    before = peak_mb()
    forward, both = [], []
    for _ in range(repeats):
        start = now()
        with torch.no_grad():
            form(features, params)
        forward.append(now() - start)
    for _ in range(repeats):
        features.grad = params.grad = None
        start = now()
        form(features, params).backward(weight)
        both.append(now() - start)
    pipe.send((min(forward), min(both), max(1.0, peak_mb() - before)))


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("classes", type=int, nargs="?", default=32)
    words.add_argument("edge", type=int, nargs="?", default=96)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--threads", type=int, default=torch.get_num_threads())
    words.add_argument("--clock", action="store_true", help="seconds that go by")
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    classes, edge = asked.classes, asked.edge
    seconds = "seconds by the clock" if asked.clock else "processor seconds"
    measured = {}
    for name in FORMS:
        here, there = mp.Pipe()
        process = mp.get_context("spawn").Process(
            target=measure,
            args=(name, classes, edge, asked.repeats, asked.threads, asked.clock, there),
        )
        process.start()
        measured[name] = here.recv()
        process.join()
    print(f"{classes} classes, {edge}^3 voxels, {asked.threads} threads, {seconds}")
    print(f"{'':12}{'forward s':>12}{'fwd+bwd s':>12}{'extra MB':>12}")
    for name, (a, b, c) in measured.items():
        print(f"{name:12}{a:12.3f}{b:12.3f}{c:12.0f}")
    ratio = [q / p for p, q in zip(measured["plain"], measured["blockwise"], strict=True)]
    print(f"{'ratio':12}{ratio[0]:12.3f}{ratio[1]:12.3f}{ratio[2]:12.3f}")
    if asked.record:
        what = f"blockwise head / grouped convolutions, {classes} classes, {edge}^3"
        what += ", by the clock" if asked.clock else ""
        script = "tests/perf/universal_head.py"
        record(
            [
                Ratio(script, f"{what}: forward", ratio[0], "<= 0.0625"),
                Ratio(script, f"{what}: forward and backward", ratio[1], "<= 0.125"),
                Ratio(script, f"{what}: memory", ratio[2]),
            ],
            threads=asked.threads,
        )


if __name__ == "__main__":
    main()
