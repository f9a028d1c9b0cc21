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
from pathlib import Path

import numpy as np
import pandas as pd

from clbench.statistics.equivalence import tost


def case_scores(folder: Path) -> pd.Series:
    """(strategy, test set, case) → mean Dice after the last step, of all runs in the folder."""
    scores = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("*/*/*/scores.csv"))])
    scores = scores[(scores.metric == "dice") & (scores.step == scores.step.max())]
    scores = scores[scores.scoring == scores.scoring.min()].dropna(subset="value")
    by_case: pd.Series = scores.groupby(["bench", "strategy", "eval_set", "case"]).value.mean()
    return by_case


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("folders", nargs=2, type=Path, metavar="RESULTS")
    words.add_argument("--margin", type=float, required=True)
    words.add_argument("--alpha", type=float, default=0.05)
    asked = words.parse_args()
    first, second = (case_scores(folder) for folder in asked.folders)
    both = pd.concat([first, second], axis=1, join="inner", keys=["first", "second"])
    if len(both) < max(len(first), len(second)):
        sys.exit("the folders hold other courses, strategies or cases: make the same runs in both")
    differences = (both["second"] - both["first"]).to_numpy(np.float64)
    test = tost(differences, low=-asked.margin, high=asked.margin)
    alike = np.ptp(differences) == 0 and abs(differences[0]) < asked.margin  # no spread: no test
    answer = {
        "cases": len(differences),
        "means": [round(float(both[name].mean()), 5) for name in ("first", "second")],
        "difference": round(float(differences.mean()), 5),
        "margin": asked.margin,
        "p": None if np.isnan(test.p) else round(test.p, 5),
        "equivalent": bool(alike or test.p <= asked.alpha),
    }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
