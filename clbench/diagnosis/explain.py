"""Where the lost Dice of a run went: every old structure, after every later step, on test cases.

The predictions that the run stored are compared on the grid of each file, as for its scores. Those
it did not store are predicted anew from its checkpoints. Each structure is looked at on the test
cases of the source that taught it, as in every table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import reproducibility, signals
from clbench.data.catalog import Catalog, exam_cases
from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume, bounding_box
from clbench.deployment.predict import predict_volume
from clbench.deployment.trained import TrainedModel, load_trained
from clbench.diagnosis.model_parts import explain_models
from clbench.errors import StoreError
from clbench.evaluation.explained import (
    FILE,
    HEAD_BODY_FILE,
    HeadBodyRow,
    LostDiceRow,
    rows_of,
    write_head_body,
    write_lost_dice,
)
from clbench.evaluation.metrics.lost_dice import attribute, border_mm
from clbench.evaluation.predictions import read_prediction, refuse_other_grid
from clbench.evaluation.scoring import to_native
from clbench.run.course import alone
from clbench.run.record import catalog_of
from clbench.store import run_folder
from clbench.store.files import COPY_RUN
from clbench.store.record import RunRecord
from clbench.store.run_folder import prediction_path
from clbench.training.resume import Watch
from clbench.types import Bits, mask_of, triple

Axes = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
Box = tuple[slice, slice, slice]


@dataclass(kw_only=True)
class Explained:
    """What became of the old structures of a run."""

    folder: Path
    """The run."""
    record: RunRecord
    """`run.json` of it."""
    catalog: Catalog
    """Its data."""
    predictions: Predictions
    """What it predicted after each step."""
    rows: list[LostDiceRow]
    """Content of `lost_dice.csv`."""
    model_rows: list[HeadBodyRow] = field(default_factory=list)
    """Content of `head_body.csv`."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know."""


def explain_run(
    folder: Path,
    *,
    data: str | None = None,
    cache: Path | None = None,
    device: str = "auto",
    models: bool = True,
    watch: Watch = lambda event: None,
) -> Explained:
    """Divide the lost Dice of a run; write `lost_dice.csv` and `head_body.csv` into its folder.

    Args:
        folder: the run, with two steps or more finished.
        data: where the data lies now, as in `clbench run --data`; None: where the run explained it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.
        device: where models compute.
        models: also exchange heads and bodies and probe bodies, where there are checkpoints.
        watch: told about every case.

    Raises:
        StoreError: a run of one step, one that keeps neither predictions nor checkpoints, or
            predictions that do not give its recorded scores; other data.
        DataError: data that cannot be read.
        Stopped: by a signal; `lost_dice.csv` is written whole or not at all, `head_body.csv` too.
    """
    record = _explainable(folder)
    catalog = catalog_of(record, data=data, cache=cache)
    with (
        signals.listening(),
        alone(folder, wait=False, next_step=COPY_RUN),
        reproducibility.threads(record.threads),
    ):
        record = _explainable(folder)  # another process may have written it meanwhile
        predictions = Predictions(folder, record, device)
        recorded = _recorded(folder)
        rows: list[LostDiceRow] = []
        cases = list(exam_cases(catalog))
        for done, (number, source, case) in enumerate(cases, 1):
            old = _old_structures(catalog, source, record.steps_done)
            if old:
                volume = catalog.open(number, case, "test")
                rows += _explain_case(volume, old, predictions, recorded)
            watch({"event": "exam", "done": done, "of": len(cases), "case": case})
            signals.check(f"explaining, {source} case {case}")
        if not rows:
            raise StoreError(
                "no test case of the run holds a structure of an earlier step",
                where=folder,
                expected="test cases that annotate "
                + ", ".join(record.course.steps[0].learns[:3])
                + ", …",
                got=f"{len(cases)} test cases without them",
                next_step="annotate an old structure in some of them and run again",
            )
        write_lost_dice(folder / FILE, rows)
        record.reseal(folder)
        explained = Explained(
            folder=folder,
            record=record,
            catalog=catalog,
            predictions=predictions,
            rows=rows,
            notes=predictions.notes(),
        )
        if models:
            _explain_models(explained, catalog, predictions, watch)
    return explained


