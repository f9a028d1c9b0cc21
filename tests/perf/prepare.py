"""What a run does with its files before the first update: one process against several, memory.

Writes packed CTs of a body of noise below a temporary folder, looks at them (hashes, checks) and
preprocesses them with one process and with as many as there are cores, and prints ratios of seconds
that went by and the peak of bytes per voxel.

    python tests/perf/prepare.py --cases 8 --side 256
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from clbench.data.catalog import Catalog, build_catalog
from clbench.data.layouts import find_cases
from clbench.evaluation.cost.meter import _peak_rss_bytes
from clbench.run.prepare import PEAK_BYTES_PER_VOXEL, _look, _prepare_case, look, prepare, voxels
from clbench.spec.benchmark import Benchmark, Preprocessing, Source, Step
from clbench.spec.settings import load_profile
from clbench.spec.splits import Split

sys.path.insert(0, str(Path(__file__).parent))
from ratios import Ratio, record

SOURCE = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PRE = Preprocessing(spacing_mm=(1.5, 1.5, 1.5))


def written(folder: Path, cases: int, side: int) -> None:
    """CTs of side × side × side / 2 voxels of 0.8 × 0.8 × 2.5 mm, in the layout of LiTS, packed."""
    rng = np.random.default_rng(0)
    place = np.diag([0.8, 0.8, 2.5, 1.0])
    at = np.linspace(-1, 1, side)
    body = (at[:, None] ** 2 / 0.8 + at**2 / 0.5 < 1)[..., None]
    for i in range(cases):
        noise = rng.normal(0, 12, (side, side, side // 2)).astype(np.float32)
        image = np.where(body, 40 + noise, -1000 + noise / 8).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        label[side // 4 : side // 2, side // 4 : side // 2, side // 8 : side // 4] = 1
        for kind, array in (("volume", image), ("segmentation", label)):
            nib.save(nib.Nifti1Image(array, place), folder / f"{kind}-{i}.nii.gz")


def opened(data: Path, cache: Path, jobs: int) -> Catalog:
    """A course of one step of all cases, each looked at and checked."""
    cases = sorted(path.name.split("-")[1].split(".")[0] for path in data.glob("volume-*"))
    split = Split(name="all", train=tuple(cases[1:]), test=tuple(cases[:1]))
    step = Step(name="liver", source="lits", learns=("liver",), split=split)
    return build_catalog(
        Benchmark(name="perf", version=1, title="", sources=(SOURCE,), steps=(step,)),
        PRE,
        data=str(data),
        cache_root=cache,
        phantom=load_profile("smoke").phantom,
        look=partial(look, jobs=jobs),
    )


def peak(data: Path, part: str) -> float:
    """Bytes per voxel that looking at a case, or preprocessing it, adds to this process."""
    files = next(iter(find_cases(data, SOURCE).values()))
    case = (1, SOURCE, files)
    before = _peak_rss_bytes()
    with tempfile.TemporaryDirectory() as cache:
        if part == "look":
            _look(Path(cache), case, "notes", os.getpid())
        else:
            _prepare_case(Path(cache), case, PRE, os.getpid())
    return (_peak_rss_bytes() - before) / voxels(case, PRE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--peak", nargs=2, metavar=("PART", "FOLDER"), help="of one case, alone")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.peak:
        print(peak(Path(args.peak[1]), args.peak[0]))
        return
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        data.mkdir()
        written(data, args.cases, args.side)
        for part in ("look", "prepare"):
            one = subprocess.run(
                [sys.executable, __file__, "--peak", part, str(data)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            print(
                f"{part}: {float(one.stdout):.1f} bytes per voxel, taken as {PEAK_BYTES_PER_VOXEL}"
            )
        cores = len(os.sched_getaffinity(0))
        seconds: dict[tuple[str, int], float] = {}
        for jobs in (1, cores):
            os.sync()  # what was written before is on the disk, and takes no time of either side
            start = time.perf_counter()
            catalog = opened(data, Path(name, f"cache{jobs}"), jobs)
            between = time.perf_counter()
            assert prepare(catalog, jobs) == args.cases
            end = time.perf_counter()
            seconds |= {("look", jobs): between - start, ("prepare", jobs): end - between}
            seconds["both", jobs] = end - start
        size = f"{args.side} x {args.side} x {args.side // 2}"
        ratios = []
        for part, said in (
            ("look", "looking at"),
            ("prepare", "preprocessing"),
            ("both", "looking at and preprocessing"),
        ):
            alone, several = seconds[part, 1], seconds[part, cores]
            print(
                f"{said} {args.cases} cases of {size}: {alone:.1f} s with one process, "
                f"{several:.1f} s with {cores}: {alone / several:.2f} times as fast"
            )
            what = f"{said} {args.cases} packed cases of {size}, one process / {cores}: time"
            goal = ">= 1.8" if part != "look" else ""
            ratios.append(Ratio("tests/perf/prepare.py", what, alone / several, goal))
        if args.record:
            record(ratios, threads=1)


if __name__ == "__main__":
    main()
