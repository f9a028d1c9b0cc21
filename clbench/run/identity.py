"""What a run is, and what each of its taught steps is, as data from which their names are made.

A run's identity holds everything that may move a number of it. A taught step depends on less: on
the steps before it, its training and validation cases, what they show, settings that act on
teaching, and the seed. Test cases, groups and metrics belong to the examination. So courses share
their steps as far as they agree, under `SHARED` of the folder of results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import clbench
from clbench.data.catalog import Catalog
from clbench.errors import SettingError
from clbench.nets.text_encodings import Vectors
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.settings import Profile
from clbench.spec.taxonomy import STRUCTURES, structure
from clbench.store.files import sha256
from clbench.store.record import Identity
from clbench.store.run_folder import run_id
from clbench.strategy.contract import Strategy

_NOT_TAUGHT_WITH = {
    "phantom": None,  # its cases are known by their content
    "text": None,  # the vectors are
    "data": ("expect_hu", "spacing_mm", "patch_vox", "window_hu"),  # as `preprocessing` says
    "backbone": ("weights",),  # the file's checksum is
    "examine": ("postprocess", "trace_every"),
}
"""Group of settings → fields that change nothing a step is taught with; None: all of them."""


def sparse(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, groups likewise.

    So a setting that a later version adds, with a default that changes nothing, changes no run id.
    A default that changes moves numbers, and raises `numerics`, or the version of its strategy.
    """
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            if inner := sparse(value):
                changed[f.name] = inner
        elif f.default is dataclasses.MISSING or value != f.default:
            changed[f.name] = value
    return changed


def described(strategy: Strategy, version: int) -> dict[str, Any]:
    """What a run id knows of a strategy, at a version of it."""
    own = {"version": version} if version != 1 else {}
    return {"class": type(strategy).__name__, **own, **sparse(strategy)}


def first_step(strategy: Strategy) -> dict[str, Any]:
    """What teaches the first step of a strategy, which others may teach alike."""
    plain = strategy.first_step()
    own = vars(type(plain)).get("step1_version")  # not inherited: a subclass has its own numbers
    return described(plain, own or plain.version)


def numerics(profile: Profile) -> int:
    """The version of the code's numbers; with `amp=bf16` they moved when CPUs began to obey it."""
    return clbench.NUMERICS_BF16 if profile.train.amp == "bf16" else clbench.NUMERICS


def course_identity(bench: str, benchmark: Benchmark, catalog: Catalog) -> dict[str, Any]:
    """What a run's identity says of the course and its data.

    Args:
        bench: as the course was named; one that is not registered is held by its content.
        benchmark: the course.
        catalog: its data.
    """
    return {
        "bench": benchmark.name,
        "bench_version": benchmark.version,
        "data_fingerprint": catalog.fingerprint,
        "splits": [dataclasses.asdict(s) for s in catalog.splits],
        "external_tests": [dataclasses.asdict(s) for s in catalog.external_splits],
        "numerics": clbench.NUMERICS,
        "course": benchmark.digest() if registry.is_path(bench) else None,
    }


