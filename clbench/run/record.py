"""run.json: made from a plan, and read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import clbench
from clbench.data.catalog import Catalog, exam_cases
from clbench.data.layouts import named_folders
from clbench.data.phantom.generate import version_of
from clbench.errors import SettingError, StoreError
from clbench.evaluation.cost.allocator import in_use
from clbench.evaluation.metrics.case import implementations
from clbench.run.plan import Plan, load_strategy, open_catalog
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import split_order
from clbench.spec.settings import (
    GROUPS,
    PhantomSettings,
    Profile,
    change,
    load_profile,
)
from clbench.spec.splits import PARTS, Split
from clbench.spec.toml import benchmark_files, load_benchmark
from clbench.store import files
from clbench.store.record import (
    ALL,
    RecordedCourse,
    RecordedExternal,
    RecordedStep,
    RunRecord,
)
from clbench.strategy.contract import Strategy


def new_record(plan: Plan) -> RunRecord:
    """The first `run.json`: what was asked for, with every default, and where it runs."""
    settings = recorded_settings(dataclasses.asdict(plan.settings), plan.benchmark)
    settings.pop("splits")
    return RunRecord(
        status="unfinished",
        steps_done=0,
        run_id=plan.folder.name,
        strategy=plan.strategy_name,
        extends=plan.extends,
        tuned=plan.tuned,
        past=plan.strategy.declaration.past,
        identity=plan.identity,
        with_defaults={
            "strategy": {"version": plan.strategy.version, **dataclasses.asdict(plan.strategy)},
            "profile": dataclasses.asdict(plan.profile),
        },
        text_encoding=dict(plan.vectors.record),
        backbone_weights=None
        if plan.weights is None
        else {
            **dataclasses.asdict(plan.weights),
            "overlap": plan.weights.overlap(plan.benchmark.sources),
        },
        settings=settings,
        shared_step1=plan.shared_step1,
        device=str(plan.device)
        if plan.device.type == "cpu"
        else torch.cuda.get_device_name(plan.device),
        threads=torch.get_num_threads(),
        allocator=in_use(),
        metrics=implementations(("dice",)),
        **data_and_host(plan.benchmark, plan.catalog, ("torch", "monai")),
    )


def recorded_settings(settings: Mapping[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    """Settings as JSON; paths of files that are read again later hold from any working folder.

    Args:
        settings: with `bench`, `data`, `out` and `cache` as typed.
        benchmark: names the sources of `data`.
    """

    def absolute(path: str | Path) -> str:
        return str(Path(path).expanduser().absolute())

    bench, data = settings["bench"], settings["data"]
    if data is not None:
        named = named_folders(data, [s.name for s in benchmark.sources])
        data = (
            absolute(data)
            if named is None
            else ",".join(f"{name}={absolute(folder)}" for name, folder in named.items())
        )
    return {
        **settings,
        "bench": absolute(bench) if registry.is_path(bench) else bench,
        "data": data,
        "out": str(settings["out"]),
        "cache": None if settings["cache"] is None else absolute(settings["cache"]),
    }


def data_and_host(
    benchmark: Benchmark, catalog: Catalog, packages: Sequence[str]
) -> dict[str, Any]:
    """The fields that say the same of every run; `packages` beside those that always count.

    Args:
        benchmark: the course.
        catalog: its data.
        packages: whose versions count, beside those that every record names.
    """
    return {
        "patients": catalog.patients,
        "data_fingerprint": catalog.fingerprint,
        "course": course_of(benchmark, catalog),
        "split_sha256": {
            f"step {i}, {s.name}": hashlib.sha256(
                json.dumps(dataclasses.asdict(s)).encode()
            ).hexdigest()[:16]
            for i, s in enumerate(catalog.splits, 1)
        },
        "versions": {
            "clbench": clbench.__version__,
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in (*packages, "numpy", "scipy", "nibabel")},
        },
        "git": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host_cpus": os.cpu_count(),
    }


def course_of(benchmark: Benchmark, catalog: Catalog) -> RecordedCourse:
    """The course as every record holds it: steps, groups, training and test cases.

    `patient_of` names the patient behind each test case whose id is not the patient itself: the
    patient is the unit of every mean and test. On the phantom every case is a subject of its own.
    """

    def named(step: int, cases: Sequence[str]) -> list[str]:
        return [f"{catalog.source(step).name}/{case}" for case in cases]

    return RecordedCourse(
        steps=[
            RecordedStep(name=s.name, source=s.source, learns=list(s.learns), again=list(s.again))
            for s in benchmark.steps
        ],
        groups=groups_of(benchmark),
        train=[named(i, s.train) for i, s in enumerate(catalog.splits, 1)],
        test=[named(i, s.test) for i, s in enumerate(catalog.splits, 1)],
        patient_of={
            f"{source.name}/{case}": source.patient_of(case)
            for i, name, case in exam_cases(catalog)
            if catalog.patients
            for source in [catalog.source(i)]
            if source.patient_of(case) != case
        },
        declares=[dataclasses.asdict(s) for s in benchmark.declares],
        external_tests=[
            RecordedExternal(
                source=e.source,
                annotates=[
                    n
                    for n in benchmark.structures(len(benchmark.steps))
                    if n in catalog.source(place).structures
                ],
                test=named(place, split.test),
            )
            for place, (e, split) in enumerate(
                zip(benchmark.external_tests, catalog.external_splits, strict=True),
                len(benchmark.steps) + 1,
            )
        ],
    )


def groups_of(benchmark: Benchmark) -> dict[str, list[str]]:
    """Table groups as a record holds them; without any, the mean of all structures."""
    named = {name: list(members) for name, members in benchmark.groups.items()}
    return named or {ALL: list(benchmark.structures(len(benchmark.steps)))}


def keep_course(folder: Path, bench: str) -> None:
    """Copy a course that is named by its file into the run folder, with its splits.

    Raises:
        SpecError: it cannot be read.
        StoreError: it cannot be written.
    """
    if registry.is_path(bench):
        for name, content in benchmark_files(registry.benchmark_path(bench)).items():
            files.make_folder((folder / "course" / name).parent)
            files.write_bytes(folder / "course" / name, content)


def git_commit() -> str | None:
    """The commit of the checkout clbench was imported from, or None for an installed wheel."""
    git = shutil.which("git")
    if git is None:
        return None
    described = subprocess.run(  # noqa: S603  # fixed arguments
        [git, "-C", str(Path(clbench.__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


# ------------------------------------------------------------------- what a run was made of, again


def benchmark_of(record: RunRecord) -> Benchmark:
    """The benchmark of a run: as it is registered now, or the copy of its file in the run folder.

    Raises:
        StoreError: it has another version now, or its file has another content or is gone.
    """
    bench, identity = record.settings["bench"], record.identity
    if (copy := record.course_file) is not None:
        benchmark = load_benchmark(copy)
        if order := split_order(bench)[1]:
            benchmark = benchmark.in_order(order)
    elif registry.is_path(bench) and not registry.benchmark_path(bench).is_file():
        raise StoreError(
            "the course file of the run is not where it was, and the run keeps no copy",
            where=record.run_id,
            expected=f"{bench}, or a copy at {record.folder}/course/{Path(bench).name}",
            next_step="copy the file there, with the split files it names",
        )
    else:
        benchmark = registry.benchmark(bench)
    if benchmark.version != identity.bench_version:
        raise StoreError(
            "the run was made on another version of the benchmark",
            where=record.run_id,
            expected=f"{benchmark.name} v{benchmark.version}",
            got=f"v{identity.bench_version}",
            next_step="run it again",
        )
    if identity.course not in (None, benchmark.digest()):
        raise StoreError(
            "the benchmark's file was changed since the run was made",
            where=copy or bench,
            expected=f"content {identity.course}",
            got=benchmark.digest(),
            next_step="run it again",
        )
    return benchmark


def profile_of(record: RunRecord) -> Profile:
    """The settings a run was made with; what the profile of that name says today plays no part.

    Predictions made elsewhere were made with no profile: the one whose phantom and whose grid they
    were scored on is known by its name alone.
    """
    if record.external:
        return load_profile(record.settings["profile"])
    recorded = record.identity.profile  # what differs from the defaults
    groups = {g: change(kind(), recorded.get(g, {}), g) for g, kind in GROUPS.items()}
    return Profile(name=recorded["name"], **groups)


def phantom_of(record: RunRecord) -> PhantomSettings:
    """Size and version of the phantom a run was made on; the version as its fingerprint says.

    Raises:
        DataError: this clbench cannot make that version.
    """
    phantom, mark = profile_of(record).phantom, record.data_fingerprint
    if not mark.startswith("phantom-"):
        return phantom  # no phantom's fingerprint: whoever compares it will say so
    return dataclasses.replace(phantom, version=version_of(mark))


def strategy_of(record: RunRecord) -> Strategy:
    """The strategy of a run with the options it had, defaults of its version included.

    The options are those of the record, and not the words they were typed in: a setting may come
    from a file of `clbench tune`, and a default may be another one today.

    Raises:
        StoreError: the strategy of today does not have an option of the run, or refuses its value.
    """
    name, recorded = record.settings["strategy"], dict(record.strategy_options)
    version = recorded.pop("version")
    recorded.pop("class", None)
    earlier = type(load_strategy(name, {})).defaults_of(version) or {}
    try:
        return load_strategy(name, {**earlier, **recorded})
    except SettingError as err:
        raise StoreError(
            f"{name} cannot be put together as the run had it",
            where=record.run_id,
            expected=err.expected,
            got=f"{err.got} for {err.where}" if err.got is not None else err.where,
            next_step="use the clbench that made the run, or run it again",
        ) from err


def catalog_of(record: RunRecord, *, data: str | None = None, cache: Path | None = None) -> Catalog:
    """The data of a run, opened with the settings and splits it recorded, checked by content.

    Args:
        record: of the run.
        data: where the data lies now, as in `clbench run --data`; None: where the run found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.

    Raises:
        StoreError: the benchmark has another version now, or the data changed.
        DataError: the data cannot be read.
    """
    settings, benchmark, profile = record.settings, benchmark_of(record), profile_of(record)
    data = data or settings["data"]
    if data is None and not record.patients:
        profile = dataclasses.replace(profile, phantom=phantom_of(record))
    if cache is None and settings["cache"] is not None:
        cache = Path(settings["cache"])
    recorded = map(recorded_split, [*record.identity.splits, *record.identity.external_tests])
    names = [*(s.name for s in benchmark.steps), *(e.source for e in benchmark.external_tests)]
    catalog = open_catalog(
        benchmark,
        profile,
        data=data,
        splits=dict(zip(names, recorded, strict=True)),
        cache=cache,
    )
    if catalog.fingerprint != record.data_fingerprint:
        raise StoreError(
            "the data is not what the run was made on",
            where=data or "the phantom",
            expected=record.data_fingerprint,
            got=catalog.fingerprint,
            next_step="name the same files with --data, and their cache with --cache; if they "
            "changed for good, run again",
        )
    return catalog


def recorded_split(raw: Mapping[str, Any]) -> Split:
    """Return a split as a run records it: cases alone, the rule that drew them is done with."""
    return Split(**{name: raw[name] for name in ("name", *PARTS, "origin")})
