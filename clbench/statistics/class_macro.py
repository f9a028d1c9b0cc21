"""The primary endpoint: the class-macro difference over patients and its permutation tests.

Patients are the unit: all classes of a patient move together, patients of
different data sets are separate strata, and seeds are crossed with patients (every seed scores the
same patients). A table is a mapping: data set → (patients, classes) or (seeds, patients, classes),
A minus B, nan where a patient does not annotate a class. Its interval is in
`clbench.statistics.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.errors import DataError, SettingError
from clbench.statistics.equivalence import Equivalence
from clbench.statistics.paired_tests import (
    ALL_ZERO,
    NO_PAIRS,
    TOO_SMALL,
    Method,
    PairedTest,
    smallest_sign_p,
)
from clbench.types import Floats

Table = Mapping[str, ArrayLike]
_ENUMERATE_UP_TO = 20  # 2^20 sign patterns take milliseconds
_CHUNK = 10_000


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
    found = []
    for name, array in checked(table).items():
        absent = np.isnan(array[0])
        scored = ~absent.all(axis=1)
        found.append(
            Stratum(
                name=name,
                values=np.nan_to_num(array[:, scored]),
                valid=(~absent[scored]).astype(np.float64),
            )
        )
    return tuple(found)


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


def sign_flip(
    table: Table, *, seed: int = 0, draws: int = 100_000, alpha: float = 0.05
) -> PairedTest:
    """Stratified sign-flip permutation test of the class-macro difference.

    Null: a patient's differences could as well have the other sign, all its classes together. Exact
    up to 20 patients whose share is not 0, else sampled with p = (b + 1) / (draws + 1). It is
    conditional on the trained models.

    Args:
        table: differences A minus B per data set.
        seed: of the sampled sign patterns.
        draws: sampled sign patterns.
        alpha: level for the flag "n too small to reach alpha".

    Returns:
        `statistic` is the macro difference; `n` patients; `n_nonzero` patients with a share.

    Raises:
        DataError: see `strata`.

    Example:
        >>> from clbench.statistics.class_macro import sign_flip
        >>> test = sign_flip({"lits": [[0.1], [0.2], [0.3]]})  # 2 of 8 sign patterns are as extreme
        >>> test.p, test.p_greater, test.method
        (0.25, 0.125, 'exact')
        >>> round(test.statistic, 4), test.smallest_p, test.flags
        (0.2, 0.25, ('n too small to reach alpha',))

    Source: Fisher's randomization test; with one class it equals scipy's `permutation_test`
        (`permutation_type="samples"`).
    """
    weights = per_patient_weights(strata(table))
    moving = weights[np.abs(weights) > 1e-12]
    if moving.size == 0:
        p = 1.0 if weights.size else math.nan
        return PairedTest(
            test="sign flip",
            statistic=0.0 if weights.size else math.nan,
            p=p,
            p_greater=p,
            p_less=p,
            n=weights.size,
            n_nonzero=0,
            method="none",
            smallest_p=1.0,
            flags=(ALL_ZERO if weights.size else NO_PAIRS,),
        )
    observed = float(moving.sum())
    slack = 1e-9 * float(np.abs(moving).sum())  # sums of one set in another order are equal
    smallest = smallest_sign_p(moving.size)
    if moving.size <= _ENUMERATE_UP_TO:
        sums = np.zeros(1)
        for weight in moving:
            sums = np.concatenate([sums + weight, sums - weight])
        hits, total = _tails(sums, observed, slack), sums.size
        method: Method = "exact"
    else:
        rng = np.random.default_rng(seed)
        hits, total = np.ones(3, dtype=np.int64), draws + 1  # the observed pattern counts itself
        for start in range(0, draws, _CHUNK):
            size = (min(_CHUNK, draws - start), moving.size)
            signs = 2.0 * rng.integers(0, 2, size=size, dtype=np.int8) - 1.0
            hits = hits + _tails(signs @ moving, observed, slack)
        method, smallest = "monte carlo", max(smallest, 1.0 / total)
    return PairedTest(
        test="sign flip",
        statistic=observed,
        p=float(hits[0] / total),
        p_greater=float(hits[1] / total),
        p_less=float(hits[2] / total),
        n=weights.size,
        n_nonzero=moving.size,
        method=method,
        smallest_p=smallest,
        draws=draws if method == "monte carlo" else None,
        flags=(TOO_SMALL,) if smallest > alpha else (),
    )


def equivalence_flip(
    table: Table, *, low: float, high: float, seed: int = 0, draws: int = 100_000
) -> Equivalence:
    """Two one-sided sign-flip tests of low < macro difference < high.

    Args:
        table: differences A minus B per data set.
        low: lower margin, declared before looking.
        high: upper margin.
        seed: of the sampled sign patterns.
        draws: sampled sign patterns.

    Raises:
        SettingError: low is not below high.
        DataError: see `strata`.

    Example:
        >>> from clbench.statistics.class_macro import equivalence_flip
        >>> test = equivalence_flip({"lits": [[0.0]] * 6}, low=-0.02, high=0.02)
        >>> test.p, test.n, test.method  # 1 of 2^6 sign patterns on each side
        (0.015625, 6, 'exact')

    Source: Schuirmann's two one-sided tests with the permutation test of `sign_flip`.
    """
    if not low < high:
        raise SettingError(
            "equivalence margins are swapped", expected="low < high", got=(low, high)
        )
    above, below = (
        sign_flip(
            {k: np.asarray(v, dtype=np.float64) - margin for k, v in table.items()},
            seed=seed,
            draws=draws,
        )
        for margin in (low, high)
    )
    return Equivalence(
        p=float(np.max([above.p_greater, below.p_less])),
        p_above_low=above.p_greater,
        p_below_high=below.p_less,
        low=low,
        high=high,
        n=above.n,
        method=above.method,
        flags=tuple(dict.fromkeys(above.flags + below.flags)),
    )


def _tails(sums: Floats, observed: float, slack: float) -> NDArray[np.int64]:
    """How many sums are as extreme as the observed one: two-sided, above, below."""
    return np.array(
        [
            (np.abs(sums) >= abs(observed) - slack).sum(),
            (sums >= observed - slack).sum(),
            (sums <= observed + slack).sum(),
        ],
        dtype=np.int64,
    )
