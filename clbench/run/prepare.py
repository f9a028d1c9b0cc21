"""Look at the cases of a course and preprocess them ahead of their use, in several processes.

A run reads every case before it starts, to hash and check it, and preprocesses each when it first
opens it, one after another. On real data that takes minutes to hours before the first update; cases
have nothing to do with each other, so here they are shared out, and each is unpacked once to be
looked at and once to be preprocessed. An entry of the cache is locked while it is made: two runs
that prepare the same data wait for each other's cases and make none twice.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
import psutil
from joblib.externals.loky import process_executor

from clbench import signals
from clbench.data.cache import Looks, VolumeCache
from clbench.data.catalog import Catalog, reading
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import grid, spacing_of
from clbench.errors import DataError, StoreError
from clbench.evaluation.cost.allocator import freed_memory, left_in_group
from clbench.spec.benchmark import Preprocessing, Source

PEAK_BYTES_PER_VOXEL = 18
"""Memory of one process while it prepares a case, per voxel of the larger of its two grids
(tests/perf/prepare.py sees 16.5 of them for a packed 16-bit CT; other types need more)."""
WORTH_VOXELS = 2e8
"""Below so many voxels in all, starting processes saves less than a second
(tests/perf/prepare.py on two cores: 1.25 times as fast with 7e7 voxels, 1.75 times with 4e8)."""

IDLE_S = 10.0
"""Seconds after which a process without work ends: those that have looked at cases then preprocess
them, and what they kept is free before training takes as much."""

Watch = Callable[[dict[str, Any]], None]
Case = tuple[int, Source, CaseFiles]
"""A number of `Catalog.source`, that source, and where the case lies."""


def unprepared(catalog: Catalog) -> list[Case]:
    """The cases of the course's splits that are not in the cache yet, each once.

    Args:
        catalog: of the course.

    Raises:
        DataError: a file cannot be read.
    """
    cases: dict[tuple[str, str], Case] = {}
    splits = (*catalog.splits, *catalog.external_splits)
    for number, split in enumerate(splits, 1):
        source = catalog.source(number)
        for case in (*split.train, *split.validation, *split.test):
            cases[source.name, case] = number, source, catalog.files[source.name][case]
    left = []
    for number, source, files in cases.values():
        with reading(number, files.case):
            if not catalog.cache.is_prepared(files, source, catalog.preprocessing):
                left.append((number, source, files))
    return left


def voxels(case: Case, pre: Preprocessing | None) -> int:
    """Voxels of a case on its file's grid or the model's, whichever has more.

    Args:
        case: the case.
        pre: names the model's spacing; None: on its file's grid.

    Raises:
        DataError: the header cannot be used.
    """
    number, _, files = case
    with reading(number, files.case):
        shape, affine = grid(files.image)
    finer = 1.0 if pre is None else math.prod(spacing_of(affine)) / math.prod(pre.spacing_mm)
    return round(math.prod(shape) * max(1.0, finer))


def processes(cases: Sequence[Case], pre: Preprocessing) -> int:
    """How many processes this machine has cores and free memory for, at least one.

    Args:
        cases: that are to be prepared.
        pre: how.

    Raises:
        DataError: a header cannot be used.
    """
    return _fitting([voxels(case, pre) for case in cases])


def _fitting(sizes: Sequence[int]) -> int:
    """See `processes`.

    Args:
        sizes: voxels of the cases.
    """
    free = min(psutil.virtual_memory().available, left_in_group())
    fit = free // (max(sizes, default=1) * PEAK_BYTES_PER_VOXEL)
    from clbench import reproducibility  # imports torch, which processes that prepare do without

    return int(max(1, min(reproducibility.cores(), fit, len(sizes))))


def look(
    cache: VolumeCache,
    cases: Sequence[Case],
    what: Looks,
    *,
    jobs: int | None = None,
    watch: Watch = lambda event: None,
) -> None:
    """Look at cases, each once, in several processes; what was seen is kept in the cache.

    A case that cannot be read is passed over here: whoever needs it is told.

    Args:
        cache: keeps what is seen; cases it knows are not looked at again.
        cases: image and annotation of each; the number is of no matter.
        what: see `VolumeCache.look`.
        jobs: processes; None: as many as there are cores and free memory for where there is much
            to look at, else this one.
        watch: is told of every case that was looked at.

    Raises:
        StoreError: a process was killed.
        Stopped: asked to, between two cases; what was seen is kept.
    """
    left = [
        (n, source, files)
        for n, source, files in cases
        if not cache.has_looked(files, source, what)
    ]
    if not left:
        return
    if jobs is None:
        sizes = [size for case in left if (size := _readable(case)) is not None]
        jobs = _fitting(sizes) if sum(sizes) > WORTH_VOXELS else 1
    calls = [joblib.delayed(_look)(cache.root, case, what, os.getpid()) for case in left]
    for _ in _shared_out(calls, jobs, cache.root, "looked at", watch):
        pass


def _readable(case: Case) -> int | None:
    """Voxels of a case; None where its header cannot be used."""
    try:
        return voxels(case, None)
    except DataError:
        return None


def _look(root: Path, case: Case, what: Looks, parent: int) -> tuple[str]:
    """Look at a case, in a process of its own or not; see `VolumeCache.look`."""
    number, source, files = case
    _start_work(number, parent)
    with reading(number, files.case):
        VolumeCache(root).look(files, source, what)
    return (files.case,)


def prepare(catalog: Catalog, jobs: int | None = None, watch: Watch = lambda event: None) -> int:
    """Preprocess every case of a course that is not in the cache yet.

    Args:
        catalog: of the course.
        jobs: processes; None: as many as there are cores and free memory for, and none at all where
            the work is small, so that cases are then prepared when they are opened.
        watch: is told of every case that is ready.

    Returns:
        How many cases were prepared here, and not by another process meanwhile.

    Raises:
        DataError: a case cannot be used; the others are in the cache all the same.
        StoreError: the cache folder cannot be written, or a process was killed.
        Stopped: asked to, between two cases; what is ready stays.
    """
    left, pre = unprepared(catalog), catalog.preprocessing
    if jobs is None:
        worth = sum(voxels(case, pre) for case in left) > WORTH_VOXELS
        jobs = processes(left, pre) if worth else 0
    if not left or not jobs:
        return 0
    root, here = catalog.cache.root, os.getpid()
    calls = [joblib.delayed(_prepare_case)(root, case, pre, here) for case in left]
    failed: list[Exception] = []
    written = 0
    for _, count, error in _shared_out(calls, jobs, root, "prepared", watch):
        written += count
        failed += [error] if error else []
    if failed:
        raise min(failed, key=str)  # whichever process was first, the same one is named
    return written


def _shared_out(
    calls: Sequence[Any], jobs: int, root: Path, event: str, watch: Watch
) -> Iterator[Any]:
    """What calls return, in the order in which they end; each is of one case, named first.

    Args:
        calls: as joblib takes them.
        jobs: processes; 1: this one.
        root: of the cache, for errors.
        event: what `watch` is told of each.
        watch: is told.

    Raises:
        StoreError: a process was killed.
        Stopped: asked to, between two cases.
    """
    count = min(jobs, len(calls))
    ready: Generator[Any, None, None] = joblib.Parallel(
        n_jobs=count,
        return_as="generator_unordered",
        pre_dispatch="n_jobs",
        idle_worker_timeout=IDLE_S,
    )(calls)
    try:
        for done, result in enumerate(ready, 1):
            yield result
            watch({"event": event, "done": done, "of": len(calls), "case": result[0]})
            signals.check(f"case {result[0]} {event}")
    except BrokenProcessPool as err:
        signals.check("preprocessing")  # of which a process that had hardly begun dies
        raise StoreError(
            "a process that read a case was killed, as happens where memory runs out",
            where=root,
            next_step="`clbench data prepare --jobs 1` with the same course and data; what is "
            "ready stays",
        ) from err
    finally:
        with warnings.catch_warnings():  # what was begun and is not waited for
            warnings.simplefilter("ignore", UserWarning)
            ready.close()


def _start_work(number: int, parent: int) -> None:
    """What a process does before it reads a case.

    Args:
        number: of the step.
        parent: the process that waits for it.
    """
    if os.getpid() != parent:  # signals are left to the process that waits
        signals.leave_to_parent(number)
        # joblib takes kept memory for a leak, and would replace a process that has much
        process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    freed_memory().settle()  # each array anew costs page faults, for which processes wait


def _prepare_case(
    root: Path, case: Case, pre: Preprocessing, parent: int
) -> tuple[str, int, Exception | None]:
    """Prepare a case, in a process of its own or not.

    Returns:
        The case, entries written, and what went wrong.
    """
    number, source, files = case
    cache = VolumeCache(root)
    try:
        _start_work(number, parent)
        with reading(number, files.case):
            cache.get(files, source, pre)
    except StoreError:  # of the cache: it holds for every case
        raise
    except Exception as err:  # raised where all are waited for
        return files.case, cache.written, err
    return files.case, cache.written, None
