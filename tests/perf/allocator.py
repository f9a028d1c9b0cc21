"""What keeping freed memory saves and takes on a CPU, beside glibc as it is, in one run.

    python tests/perf/allocator.py --backbone small_unet --size 16 --edge 96

Each side trains the same network in a process of its own, some updates in turns; the fewest
processor seconds of an update count, with its page faults, and the peak of resident memory.
`kept` is glibc told to keep it, `jemalloc kept` (where installed) what runs start with; `--also
jemalloc=PATH` adds a library as it comes, loaded by LD_PRELOAD; `huge` is torch's
THP_MEM_ALLOC_ENABLE. All sides hold their memory at once: where that is too much, leave some out
by `--without`, or measure them one after the other by `--apart`.
Prints one JSON object; `--record` adds the ratios to `results/calibration/ratios.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clbench.evaluation.cost.allocator import environment

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record

SIDES = {
    "glibc": {"CLBENCH_KEEP_MEMORY": "0"},
    "kept": {},
    "huge": {"CLBENCH_KEEP_MEMORY": "0", "THP_MEM_ALLOC_ENABLE": "1"},
    "kept and huge": {"THP_MEM_ALLOC_ENABLE": "1"},
}


def side(backbone: str, size: int, edge: int, threads: int) -> None:
    """One side: an update for each line read, then a line of what it took."""
    import torch

    from clbench.evaluation.cost.allocator import freed_memory, in_use
    from clbench.nets.backbones import new_backbone
    from clbench.spec.settings import BackboneSettings

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    net = new_backbone(BackboneSettings(name=backbone, size=size))
    image = torch.rand(1, 1, edge, edge, edge)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        optimizer.zero_grad()
        loss = torch.stack([m.square().mean() for m in net(image).values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        spent, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF)
        freed_memory().settle()
        took = {
            "cpu_s": spent,
            "system_s": after.ru_stime - before.ru_stime,
            "faults": after.ru_minflt - before.ru_minflt,
            "peak_gib": after.ru_maxrss / 2**20,
            "loss": loss.item().hex(),
            "allocator": in_use(),
            "kept": freed_memory().kept,
        }
        print(json.dumps(took), flush=True)


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--backbone", default="small_unet")
    words.add_argument("--size", type=int, default=16)
    words.add_argument("--edge", type=int, default=96)
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--updates", type=int, default=4)
    words.add_argument("--also", action="append", default=[], metavar="NAME=LIBRARY")
    words.add_argument("--without", action="append", default=[], metavar="SIDE")
    words.add_argument("--apart", action="store_true", help="one side after the other")
    words.add_argument("--record", action="store_true")
    words.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.side:
        side(asked.backbone, asked.size, asked.edge, asked.threads)
        return 0
    sides = SIDES | ({"jemalloc kept": ours} if (ours := environment(os.environ)) else {})
    sides |= {
        name: {"LD_PRELOAD": path} for name, _, path in (w.partition("=") for w in asked.also)
    }
    for name in asked.without:
        del sides[name]
    own = [f"--{name}={getattr(asked, name)}" for name in ("backbone", "size", "edge", "threads")]
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for together in ([name] for name in sides) if asked.apart else (list(sides),):
        processes = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--side", *own],
                env=os.environ | sides[name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in together
        }
        for _ in range(asked.updates):
            for name, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                taken[name].append(json.loads(process.stdout.readline()))
        for process in processes.values():
            process.communicate()
    best = {
        name: min(of[2:], key=lambda t: t["cpu_s"]) | {"peak_gib": of[-1]["peak_gib"]}
        for name, of in taken.items()
    }
    losses = {tuple(t["loss"] for t in of) for of in taken.values()}
    print(json.dumps({"network": own, "equal_losses": len(losses) == 1, **best}))
    for name, of in list(best.items()):
        if ("kept" in name) != of["kept"]:
            print(f"{name}: not recorded, for memory was {'' if of['kept'] else 'not '}kept")
            del best[name]
    if asked.record:
        script = f"tests/perf/allocator.py {' '.join(own[:3])}"
        ratios = [
            Ratio(script, f"{what}, {name} / glibc", best[name][key] / best["glibc"][key])
            for name in best
            if name != "glibc"
            for what, key in (("processor seconds", "cpu_s"), ("peak memory", "peak_gib"))
        ]
        record(ratios, threads=asked.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
