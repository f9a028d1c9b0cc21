"""Preprocessing: processor time of one process against the wall clock of several, and its memory.

Writes CTs of random voxels below a temporary folder, prepares them with one process and with as
many as there are cores, and prints the ratio and the peak of bytes per voxel.

    python tests/perf/prepare.py --cases 8 --side 256
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from clbench.data.cache import VolumeCache
from clbench.data.layouts import find_cases
from clbench.run.prepare import PEAK_BYTES_PER_VOXEL, _prepare_case, prepare, voxels
from clbench.spec.benchmark import Preprocessing, Source

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record

SOURCE = Source(name="a", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PRE = Preprocessing(spacing_mm=(1.5, 1.5, 1.5))


def written(folder: Path, cases: int, side: int) -> None:
    """CTs of side × side × side / 2 voxels at 0.8 × 0.8 × 2.5 mm, in the layout of LiTS."""
    rng = np.random.default_rng(0)
    place = np.diag([0.8, 0.8, 2.5, 1.0])
    for i in range(cases):
        image = rng.integers(-200, 300, (side, side, side // 2), dtype=np.int16)
        label = np.zeros(image.shape, np.uint8)
        label[side // 4 : side // 2, side // 4 : side // 2, side // 8 : side // 4] = 1
        for kind, array in (("volume", image), ("segmentation", label)):
            nib.save(nib.Nifti1Image(array, place), folder / f"{kind}-{i}.nii")


class _Catalog:
    """What `prepare` asks of a catalog."""

    def __init__(self, data: Path, cache: Path) -> None:
        from types import SimpleNamespace

        self.cache, self.preprocessing = VolumeCache(cache), PRE
        self.files = {"a": find_cases(data, SOURCE)}
        cases = tuple(self.files["a"])
        self.splits = (SimpleNamespace(train=cases, validation=(), test=()),)
        self.external_splits = ()

    def source(self, number: int) -> Source:
        return SOURCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--one", type=Path, help="prepare one case of this folder, print the peak")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.one is not None:
        with tempfile.TemporaryDirectory() as cache:
            catalog = _Catalog(args.one, Path(cache))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            files = next(iter(catalog.files["a"].values()))
            _prepare_case(Path(cache), (1, SOURCE, files), PRE, os.getpid())
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(more * 1024 / voxels((1, SOURCE, files), PRE))
        return
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        data.mkdir()
        written(data, args.cases, args.side)
        one = subprocess.run(
            [sys.executable, __file__, "--one", str(data)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        print(f"peak {float(one.stdout):.1f} bytes per voxel, reckoned with {PEAK_BYTES_PER_VOXEL}")
        cores = len(os.sched_getaffinity(0))
        seconds = {}
        for jobs in (1, cores):
            catalog = _Catalog(data, Path(name, f"cache{jobs}"))
            os.sync()  # what was written before is on the disk, and takes no time of either side
            start = time.perf_counter()
            assert prepare(catalog, jobs) == args.cases  # type: ignore[arg-type]
            seconds[jobs] = time.perf_counter() - start
        print(
            f"{args.cases} cases: {seconds[1]:.1f} s with one process, {seconds[cores]:.1f} s with "
            f"{cores}: {seconds[1] / seconds[cores]:.2f} times as fast"
        )
        if args.record:
            size = f"{args.side} x {args.side} x {args.side // 2}"
            what = f"preprocessing {args.cases} cases of {size}, one process / {cores}: time"
            ratio = seconds[1] / seconds[cores]
            record([Ratio("tests/perf/prepare.py", what, ratio, ">= 1.8")], threads=1)


if __name__ == "__main__":
    main()