def _explain_models(
    explained: Explained, catalog: Catalog, predictions: Predictions, watch: Watch
) -> None:
    """Heads, bodies and probes; a run without checkpoints gets a note in place of numbers."""
    done = explained.record.steps_done
    try:
        for number in range(1, done + 1):
            predictions.model(number)
    except StoreError as err:
        explained.notes.append(f"head or body: not looked at, {err.brief}")
        return
    parts = explain_models(catalog, predictions.model, predictions.of, steps_done=done, watch=watch)
    explained.notes += parts.notes
    explained.model_rows = parts.rows
    write_head_body(explained.folder / HEAD_BODY_FILE, parts.rows)
    for step, by_purpose in catalog.opened().items():
        if cases := by_purpose.get("diagnosis"):
            of_step = explained.record.ledger.setdefault(step, {})
            of_step["diagnosis"] = sorted({*of_step.get("diagnosis", ()), *cases})
    explained.record.reseal(explained.folder)


def _explainable(folder: Path) -> RunRecord:
    """The record of a run in which something can have been forgotten.

    Raises:
        StoreError: there is none, or it is none.
    """
    record = RunRecord.read(folder)
    if record.external:
        raise StoreError(
            "the run holds predictions made elsewhere, of which no copy is kept",
            where=folder,
            next_step="explain a run that clbench trained",
        )
    if len(record.course.steps) < 2:
        raise StoreError(
            "the course has one step: nothing was learned that could be forgotten",
            where=folder,
            expected="a course of two steps or more",
            got=record.identity.bench,
            next_step="explain a run of another course; `clbench list` names them",
        )
    if record.steps_done < 2:
        raise StoreError(
            "no later step of the run is finished: nothing can have been forgotten yet",
            where=folder,
            expected="2 or more finished steps",
            got=record.steps_done,
            next_step="repeat the run's command; it goes on where it stopped",
        )
    return record


def _old_structures(catalog: Catalog, source: str, steps_done: int) -> dict[str, int]:
    """Structure → step that taught it, of those that count on this source and have a later step.

    Structures whose step has no test cases (its model was given) count on every source.
    """
    return {
        name: number
        for number, step in enumerate(catalog.benchmark.steps[: steps_done - 1], 1)
        if catalog.source(number).name == source or not catalog.splits[number - 1].test
        for name in step.learns
    }


# ---------------------------------------------------------------------------------- predictions


class Predictions:
    """What a run predicted after each of its steps, stored or made anew.

    Args:
        folder: the run.
        record: its record.
        device: where models compute.
    """

    def __init__(self, folder: Path, record: RunRecord, device: str) -> None:
        self.folder, self.record, self.device = folder, record, device
        self.anew: dict[int, int] = {}
        """Step → cases that were predicted anew."""
        self._models: dict[int, TrainedModel] = {}

    def model(self, step: int) -> TrainedModel:
        """The run's model after a step.

        Raises:
            StoreError: there is no checkpoint.
        """
        if step not in self._models:
            self._models[step] = load_trained(self.folder, step=step, device=self.device)
        return self._models[step]

    def stored(self, step: int, volume: Volume) -> Path:
        """Where the prediction of a test case after a step is stored, if it is."""
        return prediction_path(self.folder, step, volume.source, volume.case)

    def of(self, step: int, volume: Volume) -> tuple[Bits, tuple[str, ...]]:
        """(D, H, W) bit patterns on the model's grid, and the structures of their bits.

        Args:
            step: 1-based step after which it is predicted.
            volume: the test case.

        Raises:
            StoreError: not stored and no checkpoint, or a file of another case.
        """
        path = self.stored(step, volume)
        if path.is_file():
            stored = read_prediction(path)
            refuse_other_grid(path, stored, volume)
            return stored.bits, stored.structures
        try:
            model = self.model(step)
        except StoreError as err:
            raise StoreError(
                f"the run keeps neither a prediction of {volume.source} case {volume.case} after "
                f"step {step}, nor the model to make it anew",
                where=self.folder,
                expected=f"{path.relative_to(self.folder)}, or {err.expected or 'a checkpoint'}",
                got=err.got or err.what,
                next_step="explain the run's own folder, not a published copy of it; or repeat "
                "its command with --fresh --keep-predictions test",
            ) from err
        self.anew[step] = self.anew.get(step, 0) + 1
        return predict_volume(model, volume), model.structures

    def notes(self) -> list[str]:
        """Which predictions were not stored."""
        return [
            f"{cases} cases after step {step} were predicted anew from the checkpoint"
            for step, cases in sorted(self.anew.items())
        ]


