"""The universal head's blockwise form against three grouped convolutions, in one run: ratios.

`python tests/perf/universal_head.py [classes] [edge]`. Time: best of some repetitions. Memory: what
each form needs beyond its inputs, its logits and their gradients, as the growth of the process's
peak resident memory, each form in a process of its own.
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import dynamic_head_plain

Form = Callable[[Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {"plain": dynamic_head_plain, "blockwise": dynamic_head}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, classes: int, edge: int, repeats: int, pipe: Connection) -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 8, edge, edge, edge, requires_grad=True)
    params = torch.randn(1, classes, 153, requires_grad=True)
    weight = torch.randn(1, classes, edge, edge, edge)  # also the size of the logits
    spare = torch.empty_like(weight).fill_(1.0)  # the logits' own room is no overhead
    del spare
    form = FORMS[name]
    before = peak_mb()
    forward, both = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            form(features, params)
        forward.append(time.perf_counter() - start)
    for _ in range(repeats):
        features.grad = params.grad = None
        start = time.perf_counter()
        form(features, params).backward(weight)
        both.append(time.perf_counter() - start)
    pipe.send((min(forward), min(both), max(1.0, peak_mb() - before)))


def main() -> None:
    classes = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    edge = int(sys.argv[2]) if len(sys.argv) > 2 else 96
    found = {}
    for name in FORMS:
        here, there = mp.Pipe()
        process = mp.get_context("spawn").Process(
            target=measure, args=(name, classes, edge, 3, there)
        )
        process.start()
        found[name] = here.recv()
        process.join()
    print(f"{classes} classes, {edge}^3 voxels, {torch.get_num_threads()} threads")
    print(f"{'':12}{'forward s':>12}{'fwd+bwd s':>12}{'extra MB':>12}")
    for name, (a, b, c) in found.items():
        print(f"{name:12}{a:12.3f}{b:12.3f}{c:12.0f}")
    ratio = [p / q for p, q in zip(found["plain"], found["blockwise"], strict=True)]
    print(f"{'ratio':12}{ratio[0]:11.1f}x{ratio[1]:11.1f}x{ratio[2]:11.1f}x")


if __name__ == "__main__":
    main()
