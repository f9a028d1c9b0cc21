"""Are the scores of two folders of runs equal within a margin, such as with `train.amp` bf16 and off?

    for amp in off bf16; do clbench run --bench tumor_ext --strategy universal --seeds 0-4 \\
        --set train.amp=$amp --out results_$amp; done
    python tests/perf/precision.py results_off results_bf16 --margin 0.01

Per test case the mean Dice over structures after the last step, averaged over the seeds; two
one-sided paired t-tests over cases (`clbench.statistics.equivalence`). The margin is declared
before looking. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clbench.statistics.equivalence import tost

SCORING = "strict"
CASE = ["eval_set", "case"]


def dice_of(folder: Path, bench: str, strategy: str) -> pd.DataFrame:
    """Dice of all runs of a strategy on a course, one row per seed, step, case and structure."""
    paths = sorted(folder.glob(f"{bench}/{strategy}/*/scores.csv"))
    if not paths:
        sys.exit(f"there is no run of {strategy} on {bench} in {folder}")
    scores = pd.concat([pd.read_csv(path) for path in paths])
    scores = scores[(scores.metric == "dice") & (scores.scoring == SCORING)]
    return scores.dropna(subset="value")


def case_scores(scores: pd.DataFrame) -> pd.Series:
    """(test set, case) → mean Dice after the last step, over structures and seeds."""
    last = scores[scores.step == scores.step.max()]
    by_case: pd.Series = last.groupby(CASE).value.mean()
    return by_case


def compare(
    folders: Sequence[Path], bench: str, strategy: str, *, margin: float, alpha: float = 0.05
) -> dict[str, Any]:
    """Whether the runs of two folders score alike.

    Args:
        folders: the two.
        bench: the course.
        strategy: whose runs.
        margin: of equivalence, in Dice.
        alpha: level of the test.
    """
    first, second = (case_scores(dice_of(folder, bench, strategy)) for folder in folders)
    both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"])
    if len(both) < max(len(first), len(second)):
        sys.exit("the folders hold other cases: make the same runs in both")
    differences = (both["second"] - both["first"]).to_numpy(np.float64)
    test = tost(differences, low=-margin, high=margin)
    alike = np.ptp(differences) == 0 and abs(differences[0]) < margin  # no spread: no test
    return {
        "cases": len(differences),
        "means": [round(float(both[name].mean()), 5) for name in ("first", "second")],
        "difference": round(float(differences.mean()), 5),
        "margin": margin,
        "p": None if np.isnan(test.p) else round(test.p, 5),
        "equivalent": bool(alike or test.p <= alpha),
    }


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("folders", nargs=2, type=Path, metavar="RESULTS")
    words.add_argument("--bench", default="tumor_ext")
    words.add_argument("--strategy", default="universal")
    words.add_argument("--margin", type=float, required=True)
    words.add_argument("--alpha", type=float, default=0.05)
    asked = words.parse_args()
    answer = compare(
        asked.folders, asked.bench, asked.strategy, margin=asked.margin, alpha=asked.alpha
    )
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
