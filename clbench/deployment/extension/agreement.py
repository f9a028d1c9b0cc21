"""What an extension changed: how far old and new model agree on the user's cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clbench import reproducibility, signals
from clbench.data.catalog import Catalog, Purpose
from clbench.deployment.predict import predict_volume
from clbench.deployment.trained import TrainedModel, load_trained
from clbench.errors import StoreError
from clbench.evaluation.metrics.overlap import counts_of, dice, pattern_pairs
from clbench.evaluation.predictions import read_prediction
from clbench.spec.splits import PARTS
from clbench.store import files
from clbench.store.csv_rows import read_rows, rows_bytes
from clbench.store.record import RunRecord
from clbench.store.run_folder import prediction_path
from clbench.training.resume import Watch
from clbench.types import Bits

FILE = "agreement.csv"
"""In the run folder: one row per case and old structure."""
COLUMNS = ("case", "part", "structure", "agreement", "before_vox", "after_vox", "both_vox")


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Two masks of one structure in one case: of the model before, and after the new step."""

    case: str
    """Case id."""
    part: str
    """`train`, `validation` or `test`: whether the new step learned from the case."""
    structure: str
    """An old structure."""
    agreement: float
    """Dice of the two masks; NaN where both are empty."""
    before_vox: int
    """Voxels of the old model's mask, on the network's grid."""
    after_vox: int
    """Of the new one's."""
    both_vox: int
    """Of both."""


def write_agreement(
    folder: Path, catalog: Catalog, *, before: int, device: str, watch: Watch
) -> None:
    """Compare the models after two steps on every case of the new data, and seal the result.

    Test cases have stored predictions; the others are predicted now.

    Args:
        folder: the finished run; nothing is done where the result is there.
        catalog: its data.
        before: 1-based step of the old model; the new one is that of the last step.
        device: where both compute, as in `load_trained`.
        watch: hears of every case.

    Raises:
        ClbenchError: a case cannot be predicted, or the result cannot be written.
        Stopped: by a signal; the same call begins again.
    """
    if (folder / FILE).exists():
        return
    record = RunRecord.read(folder)
    last = len(record.course.steps)
    models = [load_trained(folder, step=step, device=device) for step in (before, last)]
    catalog.step = last  # whose cases are looked at; a finished run left it where it began
    split = catalog.splits[last - 1]
    rows: list[Agreement] = []
    cases = [(case, part) for part in PARTS for case in getattr(split, part)]
    with signals.listening(), reproducibility.threads(record.threads):
        for done, (case, part) in enumerate(cases, 1):
            old, new = (_bits(folder, catalog, model, last, case, part) for model in models)
            rows += compared(old, new, models[0].structures, case=case, part=part)
            watch({"event": "predicted", "done": done, "of": len(cases), "case": case})
            signals.check(f"comparing old and new model, case {case}")
    with files.locked(folder / ".lock"):
        files.write_bytes(folder / FILE, rows_bytes(COLUMNS, rows))
        RunRecord.read(folder).reseal(folder)  # another process may have written it meanwhile


def _bits(
    folder: Path, catalog: Catalog, model: TrainedModel, step: int, case: str, part: str
) -> Bits:
    """What a model answers for a case of the last step, stored or predicted now."""
    source = catalog.source(step).name
    stored = prediction_path(folder, model.step, source, case)
    if part == "test" and stored.is_file():
        return read_prediction(stored).bits
    purpose: dict[str, Purpose] = {"train": "train", "validation": "validation", "test": "test"}
    return predict_volume(model, catalog.open(step, case, purpose[part]))


def compared(
    old: Bits, new: Bits, structures: tuple[str, ...], *, case: str, part: str
) -> list[Agreement]:
    """A row per old structure.

    Args:
        old: (D, H, W) of the old model, bit k = structures[k].
        new: (D, H, W) of the new model, whose first bits are the same structures.
        structures: of the old model.
        case: case id.
        part: part of the split it is in.
    """
    counts = counts_of(pattern_pairs(new, old), {name: (k, k) for k, name in enumerate(structures)})
    return [
        Agreement(
            case=case,
            part=part,
            structure=name,
            agreement=0.0 if own.status == "fp_only" else dice(own),
            before_vox=own.gt_vox,
            after_vox=own.pred_vox,
            both_vox=own.both_vox,
        )
        for name, own in counts.items()
    ]


def read_agreement(folder: Path) -> list[Agreement]:
    """The rows of an extended run.

    Raises:
        StoreError: the run is no extension, or the file is damaged.
    """
    if not (folder / FILE).is_file():
        raise StoreError(
            "the run has no comparison of an old and a new model",
            where=folder / FILE,
            next_step="repeat the `clbench extend` that made the run",
        )
    return read_rows(
        folder / FILE, Agreement, what="the agreement", next_step="repeat `clbench extend`"
    )
