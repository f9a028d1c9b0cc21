"""What PLOP's penalty weighs at the start of step 2, map by map, for planes and for strips.

    python tests/perf/pod_balance.py RUN [RUN …] > results/ablation/plop/balance.csv

A RUN is a run of a softmax method that keeps its first step. Its model is grown as `plop` grows it,
and the penalty is computed on the first crops of step 2: as it stands before the first update, and
for a model whose every activation of a map is a tenth larger than the old one's. Beside it stand
the supervised loss and the ratio of the gradients' norms. The penalty is a mean over maps, so each
line is a map's share of the loss.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clbench.deployment.trained import checkpoint_path, plan_without_data
from clbench.reproducibility import threads
from clbench.run import teach
from clbench.run.models import loaded
from clbench.run.plan import Plan
from clbench.run.record import catalog_of
from clbench.store.record import RunRecord
from clbench.strategies.plop import THRESHOLDS, Plop
from clbench.strategy import Batch, Phase
from clbench.strategy.distillation import local_pod, logits_for_pod
from clbench.training.batches import Crops, collate
from clbench.training.device_batches import to_batch

BATCHES = 3
PUBLISHED = 0.0005
"""Factor of the logits in the code of Douillard et al."""
AXES = {1: "planes", 2: "strips"}


Line = tuple[str, str]
"""How cells are pooled (`planes`, `strips`; empty: of the loss), and what is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="+")
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(("seed", "new channels start as", "pooled to", "what", "value"))
    for folder in parser.parse_args().run:
        record = RunRecord.read(folder)
        plan = plan_without_data(record, folder, device="cpu")
        plan.catalog = catalog_of(record)
        with threads(1):
            for split in (True, False):
                start = "shares of background" if split else "random"
                plop = Plop(splits_background=split, logit_factor=PUBLISHED)
                for line, values in measured(plan, folder, record, plop).items():
                    mean = sum(values) / len(values)
                    out.writerow((record.seed, start, *line, f"{mean:.4g}"))


def measured(plan: Plan, folder: Path, record: RunRecord, plop: Plop) -> dict[Line, list[float]]:
    """Line → its value in each batch."""
    model, _ = loaded(plan, plop.first_step(), plan.lesson(1), checkpoint_path(folder, record, 1))
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    plan.catalog.step = 2
    lesson = plan.lesson(2)
    plop.grow(model, plan.kit, lesson)
    channels = 1 + len(lesson.old)
    memory = {THRESHOLDS: torch.full((channels,), plop.floor)}
    state = teach.StepState(
        strategy=plop, lesson=lesson, model=model, memory=memory, teacher=teacher
    )
    material = teach.load_training_data(plan, state, {}, may_open=lambda step, case: True)
    size = plan.profile.train.batch
    crops = Crops(lesson, Phase(), material, epochs=1, per_epoch=BATCHES * size, seed=record.seed)
    growth = math.sqrt((1 + len(lesson.structures)) / len(lesson.taught))
    lines: dict[Line, list[float]] = defaultdict(list)
    for i in range(BATCHES):
        raw = collate([crops[size * i + k] for k in range(size)])
        for line, value in _of_batch(plop, state, to_batch(raw, lesson, plan.device), growth):
            lines[line].append(value)
    return lines


def _of_batch(
    plop: Plop, state: teach.StepState, batch: Batch, growth: float
) -> list[tuple[Line, float]]:
    assert state.teacher is not None
    new = state.model(batch.image)
    with torch.no_grad():
        old = state.teacher(batch.image)
    maps = {**old.features, "logits": old.logits}
    weight = {**dict.fromkeys(old.features, plop.feature_factor), "logits": plop.logit_factor}
    share = {name: factor * growth / len(maps) for name, factor in weight.items()}
    parameters = [p for p in state.model.parameters() if p.requires_grad]

    def norm(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return math.hypot(*(float(g.norm()) for g in grads if g is not None))

    terms = state.strategy.losses(batch, new, old, state.memory)
    supervised = terms["ce"] + terms["dice"]
    lines = [(("", "cross-entropy and Dice"), supervised.item())]
    for axes, pooled in AXES.items():
        start = local_pod(logits_for_pod(new.logits, old.logits), old.logits, pooled_axes=axes)
        lines.append(
            ((pooled, "logits before the first update"), share["logits"] * start.mean().item())
        )
        penalty = replace(plop, pooled_axes=axes).losses(batch, new, old, state.memory)["pod"]
        ratio = norm(penalty) / norm(supervised)
        lines.append(((pooled, "gradient of the penalty / of the loss"), ratio))
        for name, of in maps.items():
            moved = local_pod(1.1 * of, of, pooled_axes=axes).mean().item()
            lines.append(((pooled, f"{name} a tenth larger"), share[name] * moved))
    return lines


if __name__ == "__main__":
    main()
