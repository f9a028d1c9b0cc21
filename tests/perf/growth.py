"""How time and memory grow with classes, steps, cases and the volume: ratios, and a picture.

    python tests/perf/growth.py --record   # results/calibration/growth.csv and growth.png

Of training, and of the examination of a case (prediction by windows, and its scores).
Processor seconds (the least of some rounds) and the growth of peak resident memory, each point in
a forked process of its own, on one thread; freed memory goes back to the system, for how much would
be kept depends on what the machine has left, not on the work alone. Each row is compared with the
first of its kind; `work` is how much more there is to do. Whatever grows faster than its work is a fault, or is explained.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import nibabel as nib
import numpy as np
import torch

from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.volume import preprocess
from clbench.evaluation.cost.allocator import SWITCH
from clbench.evaluation.cost.meter import forget_peak
from clbench.evaluation.scoring import ScoreContext, score_case
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.backbones import new_backbone
from clbench.spec.benchmark import Preprocessing, Source
from clbench.spec.settings import BackboneSettings, DataSettings, TrainSettings
from clbench.spec.taxonomy import STRUCTURES
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Kit, Lesson
from clbench.training import batches, loop
from clbench.training.batches import Material
from clbench.training.resume import TrainingState

FOLDER = Path(__file__).parents[2] / "results" / "calibration"
POINTS = {
    "classes": (1, 4, 16, 48, 143),
    "steps": (1, 2, 4, 8, 16),
    "cases": (4, 16, 64),
    "voxels": (32, 48, 64),
    "examined classes": (1, 4, 16, 40),
    "examined windows": (1, 27, 125),
}
"""What grows → its values; of a crop its edge. Windows: of an examined volume."""
ROUNDS = 3


def training(classes: int, steps: int, cases: int, edge: int, updates: int) -> Callable[[], float]:
    """A step of `universal` on the small network → a function that teaches it, in seconds.

    Args:
        classes: that the model knows; known structures by number above those of the taxonomy.
        steps: in which it learned them, one after the other.
        cases: training cases of the last step.
        edge: voxels of a crop's side.
        updates: of the last step.
    """
    names = [*STRUCTURES, *(f"structure_{i}" for i in range(classes))][:classes]
    vectors = torch.randn(classes, 512, generator=torch.Generator().manual_seed(0))
    kit = Kit(
        backbone=lambda: new_backbone(BackboneSettings(name="small_unet", size=16)),
        encode=lambda of: vectors[[names.index(name) for name in of]],
        seed=0,
    )
    strategy, lessons = Universal(), []
    for number, learned in enumerate(np.array_split(np.array(names), steps), 1):
        known = names[: names.index(str(learned[-1])) + 1]
        lessons.append(
            Lesson(
                number=number,
                learns=tuple(map(str, learned)),
                structures=tuple(known),
                source="x",
                cases=tuple(map(str, range(cases))),
            )
        )
    model = strategy.build(kit, lessons[0])
    for lesson in lessons[1:]:
        strategy.grow(model, kit, lesson)
    last = lessons[-1]
    weights = {(last.number, case): 1.0 / cases for case in last.cases}
    volumes: Any = dict.fromkeys(weights)
    rng = np.random.default_rng(0)
    image = rng.random((1, edge, edge, edge), dtype=np.float32)
    label = np.stack([image[0] > 0.9] * classes).astype(np.uint8)
    material = Material(
        volumes=volumes, weights=weights, pseudo={}, patch_vox=(edge,) * 3, data=DataSettings()
    )

    def teach() -> float:
        step = loop.StepTraining(
            strategy=strategy,
            state=TrainingState(model=model, memory={}),
            teacher=None,
            lesson=last,
            material=material,
            train=TrainSettings(epochs=1, iterations=updates, batch=1),
            seed=0,
            device=torch.device("cpu"),
        )
        with patch.object(batches, "crop", lambda *of, **more: (image, label, None)):
            began = time.process_time()
            loop.teach(step)
            return time.process_time() - began

    return teach


def examination(classes: int, edge: int) -> Callable[[], float]:
    """A case and an untrained model of `universal` → a function that examines it, in seconds.

    Args:
        classes: of the model and of the label.
        edge: voxels of the case's side; windows have 48, half of which overlap.
    """
    names = list(STRUCTURES)[:classes]
    vectors = torch.randn(classes, 512, generator=torch.Generator().manual_seed(0))
    kit = Kit(
        backbone=lambda: new_backbone(BackboneSettings(name="small_unet", size=16)),
        encode=lambda of: vectors[: len(of)],
        seed=0,
    )
    lesson = Lesson(number=1, learns=tuple(names), structures=tuple(names), source="x", cases=())
    strategy = Universal()
    model = strategy.build(kit, lesson).eval()
    source = Source(name="x", title="", layout="lits", labels=dict(enumerate(names, 1)))
    rng = np.random.default_rng(0)
    image = rng.integers(-100, 200, (edge,) * 3, dtype=np.int16)
    label = rng.integers(0, len(names) + 1, (edge // 8,) * 3, dtype=np.uint8)
    label = np.kron(label, np.ones((8, 8, 8), dtype=np.uint8))
    folder = Path(tempfile.mkdtemp())
    for name, array in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1.0])), folder / f"{name}.nii")
    files = CaseFiles(case="0", image=folder / "image.nii", label=folder / "label.nii")
    volume = preprocess(read_case(files, source), source, Preprocessing(spacing_mm=(1.5, 1.5, 1.5)))
    server = VolumePredictor(
        model, strategy.decode, tuple(names), patch_vox=(48, 48, 48), overlap=0.5
    )
    course: Any = SimpleNamespace(name="x", version=1, learned_at=lambda name: 1)
    context = ScoreContext(benchmark=course, strategy="universal", seed=0, step=1)

    def examine() -> float:
        began = time.process_time()
        score_case(server.predict(volume), names, volume, context)
        return time.process_time() - began

    return examine


def of_point(kind: str, value: int) -> tuple[float, Callable[[], float]]:
    """How much there is to do, and a function that does it."""
    if kind == "classes":
        return value, training(value, 1, 1, 32, 2)
    if kind == "steps":  # a class each
        return value, training(value, value, 1, 32, 2)
    if kind == "cases":  # an epoch
        return value, training(1, 1, value, 16, value)
    if kind == "examined classes":
        return value, examination(value, 48)
    if kind == "examined windows":  # a side of n windows of 48 that half overlap: 24 (n + 1)
        return value, examination(4, 24 * (round(value ** (1 / 3)) + 1))
    return value**3, training(4, 1, 1, value, 1)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, value: int, pipe: Any) -> None:
    """One point, in a process of its own."""
    torch.set_num_threads(1)
    os.environ[SWITCH] = "0"
    work, teach = of_point(kind, value)
    forget_peak()
    before = peak()
    seconds = min(teach() for _ in range(ROUNDS))
    pipe.send((work, seconds, peak() - before))


def points(kinds: Sequence[str]) -> Iterator[dict[str, float | str]]:
    """Every point of these kinds as a row; `…_ratio` are to the first of its kind."""
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        values = POINTS[kind]
        first: tuple[float, float, float] | None = None
        for value in values:
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(kind, value, there))
            process.start()
            work, seconds, mib = here.recv()
            process.join()
            first = first or (work, seconds, mib)
            yield {
                "kind": kind,
                "value": value,
                "work_ratio": round(work / first[0], 3),
                "cpu_s": round(seconds, 4),
                "time_ratio": round(seconds / first[1], 3),
                "peak_mib": round(mib, 1),
                "memory_ratio": round(mib / first[2], 3),
            }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against work, all as ratios; the dashed line grows as fast as the work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for panel, column, title in zip(
        panels, ("time_ratio", "memory_ratio"), ("processor time", "peak memory"), strict=True
    ):
        for marker, (kind, of) in zip(
            "osd^vP", groupby(rows, key=lambda r: r["kind"]), strict=False
        ):
            line = list(of)
            work = [float(r["work_ratio"]) for r in line]
            panel.plot(work, [float(r[column]) for r in line], marker=marker, label=kind)
        panel.plot((1, 143), (1, 143), color="0.6", linestyle="--", linewidth=0.8, label="the work")
        panel.set(xscale="log", yscale="log", title=title, xlabel="work, as a ratio")
    panels[0].set_ylabel("as a ratio")
    panels[0].legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "clbench"}):
        figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--draw", action="store_true", help="draw again what was measured")
    words.add_argument("--kind", choices=tuple(POINTS), help="measure it alone, keep the rest")
    words.add_argument("--record", action="store_true")
    asked = words.parse_args()
    kinds = [asked.kind] if asked.kind else list(POINTS)
    table = FOLDER / "growth.csv"
    if not asked.draw:
        torch.set_num_threads(1)
        torch.optim.AdamW([torch.zeros(1)]).zero_grad()  # imports, once for all points
        rows: list[dict[str, Any]] = []
        if asked.kind and table.exists():
            with table.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["kind"] != asked.kind]
        for row in points(kinds):
            print(row, flush=True)
            if not asked.record:
                continue
            rows.append(row)
            with table.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    if not (asked.record or asked.draw):
        return 0
    with table.open(newline="", encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), FOLDER / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
