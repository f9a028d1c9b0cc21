"""Runs whose stored predictions are the truth, but for what is done to them; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from clbench.data.catalog import exam_cases
from clbench.evaluation.predictions import write_prediction
from clbench.evaluation.scoring import context_of, score_case
from clbench.run.record import catalog_of
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.types import Bits, bits_dtype

LOST = "spleen"
"""Missed whole after step 2."""
CALLED = ("stomach", "liver")
"""The first is called the second after step 2."""


def predict(folder: Path, change: Callable[[int, Bits, tuple[str, ...]], None]) -> None:
    """Give a run other predictions: the truth, as `change` leaves it; and their scores.

    Args:
        folder: a copy of a finished run.
        change: step, bit patterns and their names → damage done in place.
    """
    record = RunRecord.read(folder)
    catalog = catalog_of(record)
    rows = []
    for number, source, case in exam_cases(catalog):
        volume = catalog.open(number, case, "test")
        for step in (1, 2):
            names = catalog.benchmark.structures(step)
            bits = np.zeros(volume.bits.shape, dtype=bits_dtype(len(names)))
            for k, name in enumerate(names):
                if name in volume.names:
                    bit = volume.bits.dtype.type(volume.names.index(name))
                    mask = (volume.bits >> bit) & volume.bits.dtype.type(1)
                    bits |= mask.astype(bits.dtype) << bits.dtype.type(k)
            change(step, bits, names)
            path = folder / "predictions" / f"step{step}" / f"{source}_{case}.npz"
            write_prediction(path, bits, names, volume.affine, source=source, case=case)
            context = context_of(record, catalog.benchmark, step)
            rows += score_case(bits, names, volume, context=context)
    run_folder.write_scores(folder / "scores.csv", rows)
    record.reseal(folder)
    record.write(folder)


def forget(step: int, bits: Bits, names: tuple[str, ...]) -> None:
    """`LOST` is gone and one structure is called another, after step 2."""
    if step == 2:
        lost, called, instead = (bits.dtype.type(1 << names.index(n)) for n in (LOST, *CALLED))
        bits[(bits & called) != 0] |= instead
        bits &= ~(lost | called)
