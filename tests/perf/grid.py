"""How long a grid takes, as a ratio to the same runs one after another, in one run.

One after another: a process of `clbench run` each, with as many threads as there are cores. As a
grid: `clbench grid`, processes of one thread. Scores of the grid must equal, to the bit, those of
single runs of one thread: the first run is made a third time to see. That one, alone with one
thread, over the same with all threads and divided by the cores, is what the grid could reach at
best if its runs had nothing to share: `at_best`. Times are those of the clock, so the machine must
be quiet; `load` says how many processes wanted its cores meanwhile. Prints one JSON object.
Run: `python tests/perf/grid.py --epochs 4`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record

CLBENCH = str(Path(sys.executable).with_name("clbench"))


def seconds(commands: Sequence[Sequence[str]]) -> float:
    """How long the commands take, one after the other."""
    start = time.monotonic()
    for words in commands:
        subprocess.run([CLBENCH, *words], check=True, capture_output=True)
    return round(time.monotonic() - start, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=["universal", "finetune", "lwf"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    same = [
        "--bench",
        "tumor_ext",
        "--profile",
        args.profile,
        "--set",
        f"train.epochs={args.epochs}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = ["--cache", f"{folder}/cache"]
        first = ["--strategy", args.strategies[0], "--seed", "0"]
        single = ["run", *same, *cache, *first, "--threads", "1", "--out", f"{folder}/single"]
        seconds([single])  # prepares the data, too, which counts for neither side
        loop = [
            [
                *("run", *same, *cache, "--strategy", strategy, "--seed", str(seed)),
                *("--threads", str(cores), "--out", f"{folder}/loop"),
            ]
            for strategy, seed in itertools.product(args.strategies, range(args.seeds))
        ]
        asked = [w for strategy in args.strategies for w in ("--strategy", strategy)]
        grid = ["grid", *same, *cache, *asked, "--seeds", f"0-{args.seeds - 1}"]
        one_s, all_s = seconds([[*single, "--fresh"]]), seconds(loop[:1])
        measured = {
            "runs": len(loop),
            "cores": cores,
            "loop_s": round(all_s + seconds(loop[1:]), 1),
            "grid_s": seconds([[*grid, "--out", f"{folder}/grid"]]),
            "at_best": round(one_s / cores / all_s, 3),
        }
        kind = f"tumor_ext/{args.strategies[0]}/*/scores.csv"
        (alone,) = Path(folder, "single").glob(kind)
        twin = Path(folder, "grid", *alone.relative_to(Path(folder, "single")).parts)
        measured["ratio"] = round(measured["grid_s"] / measured["loop_s"], 3)
        measured["load"] = round(os.getloadavg()[2], 1)
        measured["equal_bits"] = alone.read_bytes() == twin.read_bytes()
    print(json.dumps(measured))
    if args.record:
        what = f"grid of {len(loop)} runs, two processes of one thread / one after another, "
        what += f"{cores} threads: time"
        script = f"tests/perf/grid.py --epochs {args.epochs}"
        best = f"a run with one thread / with {cores}, over {cores} cores: time"
        record(
            [
                Ratio(script, what, measured["ratio"], "<= 0.60"),
                Ratio(script, best, measured["at_best"]),
            ],
            threads=1,
        )


if __name__ == "__main__":
    main()
