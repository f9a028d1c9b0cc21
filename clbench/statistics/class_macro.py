"""The primary endpoint: the class-macro mean over patients.

Patients are the unit: all classes of a patient move together, patients of
different data sets are separate strata, and seeds are crossed with patients (every seed scores the
same patients). A table is a mapping: data set → (patients, classes) or (seeds, patients, classes),
A minus B, nan where a patient does not annotate a class. Its spread and interval are in
`clbench.statistics.macro_estimate`, its tests in `clbench.statistics.max_t`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from clbench.errors import DataError
from clbench.types import Floats

Table = Mapping[str, ArrayLike]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """One data set's cells, checked."""

    name: str
    """The data set."""
    values: Floats
    """(seeds, patients, classes); 0 where absent."""
    valid: Floats
    """(patients, classes); 1 where the cell exists, else 0. The same under every seed."""

    @property
    def n(self) -> int:
        """Patients with at least one cell."""
        return int(self.valid.shape[0])


def by_patient(values: ArrayLike, patients: Sequence[Hashable]) -> Floats:
    """Average several scans of one patient, so that the patient stays the unit.

    Args:
        values: (..., scans, classes); nan = not annotated.
        patients: one id per scan.

    Returns:
        (..., patients, classes), patients in order of first appearance; nan where no scan of the
        patient has the class.

    Raises:
        DataError: as many ids as scans are needed.

    Example:
        >>> from clbench.statistics.class_macro import by_patient
        >>> scans = [[0.5, 0.75], [1.0, float("nan")], [0.25, 0.5]]  # (3 scans, 2 classes)
        >>> by_patient(scans, ["p1", "p1", "p2"]).tolist()
        [[0.75, 0.75], [0.25, 0.5]]
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 2 or array.shape[-2] != len(patients):
        raise DataError(
            "every scan needs a patient", expected=f"{array.shape} scans", got=len(patients)
        )
    index = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    member = np.zeros((len(index), len(patients)))
    for scan, patient in enumerate(patients):
        member[index[patient], scan] = 1.0
    total = member @ np.nan_to_num(array)
    count = member @ (~np.isnan(array)).astype(np.float64)
    mean: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def checked(table: Table) -> dict[str, Floats]:
    """Bring a table into one form: data set → (seeds, patients, classes), nan = no such cell.

    Raises:
        DataError: wrong shape, infinite values, data sets with different numbers of seeds, or a
            cell that exists under one seed and not under another.

    Example:
        >>> from clbench.statistics.class_macro import checked
        >>> checked({"lits": [[0.25], [0.5]]})["lits"].shape  # one seed, two patients, one class
        (1, 2, 1)
    """
    arrays: dict[str, Floats] = {}
    for name, raw in table.items():
        array = np.asarray(raw, dtype=np.float64)
        array = array[None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[0] == 0 or np.isinf(array).any():
            raise DataError(
                "a table of differences has the wrong form",
                where=name,
                expected="finite (patients, classes) or (seeds, patients, classes)",
                got=array.shape,
            )
        absent = np.isnan(array)
        if np.any(absent != absent[0]):
            raise DataError(
                "a case is missing under one seed and present under another",
                where=name,
                expected="the same cells under every seed",
                got=f"{int((absent != absent[0]).sum())} cells differ",
                next_step="finish or leave out the incomplete run",
            )
        arrays[name] = array
    if len({array.shape[0] for array in arrays.values()}) > 1:
        raise DataError(
            "data sets differ in their number of seeds",
            expected="one number",
            got={name: array.shape[0] for name, array in arrays.items()},
        )
    return arrays


def strata(table: Table) -> tuple[Stratum, ...]:
    """Check a table and bring it into one form; patients without any cell are left out.

    Raises:
        DataError: wrong shape, infinite values, data sets with different numbers of seeds, or a
            cell that exists under one seed and not under another.

    Example:
        >>> from clbench.statistics.class_macro import strata
        >>> nan = float("nan")
        >>> (part,) = strata({"lits": [[0.25, nan], [nan, nan]]})  # the second patient has no class
        >>> part.n, part.values.tolist(), part.valid.tolist()
        (1, [[[0.25, 0.0]]], [[1.0, 0.0]])
    """
    parts = []
    for name, array in checked(table).items():
        absent = np.isnan(array[0])
        scored = ~absent.all(axis=1)
        parts.append(
            Stratum(
                name=name,
                values=np.nan_to_num(array[:, scored]),
                valid=(~absent[scored]).astype(np.float64),
            )
        )
    return tuple(parts)


def has_cells(parts: Sequence[Stratum]) -> bool:
    """Whether any patient has any class.

    Example:
        >>> from clbench.statistics.class_macro import has_cells, strata
        >>> nan = float("nan")
        >>> has_cells(strata({"lits": [[nan, 0.1]]})), has_cells(strata({"lits": [[nan, nan]]}))
        (True, False)
    """
    return any(part.valid.any() for part in parts)


def macro_mean(table: Table) -> float:
    """Mean over classes of the mean over patients that have the class; nan without cells.

    Classes of different data sets count as different classes. Seeds are averaged first.

    Example:
        >>> from clbench.statistics.class_macro import macro_mean
        >>> nan = float("nan")
        >>> macro_mean({"lits": [[1.0, 0.5], [0.0, nan]]})  # mean of the class means 0.5 and 0.5
        0.5
        >>> macro_mean({"lits": [[1.0], [0.5]], "kits": [[0.25]]})  # (0.75 + 0.25) / 2
        0.5

    Source: the paper's "Mean" over classes that live in different test sets.
    """
    parts = strata(table)
    return float(per_patient_weights(parts).sum()) if has_cells(parts) else math.nan


def per_patient_weights(parts: Sequence[Stratum]) -> Floats:
    """(patients of all data sets,) each patient's share of the macro mean; they sum to it.

    Example:
        >>> from clbench.statistics.class_macro import per_patient_weights, strata
        >>> per_patient_weights(strata({"lits": [[1.0], [0.5]], "kits": [[0.25]]})).tolist()
        [0.25, 0.125, 0.125]
    """
    classes = sum(int((part.valid.sum(axis=0) > 0).sum()) for part in parts)
    if classes == 0:
        return np.empty(0)
    shares = []
    for part in parts:
        per_class = np.maximum(part.valid.sum(axis=0), 1.0)
        shares.append((part.values.mean(axis=0) / per_class).sum(axis=1) / classes)
    return np.concatenate(shares)
