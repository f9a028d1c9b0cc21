"""Peak memory of `clbench predict` against the length of a CT of 512 x 512 pixels.

Each length is predicted in a process of its own, by a network of one layer (what is measured is
everything around it) and with the grid, patch and number of structures of a paper run. Prints one
JSON object: MiB at the peak above those before the CT was read, per length, and MiB a slice between
the two longest. `--slab-mib` sets the memory of the slabs, which is 2048 where a user predicts. Run:
`python tests/perf/predict_memory.py [--slices 250 500 1000] [--slab-mib 2048]`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn

from clbench.deployment import predict
from clbench.deployment.inputs import find_inputs
from clbench.deployment.predict import output_form, predict_cases
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.output import Output
from clbench.spec import registry
from clbench.spec.benchmark import Preprocessing

PIXELS = 512
MM = (0.8, 0.8, 1.0)
STRUCTURES = registry.benchmark("tumor_ext").structures(2)


class OneLayer(nn.Module):
    """(B, 1, D, H, W) → an `Output` of as many logits as there are structures."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, len(STRUCTURES), 1)

    def forward(self, image: torch.Tensor) -> Output:
        """Logits of the crops."""
        return Output(logits=self.layer(image), features={})


def trained() -> Any:
    """Stands in for a `TrainedModel` of a paper run."""
    torch.manual_seed(0)
    pre = Preprocessing()
    server = VolumePredictor(
        OneLayer(), lambda logits, names: logits.sigmoid(), STRUCTURES, patch_vox=pre.patch_vox
    )
    record = SimpleNamespace(
        run_id="0",
        identity=SimpleNamespace(bench="tumor_ext"),
        strategy="universal",
        seed=0,
        threads=1,
        with_defaults={},
    )
    source = registry.benchmark("tumor_ext").source("lits")
    return SimpleNamespace(
        record=record,
        structures=STRUCTURES,
        step=2,
        digest="0",
        postprocess=True,
        preprocessing=pre,
        source=source,
        server=server,
        enough_memory=lambda case: __import__("contextlib").nullcontext(),
    )


def write_ct(path: Path, slices: int) -> None:
    """A noisy cylinder in air."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:PIXELS, :PIXELS] - PIXELS / 2
    inside = (x / 230) ** 2 + (y / 180) ** 2 < 1
    voxels = np.full((PIXELS, PIXELS, slices), -1000, dtype=np.int16, order="F")
    for z in range(slices):
        voxels[..., z][inside] = rng.integers(-100, 200, int(inside.sum()))
    nib.save(nib.Nifti1Image(voxels, np.diag([*MM, 1.0])), path)


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path, slab_mib: int) -> None:
    """Predict one CT and print the peak above the start."""
    torch.set_num_threads(1)
    predict.SLAB_BYTES = slab_mib << 20
    model = trained()
    before = peak_mib()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder)
        form = output_form("labels", STRUCTURES)
        batch = predict_cases(model, find_inputs(path, out=out), out=out, form=form)
    if not batch.predicted:
        raise next(iter(batch.refused.values()))
    print(json.dumps({"mib": peak_mib() - before, "seconds": time.monotonic() - start}))


def main() -> None:
    """Measure every length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--slab-mib", type=int, default=predict.SLAB_BYTES >> 20)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        measure(options.case, options.slab_mib)
        return
    found: dict[str, Any] = {
        "pixels": PIXELS,
        "mm": MM,
        "structures": len(STRUCTURES),
        "slab_mib": options.slab_mib,
    }
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for slices in sorted(options.slices):
            path = Path(folder) / "ct.nii"
            write_ct(path, slices)
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--case",
                    path,
                    "--slab-mib",
                    str(options.slab_mib),
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            found[f"{slices} slices"] = json.loads(done.stdout)
            print(f"{slices} slices: {done.stdout.strip()}", file=sys.stderr, flush=True)
            peaks[slices] = found[f"{slices} slices"]["mib"]
    if len(peaks) > 1:
        *_, (a, low), (b, high) = sorted(peaks.items())
        found["mib_a_slice"] = (high - low) / (b - a)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