# ------------------------------------------------------------------------------------- one case


def _explain_case(
    volume: Volume,
    old: Mapping[str, int],
    predictions: Predictions,
    recorded: Mapping[tuple[int, str, str, str], float],
) -> Iterator[LostDiceRow]:
    """The rows of one test case: each old structure it holds, after every later step."""
    truth = volume.native_bits()
    names = tuple(n if n in volume.annotated else "" for n in volume.names)
    steps = range(min(old.values()), predictions.record.steps_done + 1)
    bits = {step: predictions.of(step, volume) for step in steps}
    axes, native_mm = volume.native_axes(), spacing_of(volume.native_affine).tolist()
    for name, taught in old.items():
        if name not in names:
            continue
        border = border_mm(name, spacing_of(volume.affine).tolist())
        mask = mask_of(truth, names.index(name))
        if (own := bounding_box(mask)) is None:  # no Dice is defined, so none is lost
            continue
        for step in range(taught + 1, predictions.record.steps_done + 1):
            pair = [bits[taught], bits[step]]
            box = _box(name, own, pair, axes, [math.ceil(border / mm) + 1 for mm in native_mm])
            cut = (axes[0][box[0]], axes[1][box[1]], axes[2][box[2]])
            before, after = ((to_native(b, cut), n) for b, n in pair)
            attribution = attribute(
                name,
                before,
                after,
                (truth[box], names),
                spacing_mm=native_mm,
                border=border,
            )
            at = {taught: attribution.dice[0], step: attribution.dice[1]}
            for number, dice in at.items():
                _as_recorded(
                    dice, recorded, (number, volume.source, volume.case, name), predictions, volume
                )
            yield from rows_of(
                attribution,
                step=step,
                eval_set=volume.source,
                case=volume.case,
                name=name,
                learned_at=taught,
            )


def _box(
    name: str,
    own: Box,
    predicted: Sequence[tuple[Bits, tuple[str, ...]]],
    axes: Axes,
    margin_vox: Sequence[int],
) -> Box:
    """The part of the file's grid that holds a structure, true and predicted, and its border."""
    low, high = [side.start for side in own], [side.stop for side in own]
    for bits, names in predicted:
        for axis, side in enumerate(bounding_box(mask_of(bits, names.index(name))) or ()):
            held = np.flatnonzero((axes[axis] >= side.start) & (axes[axis] < side.stop))
            if held.size:
                low[axis] = min(low[axis], int(held[0]))
                high[axis] = max(high[axis], int(held[-1]) + 1)
    return triple(
        slice(max(0, first - margin), min(len(axis), stop + margin))
        for first, stop, margin, axis in zip(low, high, margin_vox, axes, strict=True)
    )


# ------------------------------------------------------------------------------------ the scores


def _recorded(folder: Path) -> dict[tuple[int, str, str, str], float]:
    """(step, eval set, case, structure) → strict Dice, as recorded."""
    return {
        (r.step, r.eval_set, r.case, r.structure): r.value
        for r in run_folder.read_scores(folder / "scores.csv")
        if r.scoring == "strict" and r.metric == "dice"
    }


def _as_recorded(
    dice: float,
    recorded: Mapping[tuple[int, str, str, str], float],
    key: tuple[int, str, str, str],
    predictions: Predictions,
    volume: Volume,
) -> None:
    """A stored prediction must give the Dice that was recorded; one made anew may round otherwise.

    Raises:
        StoreError: it does not.
    """
    path = predictions.stored(key[0], volume)
    if not path.is_file() or recorded.get(key) == dice:
        return
    raise StoreError(
        "a stored prediction does not give the recorded Dice",
        where=f"{path}, {key[3]}",
        expected=recorded.get(key, "no such row"),
        got=dice,
        next_step="the file or scores.csv was changed; run again with --fresh",
    )
