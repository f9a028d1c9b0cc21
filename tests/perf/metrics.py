"""How fast Dice, surface Dice and HD95 of a case are, beside MONAI's, in one run on one thread.

Fourteen organ-like structures; both sides start from what they are given in practice (bit patterns
here, one-hot channels there) and must agree. Prints one JSON object, best of several repetitions.
Run: `python tests/perf/metrics.py`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable

import monai
import numpy as np
import scipy
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from numpy.typing import NDArray

from clbench.evaluation.metrics import overlap, surface

SPACING_MM = (1.5, 1.5, 1.5)


def organs(
    shape: tuple[int, int, int], count: int, seed: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Prediction and truth: ellipsoids of 4 % to 35 % of the volume's sides, edges warped."""
    rng = np.random.default_rng(seed)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    truth = np.zeros(shape, np.uint16)
    pred = np.zeros(shape, np.uint16)
    for k in range(count):
        half = [n * rng.uniform(0.04, 0.35) / 2 for n in shape]
        middle = [rng.uniform(h + 3, n - h - 3) for h, n in zip(half, shape, strict=True)]
        for out, wobble in ((truth, 0.0), (pred, 2.0)):
            move = rng.normal(0, wobble, 3)
            radius = sum(
                ((g - m - d) / h) ** 2 for g, m, d, h in zip(grid, middle, move, half, strict=True)
            )
            wave = 0.08 * np.sin(grid[0] / 7 + k) * np.sin(grid[1] / 5) * np.cos(grid[2] / 6)
            out |= (radius < 1 + wave).astype(np.uint16) << np.uint16(k)
    return pred, truth


def best(work: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Shortest wall time in seconds, and the last result."""
    times, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - start)
    return min(times), found


def main() -> None:
    """Measure both sides and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 160, 200))
    parser.add_argument("--structures", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    shape, count = tuple(args.shape), args.structures
    pred, truth = organs(shape, count, seed=0)
    bits = {str(k): (k, k) for k in range(count)}

    def one_hot(volume: NDArray[np.uint16]) -> torch.Tensor:
        channels = [(volume >> np.uint16(k) & 1).astype(np.float32) for k in range(count)]
        return torch.from_numpy(np.stack(channels))[None]

    p, t = one_hot(pred), one_hot(truth)
    masks = [np.ascontiguousarray(c, dtype=bool) for c in p[0].numpy()]

    def pack() -> NDArray[np.uint16]:
        out = np.zeros(shape, np.uint16)
        for k, mask in enumerate(masks):
            out |= mask.astype(np.uint16) << np.uint16(k)
        return out

    def our_dice() -> list[float]:
        counts = overlap.counts_of(overlap.pattern_pairs(pred, truth), bits)
        return [overlap.dice(c) for c in counts.values()]

    def our_surfaces() -> list[tuple[float, float]]:
        a, b = (surface.surfaces(lambda i, j, v=v: v[i:j], shape) for v in (pred, truth))
        found = []
        for k in range(count):
            d = surface.distances(a.of(k), b.of(k), shape, SPACING_MM)
            found.append((surface.surface_dice(d, 2.0), surface.hd95(d)))
        return found

    def their_dice() -> list[float]:
        metric = DiceMetric(include_background=True, reduction="none")
        return metric(p, t)[0].tolist()

    def their_surfaces() -> list[tuple[float, float]]:
        near = SurfaceDiceMetric([2.0] * count, include_background=True, reduction="none")
        far = HausdorffDistanceMetric(include_background=True, percentile=95, reduction="none")
        a = near(p, t, spacing=SPACING_MM)[0].tolist()
        return list(zip(a, far(p, t, spacing=SPACING_MM)[0].tolist(), strict=True))

    for work in (our_dice, our_surfaces):
        work()  # first calls pay for imports and page faults
    found: dict[str, object] = {}
    for name, ours, theirs in (
        ("dice", our_dice, their_dice),
        ("surface_dice_and_hd95", our_surfaces, their_surfaces),
    ):
        our_s, a = best(ours, args.repeats)
        their_s, b = best(theirs, args.repeats)
        found[name] = {
            "clbench_s": our_s,
            "monai_s": their_s,
            "times_faster": their_s / our_s,
            "largest_difference": float(np.abs(np.asarray(a) - np.asarray(b)).max()),
        }
    # nothing in clbench holds separate masks of a case, but who does pays this per volume
    found["packing_masks_into_bits_s"] = best(pack, args.repeats)[0]
    versions = {m.__name__: m.__version__ for m in (monai, torch, scipy, np)}
    print(json.dumps({"shape": shape, "structures": count, **versions, **found}, indent=2))


if __name__ == "__main__":
    main()
