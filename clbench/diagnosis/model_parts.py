"""Which part of a run's models forgot: heads and bodies exchanged between steps, bodies probed.

Every model is asked for the test cases of the source that taught the structures, and scored on the
grid of the file, as in the examination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from clbench import signals
from clbench.data.catalog import Catalog, exam_cases
from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume
from clbench.deployment.trained import TrainedModel
from clbench.diagnosis.head_body import exchanged, why_not_exchanged
from clbench.diagnosis.probe import CASES, Probe, draw, fit, last_map, probed_bits
from clbench.evaluation.explained import HeadBodyRow
from clbench.evaluation.metrics.case import measure
from clbench.evaluation.scoring import bit_pairs, native_rows
from clbench.training.resume import Watch
from clbench.types import Bits

Predicted = tuple[Bits, Sequence[str]]
"""(D, H, W) bit patterns on the model's grid, and the names of their bits."""


@dataclass(kw_only=True)
class ModelParts:
    """Whether heads or bodies forgot."""

    rows: list[HeadBodyRow] = field(default_factory=list)
    """Content of `head_body.csv`."""
    notes: list[str] = field(default_factory=list)
    """What could not be put together or probed, and why."""

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)


def explain_models(
    catalog: Catalog,
    model: Callable[[int], TrainedModel],
    predict: Callable[[int, Volume], Predicted],
    *,
    steps_done: int,
    watch: Watch = lambda event: None,
) -> ModelParts:
    """Exchange heads and bodies between each structure's own step and every later one, and probe.

    Args:
        catalog: the data of the run; training cases that are opened are entered in its ledger
            under `diagnosis`.
        model: step → the model after it.
        predict: step, test case → what that model predicts.
        steps_done: steps that are taught and examined.
        watch: told about every case.

    Raises:
        StoreError: a model is not there.
        Stopped: by a signal.
    """
    parts = ModelParts()
    for taught in range(1, steps_done):
        _of_step(parts, catalog, model, predict, range(taught, steps_done + 1), watch)
    return parts


def _of_step(
    parts: ModelParts,
    catalog: Catalog,
    model: Callable[[int], TrainedModel],
    predict: Callable[[int, Volume], Predicted],
    steps: range,
    watch: Watch,
) -> None:
    """The structures that the first of `steps` taught, after each of the others."""
    taught, *later = steps
    names = catalog.benchmark.steps[taught - 1].learns
    if not names:  # it only teaches again what an earlier step taught, which is looked at there
        return
    home = catalog.source(taught).name
    everywhere = not catalog.splits[taught - 1].test  # the model of this step was given
    cases = [one for one in exam_cases(catalog) if everywhere or one[1] == home]
    old = model(taught)
    apart = {b: why_not_exchanged(old.server.model, model(b).server.model) for b in later}
    for step, reason in apart.items():
        if reason:
            parts.note(
                f"head and body of {old.record.strategy} cannot be exchanged between step "
                f"{taught} and step {step}: {reason}"
            )
    probes = {step: _probe(parts, catalog, model(step), taught, names, watch) for step in steps}
    for done, (number, source, case) in enumerate(cases, 1):
        volume = catalog.open(number, case, "test")
        scored = _scores(volume, names)
        own = scored(predict(taught, volume))
        probed = {step: probe(volume) for step, probe in probes.items() if probe is not None}
        probe_dice = {step: scored(bits) for step, bits in probed.items()}
        for step in later:
            new, none = model(step), dict.fromkeys(own, math.nan)
            mixtures = [none, none]
            if not apart[step]:
                mixtures = [
                    scored(_answer(head, body, volume)) for head, body in ((old, new), (new, old))
                ]
            after = scored(predict(step, volume))
            parts.rows += [
                HeadBodyRow(
                    step=step,
                    eval_set=source,
                    case=case,
                    structure=name,
                    learned_at=taught,
                    old=own[name],
                    new=after[name],
                    old_head_new_body=mixtures[0][name],
                    new_head_old_body=mixtures[1][name],
                    probe_old_body=probe_dice.get(taught, none)[name],
                    probe_new_body=probe_dice.get(step, none)[name],
                )
                for name in own
            ]
        watch({"event": "exam", "done": done, "of": len(cases), "case": case})
        signals.check(f"exchanging heads and bodies, {source} case {case}")


def _answer(head: TrainedModel, body: TrainedModel, volume: Volume) -> Predicted:
    """What the head of one step says on the body of another."""
    with head.enough_memory(volume.case):
        bits = exchanged(head=head, body=body).predict(volume, postprocess=head.postprocess)
    return bits, head.structures


def _scores(volume: Volume, names: Sequence[str]) -> Callable[[Predicted], dict[str, float]]:
    """Scores predictions of a case: structure → Dice, of those the case holds."""
    truth = volume.native_bits()
    spacing_mm = spacing_of(volume.native_affine).tolist()

    def dice_of(predicted: Predicted) -> dict[str, float]:
        bits, structures = predicted
        places = bit_pairs(list(structures), volume, names)
        scores = measure(native_rows(bits, volume), truth, spacing_mm, places, ("dice",))
        return {n: s.values["dice"] for n, s in scores.items() if s.counts.gt_vox}

    return dice_of


def _probe(
    parts: ModelParts,
    catalog: Catalog,
    trained: TrainedModel,
    taught: int,
    names: Sequence[str],
    watch: Watch,
) -> Callable[[Volume], Predicted] | None:
    """A probe of the body after a step, fitted on training cases of the step `taught`."""
    server = trained.server
    feature_map = last_map(server.model, taught, server.patch_vox)
    if not feature_map:
        parts.note(
            f"the body of {trained.record.strategy} cannot be probed: "
            f"{type(server.model).__name__} gives no map of its windows' size that one head reads"
        )
        return None
    train = catalog.splits[taught - 1].train
    if not train:
        parts.note(f"no probe: the training cases of step {taught} are not at hand")
        return None
    chosen = [
        train[i] for i in np.unique(np.linspace(0, len(train) - 1, CASES).round().astype(int))
    ]
    catalog.step = taught  # the guard and the ledger of past data go by it
    samples = []
    for done, case in enumerate(chosen, 1):
        volume = catalog.open(taught, case, "diagnosis")
        samples.append(draw(server, volume, feature_map, names, trained.record.seed))
        watch({"event": "opened", "done": done, "of": len(chosen), "case": case})
        signals.check(f"probing the body after step {trained.step}, case {case}")
    fitted: Probe = fit(samples, names)
    return lambda volume: (probed_bits(fitted, server, volume, feature_map), names)
