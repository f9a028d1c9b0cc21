"""How much time and memory the slab-wise sliding window takes, beside MONAI's, in one run.

Each side predicts the same long volume with the same network in a process of its own and ends with
the same bit patterns. Prints one JSON object. Run: `python tests/perf/sliding_window.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn

from clbench.evaluation.sliding_window import sliding_slabs


def network(classes: int) -> nn.Module:
    """A network so small that blending, not the network, decides time and memory."""
    torch.manual_seed(0)
    return nn.Conv3d(1, classes, 3, padding=1).eval()


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slabwise(image: np.ndarray, net: nn.Module, patch: int, bits: np.ndarray) -> None:
    """Blend, decode and threshold slab by slab."""
    for start, stop, logits in sliding_slabs(
        lambda x: net(x),
        lambda rows: image[rows],
        image.shape,
        patch_vox=(patch, patch, patch),
        overlap=0.5,
    ):
        for k, channel in enumerate(torch.sigmoid(logits)):
            bits[start:stop] |= (channel > 0.5).numpy().astype(bits.dtype) << bits.dtype.type(k)


def whole(image: np.ndarray, net: nn.Module, patch: int, bits: np.ndarray) -> None:
    """Blend the whole volume with MONAI, then decode and threshold channel by channel."""
    from monai.inferers import sliding_window_inference

    x = torch.from_numpy(image)[None, None]
    logits = sliding_window_inference(x, (patch,) * 3, 1, net, 0.5, mode="gaussian")
    assert isinstance(logits, Tensor)
    for k, channel in enumerate(logits[0]):
        mask = torch.sigmoid(channel) > 0.5
        bits |= mask.numpy().astype(bits.dtype) << bits.dtype.type(k)


def measure(side: str, shape: tuple[int, ...], classes: int, patch: int) -> dict[str, object]:
    """Run one side in this process."""
    import monai.inferers  # noqa: F401  # both sides carry the same libraries

    torch.set_num_threads(1)
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    bits = np.zeros(shape, np.uint16)
    net = network(classes)
    warm = np.zeros((patch, patch, patch), np.float32)
    run = {"slabwise": slabwise, "monai": whole}[side]
    with torch.no_grad():
        run(warm, net, patch, np.zeros(warm.shape, np.uint16))
        before, start = peak_rss_bytes(), time.perf_counter()
        run(image, net, patch, bits)
        wall_s, peak = time.perf_counter() - start, peak_rss_bytes()
    counts = [int(np.count_nonzero(bits >> np.uint16(k) & np.uint16(1))) for k in range(classes)]
    return {
        "wall_s": wall_s,
        "peak_rss_bytes": peak,
        "extra_rss_bytes": peak - before,
        "voxels": counts,
    }


def main() -> None:
    """Measure both sides and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(768, 128, 128))
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--side", choices=("slabwise", "monai"), help="only this side, in-process")
    args = parser.parse_args()
    shape = tuple(args.shape)
    if args.side:
        print(json.dumps(measure(args.side, shape, args.classes, args.patch)))
        return
    found = {}
    for side in ("monai", "slabwise"):
        command = [sys.executable, __file__, "--side", side, "--classes", str(args.classes),
                   "--patch", str(args.patch), "--shape", *map(str, shape)]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
    ours, theirs = found["slabwise"], found["monai"]
    differ = [abs(a - b) for a, b in zip(ours.pop("voxels"), theirs.pop("voxels"), strict=True)]
    ratio = {key: ours[key] / theirs[key] for key in ours}
    print(
        json.dumps(
            {
                "shape": shape,
                "classes": args.classes,
                "patch": args.patch,
                "torch": torch.__version__,
                "monai": theirs,
                "slabwise": ours,
                "ratio_slabwise_to_monai": ratio,
                "largest_difference_in_mask_vox": max(differ),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
