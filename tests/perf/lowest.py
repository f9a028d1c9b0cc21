"""What the worst-learned structure of step 1 reaches, run by run.

    python tests/perf/lowest.py RESULTS [RESULTS …] > results/settling/lowest.csv

Of every finished run below the folders: strict Dice after step 1, the mean over test cases of each
structure; their mean, the lowest of them and its name, beside the setting `train.prior`.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from clbench.store import run_folder
from clbench.store.record import RunRecord


def row(folder: Path) -> tuple[str, float, int, float, float, str] | None:
    """Strategy, prior, seed, mean, lowest, its structure; None: the run is not finished."""
    record = RunRecord.read(folder)
    if record.status != "finished":
        return None
    values: dict[str, list[float]] = defaultdict(list)
    for score in run_folder.read_scores(folder / "scores.csv"):
        asked = (score.step, score.scoring, score.metric) == (1, "strict", "dice")
        if asked and score.value == score.value:
            values[score.structure].append(score.value)
    means = {name: fmean(of) for name, of in values.items()}
    lowest = min(means, key=lambda name: means[name])
    prior = record.identity.profile["train"]["prior"]
    mean = fmean(means.values())
    return record.strategy, prior, record.seed, round(mean, 4), round(means[lowest], 4), lowest


def main() -> None:
    """Print a line per run."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("strategy", "prior", "seed", "mean", "lowest", "structure"))
    folders = [run for name in sys.argv[1:] for run in run_folder.find_runs(Path(name))]
    writer.writerows(sorted(filter(None, map(row, folders))))


if __name__ == "__main__":
    main()
