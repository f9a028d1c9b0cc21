"""What adding up gradients once costs, against torch's DistributedDataParallel (gloo, two processes).

Processor seconds of an update of the small network on one crop per process: forward and backward
pass alone, with one buffer added up afterwards (`clbench.training.update.add_gradients`), and under
DistributedDataParallel, which sends while it still computes.

    python tests/perf/processes.py --updates 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clbench.nets.backbones import small_unet
from clbench.training.launch import Place
from clbench.training.ranks import join
from clbench.training.update import add_gradients

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record


class Summed(nn.Module):
    """The small network, and a number to differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_unet(16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.stack([m.square().mean() for m in self.network(image).values()]).sum()


def measured(update: Callable[[], None], updates: int) -> float:
    """Median processor seconds of an update, the first two left out."""
    spent = []
    for _ in range(updates + 2):
        began = time.process_time()
        update()
        spent.append(time.process_time() - began)
    return statistics.median(spent[2:])


def process(rank: int, folder: Path, updates: int, *, recorded: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here = Place(rank=rank, local=rank, size=2, url=(folder / "meeting").as_uri())
    ranks = join(here, torch.device("cpu"))
    model, image = Summed(), torch.rand(1, 1, 48, 48, 48)
    wrapped = DistributedDataParallel(model)
    trained = list(model.parameters())

    def alone() -> None:
        model.zero_grad(set_to_none=True)
        model(image).backward()

    def once() -> None:
        alone()
        add_gradients(trained, ranks)

    def by_torch() -> None:
        model.zero_grad(set_to_none=True)
        wrapped(image).backward()

    found = {name: measured(update, updates) for name, update in
             (("alone", alone), ("once", once), ("DDP", by_torch))}  # fmt: skip
    if rank == 0:
        found |= {"once / alone": found["once"] / found["alone"],
                  "DDP / alone": found["DDP"] / found["alone"],
                  "megabytes": sum(p.numel() for p in trained) * 4 / 2**20}  # fmt: skip
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
        if recorded:
            what = "two processes, adding up gradients / DistributedDataParallel: time of an update"
            ratio = found["once"] / found["DDP"]
            record([Ratio("tests/perf/processes.py", what, ratio)], threads=1)


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--updates", type=int, default=10)
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                process(rank, Path(folder), asked.updates, recorded=asked.record)
                sys.stdout.flush()
                os._exit(0)
        return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main())
