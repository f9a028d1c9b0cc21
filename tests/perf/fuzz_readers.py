"""How many hostile and odd files the readers were tried on, for the README.

`python tests/perf/fuzz_readers.py [inputs per property] [FILE.csv]`; the properties are those of
`tests/data/test_damaged_files.py`, drawn anew at every call. It stops at the first input that gives neither a
clear error nor the right volume.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
from pathlib import Path


def main(count: int, target: Path | None) -> None:
    os.environ["CLBENCH_FUZZ"] = str(count)
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "data")]
    import test_damaged_files

    rows = []
    for check in test_damaged_files.PROPERTIES:
        what = check.__name__.replace("_", " ")
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
        found = test_damaged_files.tried[what]
        rows.append((what, found.total(), found["accepted"], found["refused"]))
        print(
            f"{what}: {found.total()} tried, {found['accepted']} read, {found['refused']} refused"
        )
    print(f"{sum(r[1] for r in rows)} inputs")
    if target is not None:
        with target.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(("property", "tried", "read", "refused"))
            out.writerows(rows)


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 100,
        Path(sys.argv[2]) if len(sys.argv) > 2 else None,
    )
