"""How far `clbench plan` is from measured runs: forecasts beside the records of finished ones.

    python tests/perf/plan.py --results results/reference --record

Each strategy is tried on this machine, as busy as it is, in a process of its own, and compared with
finished runs of the same settings in the folder, whichever machine made them: their seconds, and
the highest resident memory of any of their steps. Prints a line each; `--record` writes
`results/calibration/plan.csv`.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from clbench.grid.forecast import forecast
from clbench.run.plan import RunSettings, resolve

ROOT = Path(__file__).parents[2]
STRATEGIES = ("universal", "finetune", "decoder_growth", "der", "mib", "joint")


def compared(bench: str, strategy: str, results: Path) -> dict[str, Any]:
    """The forecast of a strategy beside what its finished runs took."""
    settings = RunSettings(
        bench=bench, strategy=strategy, profile="quick", out=results, threads=1, device="cpu"
    )
    ahead = forecast(resolve(settings))
    memory = sum(ahead.measured_bytes) / max(1, len(ahead.measured_bytes))
    return {
        "bench": bench,
        "strategy": strategy,
        "forecast_s": round(ahead.total_s, 1),
        "runs": len(ahead.measured_s),
        "measured_s": round(sum(ahead.measured_s) / max(1, len(ahead.measured_s)), 1),
        "error": round(ahead.error, 3),
        "forecast_gib": round(ahead.peak_bytes / 2**30, 3),
        "measured_gib": round(memory / 2**30, 3),
        "memory_error": round(ahead.memory_error, 3),
        "trial_s": round(ahead.trial_s, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--results", type=Path, default=ROOT / "results" / "reference")
    words.add_argument("--bench", default="tumor_ext")
    words.add_argument("--strategies", nargs="+", default=STRATEGIES)
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    rows = []
    for strategy in asked.strategies:
        apart = multiprocessing.get_context("spawn")  # peaks of memory are of a process
        with ProcessPoolExecutor(1, apart) as pool:
            rows.append(pool.submit(compared, asked.bench, strategy, asked.results).result())
        print(rows[-1], flush=True)
    if asked.record:
        path = ROOT / "results" / "calibration" / "plan.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
