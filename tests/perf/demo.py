"""How long `make demo` takes in a fresh clone: installation, and the course it runs.

    python tests/perf/demo.py --record

Times are those of the clock, so the machine must be quiet. Prints one JSON object; `--record` adds
a line to `results/calibration/demo.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from clbench import reproducibility

ROOT = Path(__file__).parents[2]
FILE = ROOT / "results" / "calibration" / "demo.csv"


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name, "clbench")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        own = os.environ | {"CLBENCH_CACHE": str(Path(name, "cache"))}  # the phantom is made anew
        seconds = []
        for target in (".venv/.ready", "demo"):
            began = time.monotonic()
            subprocess.run(["make", target], cwd=clone, env=own, check=True, capture_output=True)
            seconds.append(round(time.monotonic() - began, 1))
    host = reproducibility.host(torch.device("cpu"))
    measured = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpu": f"{host['cpu']}, {host['vectors']}",
        "cores": len(os.sched_getaffinity(0)),
        "install_s": seconds[0],
        "course_s": seconds[1],
        "load": round(os.getloadavg()[2], 1),
    }
    print(json.dumps(measured))
    if asked.record:
        new = not FILE.exists()
        with FILE.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, measured, lineterminator="\n")
            if new:
                table.writeheader()
            table.writerow(measured)


if __name__ == "__main__":
    main()
