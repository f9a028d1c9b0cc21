"""How long `clbench report` takes, as a ratio against another checkout's clbench, in one run.

Both write the report of the stored reference runs, in turn; times are those of the processor, so
that other work on the machine counts little. Prints one JSON object. Without another checkout the
time of this one alone. Run: `python tests/perf/report.py --other OTHER/.venv/bin/clbench`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def cpu_s(command: str, results: Path, bench: str) -> float:
    """Seconds of processor time, user and system, that one report takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as out:
        words = [command, "report", "--bench", bench, "--ref", "universal"]
        subprocess.run(
            [*words, "--results", str(results), "--out", out], check=True, capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", help="clbench of another checkout; default none")
    parser.add_argument("--bench", default="tumor_ext")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reference")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    mine = str(Path(sys.executable).with_name("clbench"))
    times: dict[str, list[float]] = {"this": [], "other": []}
    for _ in range(args.rounds):
        for name, command in (("this", mine), ("other", args.other)):
            if command:
                times[name].append(round(cpu_s(command, args.results.resolve(), args.bench), 2))
    found: dict[str, object] = {f"{name}_s": each for name, each in times.items() if each}
    if times["other"]:
        found["ratio"] = round(min(times["this"]) / min(times["other"]), 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