def file_hash(path: str | None) -> str | None:
    """SHA-256 of the file of backbone weights; None where there is none.

    Raises:
        SettingError: it does not exist.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingError(
            "the file of backbone weights does not exist", where="backbone.weights", got=path
        )
    return sha256(file)


def step_identities(
    identity: Identity,
    *,
    benchmark: Benchmark,
    catalog: Catalog,
    profile: Profile,
    strategy: Strategy,
    vectors: Vectors,
) -> tuple[dict[str, Any], ...]:
    """Of each step in order, what it depends on; `before` is the id of the step before it.

    Args:
        identity: of the run: strategy, weights, seed and numerics.
        benchmark: the course.
        catalog: its data; no volume is opened.
        profile: all settings.
        strategy: the method.
        vectors: of the structures of the course.

    Raises:
        DataError: a file of a case cannot be read.
    """
    common = {
        "numerics": identity.numerics,
        "seed": identity.seed,
        "weights": identity.weights,
        "profile": _of_teaching(profile),
        "preprocessing": dataclasses.asdict(catalog.preprocessing),
    }
    place = {name: i for i, name in enumerate(vectors.names)}
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(benchmark.steps, 1):
        content: dict[str, Any] = {
            "before": run_id(steps[-1]) if steps else None,
            "learns": list(step.learns),
            **({"again": list(step.again)} if step.again else {}),
        }
        if step.given is not None:
            steps.append({**content, "given": step.given})
            continue
        teacher = strategy.first_step() if number == 1 else strategy
        split = catalog.splits[number - 1]
        content |= {
            **common,
            "strategy": first_step(strategy) if number == 1 else dict(identity.strategy),
            "source": step.source,
            "shown": sorted(benchmark.shown(number)),
            "train": [[c, catalog.volume_digest(number, c)] for c in split.train],
            "validation": [[c, catalog.volume_digest(number, c)] for c in split.validation],
            "vectors": hashlib.sha256(
                vectors.array[[place[name] for name in step.learns]].tobytes()
            ).hexdigest(),
        }
        # sampling and decoders treat these apart, and a course may declare them otherwise tomorrow
        shown = [name for name in content["shown"] if name not in STRUCTURES]
        if lesions := [name for name in shown if structure(name).kind in ("tumor", "cyst")]:
            content["lesions"] = lesions
        if declared := _declared(benchmark, number):
            content["declared"] = declared
        if cases := _with_hidden(catalog, number, benchmark.shown(number)):
            content["hidden"] = cases
        if code := foreign_code(teacher, profile):
            content["code"] = code
        if number > 1 and profile.examine.trace_every:  # the trace is written while it is taught
            content["traced"] = [profile.examine.trace_every, profile.examine.postprocess]
        steps.append(content)
    return tuple(steps)


def _declared(benchmark: Benchmark, number: int) -> dict[str, dict[str, Any]]:
    """What a course declares of structures and a step is taught with, where it is not the default.

    Pseudo labels are cleaned by these facts, also those of structures that the step does not show.
    What contains a structure stands in the digests of the volumes it was learned from, if any.

    Args:
        benchmark: the course.
        number: 1-based step.
    """
    declared: dict[str, dict[str, Any]] = {}
    for step in benchmark.steps[:number]:
        for name in step.learns:
            if name in STRUCTURES:
                continue
            facts = structure(name)
            read = {"single_component": facts.single_component or None, "mirror": facts.mirror}
            if step.given is not None:
                read["parent"] = facts.parent
            if told := {key: value for key, value in read.items() if value is not None}:
                declared[name] = told
    return declared


def _with_hidden(catalog: Catalog, number: int, shown: frozenset[str]) -> list[str]:
    """Cases of a step whose files hold voxels of structures that the cases do not annotate.

    Until 0.2 crops were centered on these voxels, unless the step hid something else of the case.

    Args:
        catalog: the data.
        number: 1-based step.
        shown: what the step shows.
    """
    if not catalog.patients:  # the phantom draws what a case annotates, and nothing else
        return []
    source, split = catalog.source(number), catalog.splits[number - 1]
    files = catalog.files[source.name]
    return [
        case
        for case in (*split.train, *split.validation)
        if shown.issuperset(files[case].annotated(source))
        and catalog.cache.unannotated(files[case], source)
    ]


def _of_teaching(profile: Profile) -> dict[str, Any]:
    """The settings that act on teaching, where they differ from their defaults."""
    groups = sparse(profile)
    for name in ("name", "summary"):
        groups.pop(name, None)
    for group, fields in _NOT_TAUGHT_WITH.items():
        if fields is None:
            groups.pop(group, None)
            continue
        kept = {k: v for k, v in groups.get(group, {}).items() if k not in fields}
        groups.pop(group, None)
        if kept:
            groups[group] = kept
    return groups


def foreign_code(strategy: Strategy, profile: Profile) -> Mapping[str, str]:
    """Class or function from outside of clbench that teaches → SHA-256 of its module's file.

    Whoever writes a strategy or a backbone changes its code far more often than its version.
    """
    code = {}
    for made in (*type(strategy).__mro__, registry.load("backbone", profile.backbone.name)):
        module = getattr(made, "__module__", "")
        if module.split(".")[0] in ("clbench", "builtins", "abc", "typing"):
            continue
        try:
            source = Path(inspect.getfile(made)).read_bytes()
        except (OSError, TypeError):  # of no file, as in a notebook
            source = b""
        name = f"{module}.{getattr(made, '__qualname__', made)}"
        code[name] = hashlib.sha256(source).hexdigest()[:16]
    return code
