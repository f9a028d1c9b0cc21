"""run.json, typed: what a run was made of, how far it is, and what it took.

Records of earlier versions are brought up to date here, and nowhere else, when they are read. A
key this version does not know is written back as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import StoreError
from clbench.spec.names import split_order
from clbench.store import checksums, run_folder

T = TypeVar("T")
ALL = "Mean"
"""Printed name of the one group of a course that names none: all its structures."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run id is made from: everything that may move a number of the run."""

    bench: str
    """Name of the benchmark."""
    bench_version: int
    """Its version."""
    strategy: Mapping[str, Any]
    """`class`, `version` above 1, and the hyperparameters that differ from their defaults."""
    profile: Mapping[str, Any]
    """`name`, and by group the settings that differ from their defaults."""
    data_fingerprint: str
    """Checksum of the data."""
    splits: Sequence[Mapping[str, Any]]
    """Per step `name`, `train`, `validation`, `test` and `origin`; a rule that draws, applied."""
    vectors: str | None
    """SHA-256 of the structures' vectors; None: not known."""
    weights: str | None
    """SHA-256 of the backbone's file of weights; None: none."""
    seed: int
    """Seed of the run."""
    numerics: int
    """`clbench.NUMERICS`: raised by any change of the code that moves a number."""
    course: str | None = None
    """Digest of a course named by its file, whose version nobody raises; else no key."""
    external_tests: Sequence[Mapping[str, Any]] = ()
    """Splits of the external test sets, in order; no key where there are none."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Keys this version does not know."""

    @property
    def run_id(self) -> str:
        """12 hexadecimal digits, of the canonical JSON."""
        return run_folder.run_id(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As it stands in `run.json`."""
        content = _to_json(self)
        if self.course is None:
            del content["course"]
        if not self.external_tests:
            del content["external_tests"]
        return content


@dataclass(frozen=True, kw_only=True)
class RecordedExternal:
    """An external test set of a recorded course. Cases are named `source/case`."""

    source: str
    """Data set."""
    annotates: Sequence[str]
    """Structures of the course that it annotates, in channel order."""
    test: Sequence[str]
    """Its test cases."""


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """A step of a recorded course."""

    name: str
    """Name of the step."""
    source: str
    """Data set it learns from."""
    learns: Sequence[str]
    """Structures it teaches first, in channel order."""
    again: Sequence[str] = ()
    """Structures of earlier steps that it teaches again; no key where there are none."""


@dataclass(frozen=True, kw_only=True)
class RecordedCourse:
    """The course as a run met it. Cases are named `source/case`."""

    steps: Sequence[RecordedStep]
    """In order."""
    groups: Mapping[str, Sequence[str]]
    """Printed name of a group of a table → structures."""
    train: Sequence[Sequence[str]]
    """Training cases of each step."""
    test: Sequence[Sequence[str]]
    """Test cases of each step."""
    patient_of: Mapping[str, str] = field(default_factory=dict)
    """Test case → patient, where the patient's name is not that of the case."""
    declares: Sequence[Mapping[str, Any]] = ()
    """Fields of the structures that the course adds to the taxonomy; no key where it adds none."""
    external_tests: Sequence[RecordedExternal] = ()
    """Sources that are only tested on; no key where there are none."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Keys this version does not know."""

    @property
    def structures(self) -> tuple[str, ...]:
        """Every structure of the course, in channel order."""
        return tuple(name for step in self.steps for name in step.learns)

    @property
    def test_cases(self) -> tuple[str, ...]:
        """Every test case once, in order of the steps; those of external test sets last."""
        tests = (*self.test, *(e.test for e in self.external_tests))
        return tuple(dict.fromkeys(case for cases in tests for case in cases))

    def to_json(self) -> dict[str, Any]:
        """As it stands in `run.json`."""
        content = _to_json(self) | {"steps": [_without_none_again(s) for s in self.steps]}
        content["external_tests"] = [dataclasses.asdict(e) for e in self.external_tests]
        for name in ("declares", "external_tests"):
            if not content[name]:
                del content[name]
        return content


def _without_none_again(step: RecordedStep) -> dict[str, Any]:
    content = dataclasses.asdict(step)
    if not step.again:
        del content["again"]
    return content


NOT_IN_FILE = ("unknown", "folder")
_WRITTEN_AS_NULL = ("backbone_weights", "shared_step1", "git", "threads", "host_cpus")
"""Fields that a record says even where there is nothing; others are then left out."""


@dataclass(kw_only=True)
class RunRecord:
    """The content of `run.json`; each field is the key of that name."""

    schema: int = run_folder.SCHEMA
    """Version of the layout of a run folder."""
    status: str
    """`finished`, or `unfinished`."""
    external: bool | None = None
    """True: the predictions were made elsewhere; None: by clbench."""
    extends: dict[str, Any] | None = None
    """What the first steps were learned as, where they were not taught here: the run, or the file
    of weights. None: every step was taught."""
    tuned: dict[str, Any] | None = None
    """How its settings were chosen: what `clbench tune` wrote of its trials (rule, course, data,
    budget, cases opened, …), `realistic`, checksum of the settings `file`, and `profile_before`:
    the profile as the identity would hold it without tuning. None: not by `clbench tune`."""
    steps_done: int
    """Steps that are taught and examined; of predictions made elsewhere the last one scored."""
    run_id: str
    """Name of the run folder, made from `identity`."""
    strategy: str
    """Name of the strategy, or of the method from outside."""
    past: str | None = None
    """What the strategy declares to need of earlier steps; None: not recorded."""
    identity: Identity
    """What the run id is made from."""
    with_defaults: dict[str, Any] | None = None
    """`strategy` and `profile` with every default; None: not recorded."""
    patients: bool
    """Whether the data are patients; False: the phantom."""
    data_fingerprint: str
    """Checksum of the data."""
    text_encoding: dict[str, Any] = field(default_factory=dict)
    """How structures were encoded as vectors; empty: not known."""
    backbone_weights: dict[str, Any] | None = None
    """What was loaded into the backbone from a file of weights (`WeightReport`), and `overlap`: the
    course's sources that the weights' declared training data names; None: nothing was loaded."""
    course: RecordedCourse
    """What was taught, and on which cases."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the command line asked for."""
    split_sha256: dict[str, str] = field(default_factory=dict)
    """Split of each step → checksum."""
    shared_step1: str | None = None
    """Names the first step, which strategies share; None: there is none. Until 0.2 its folder."""
    step_origins: dict[str, dict[str, str | None]] | None = None
    """Step → `identity`, its folder in `_shared` of the results; `run`, which taught it; `before`,
    a checksum of the model and memory that it started from."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package → version."""
    git: str | None = None
    """Commit of the checkout clbench was imported from; None: not from a checkout."""
    command: list[str] = field(default_factory=list)
    """Words of the command line."""
    device: str = "unknown"
    """`cpu`, or the name of the GPU."""
    threads: int | None = None
    """CPU threads; None: not known."""
    host_cpus: int | None = None
    """CPUs of the machine."""
    allocator: str | None = None
    """What gave the process that began the run its memory; its time and memory depend on it."""
    host: dict[str, Any] | None = None
    """The machine on which the run began; see `clbench.reproducibility.host`."""
    starts: int | None = None
    """How often the run was started."""
    resumed_elsewhere: list[dict[str, Any]] | None = None
    """Steps worked on on another machine than `host`, and what differs."""
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Step → seconds, bytes and parameters."""
    uncounted: str | None = None
    """Why the operations of the network could not be counted."""
    ledger: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Step → purpose → cases that were opened."""
    warnings: list[dict[str, Any]] | None = None
    """What the monitors remarked; None: the run was not monitored."""
    reexamined: dict[str, dict[str, Any]] | None = None
    """Step → the case examined twice, and the largest difference."""
    predictions: dict[str, dict[str, Any]] | None = None
    """Of predictions made elsewhere: step → folder, labels and holes."""
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric → version and implementation."""
    files: dict[str, str] | None = None
    """File of the run → SHA-256; None: not sealed."""
    record_sha256: str | None = None
    """SHA-256 of this record without this key; None: not sealed."""
    excerpt: str | None = None
    """Set where this is a copy that holds less than the run did; says what."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """Keys this version does not know."""
    folder: Path | None = field(default=None, compare=False)
    """The run folder it was read from; not in the file."""

    @property
    def course_file(self) -> Path | None:
        """The copy of the course file in the run folder; None: a registered course, or no copy."""
        bench = Path(str(self.settings.get("bench", "")))
        name, _ = split_order(bench.name)
        copy = None if self.folder is None else self.folder / "course" / name
        return copy if copy is not None and copy.is_file() else None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.identity.seed

    @property
    def strategy_options(self) -> dict[str, Any]:
        """The strategy's options and version; those it left at a default where recorded."""
        return {"version": 1, **(self.with_defaults or self.identity.to_json())["strategy"]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path | str = "run.json") -> RunRecord:
        """The record as this version writes it.

        Args:
            content: of `run.json`, of this schema; it is not changed.
            where: the file: named in an error, and where the copy of the course lies.

        Raises:
            StoreError: something that every version recorded is missing.
        """
        content = _upgraded(content)
        course = content.get("course")
        if isinstance(course, Mapping) and isinstance(course.get("steps"), list):
            steps = [_typed(RecordedStep, step, where, "course.steps.") for step in course["steps"]]
            external = [
                _typed(RecordedExternal, one, where, "course.external_tests.")
                for one in course.get("external_tests", ())
            ]
            course = {**course, "steps": steps, "external_tests": external}
        parts = {
            "identity": (Identity, content.get("identity")),
            "course": (RecordedCourse, course),
        }
        for name, (kind, part) in parts.items():
            if name in content:
                content[name] = _typed(kind, part, where, f"{name}.")
        record = _typed(cls, content, where)
        record.folder = where.parent if isinstance(where, Path) else None
        return record

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of a run folder.

        Raises:
            StoreError: missing, damaged, of another schema, or not whole.
        """
        return cls.from_json(run_folder.read_record(folder), folder / "run.json")

    def to_json(self) -> dict[str, Any]:
        """The content of `run.json`."""
        content = _to_json(self)
        content["identity"], content["course"] = self.identity.to_json(), self.course.to_json()
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        absent = {name for name in optional if content.get(name) is None} - {*_WRITTEN_AS_NULL}
        return {name: value for name, value in content.items() if name not in absent}

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        run_folder.write_record(folder, self.to_json())

    def seal(self, folder: Path, *, below: str = "") -> None:
        """Enter the checksum of every file of the run, and of the record itself.

        Args:
            folder: the run.
            below: see `clbench.store.checksums.seal`.
        """
        content = self.to_json()
        checksums.seal(folder, content, below=below)
        self.files, self.record_sha256 = content["files"], content["record_sha256"]

    def need_finished(self, folder: Path) -> None:
        """Refuse a run with steps to come.

        Raises:
            StoreError: there are some.
        """
        if self.status != "finished":
            steps = len(self.course.steps)
            raise StoreError(
                "the run is not finished",
                where=folder,
                expected=f"{steps} steps taught and examined",
                got=f"{self.steps_done} of {steps}",
                next_step="repeat the run's command; it goes on where it stopped",
            )

    def reseal(self, folder: Path, *, below: str = "") -> None:
        """Write `run.json` after a file was made anew, sealed again where it was sealed.

        Args:
            folder: the run.
            below: see `clbench.store.checksums.seal`.
        """
        if self.record_sha256 is not None:
            self.seal(folder, below=below)
        self.write(folder)


def _to_json(record: Any) -> dict[str, Any]:
    """The fields of a record under their names, and the keys it does not know."""
    names = [f.name for f in dataclasses.fields(record) if f.name not in NOT_IN_FILE]
    return {**{name: getattr(record, name) for name in names}, **record.unknown}


def _typed(kind: type[T], content: Any, where: Path | str, prefix: str = "") -> T:
    """A part of a record out of its JSON.

    Raises:
        StoreError: something that every version recorded is missing.
    """
    known = {f.name: f for f in dataclasses.fields(kind) if f.name not in NOT_IN_FILE}  # type: ignore[arg-type]  # dataclasses only
    required = [
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    ]
    table = content if isinstance(content, Mapping) else {}
    if absent := [prefix + name for name in required if name not in table]:
        raise StoreError(
            "the record of a run is not whole",
            where=where,
            expected=", ".join(prefix + name for name in required),
            got=f"no {', '.join(absent)}",
            next_step="take the record from a copy, or run again with --fresh",
        )
    values = {name: table[name] for name in known if name in table}
    if unknown := {k: v for k, v in table.items() if k not in known}:
        values["unknown"] = unknown
    return kind(**values)


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which what earlier versions recorded otherwise stands where it stands today."""
    new = dict(content)
    if "past" not in new and (declared := new.get("declares")):
        new["past"] = declared.get("past")
    course = new.get("course")
    if isinstance(course, dict) and course.get("groups") == {}:  # written so until 0.1.0
        learned = [name for step in course.get("steps", ()) for name in step["learns"]]
        new["course"] = {**course, "groups": {ALL: learned}}
    if isinstance(new.get("identity"), dict):
        splits = new["identity"].get("splits")
        if isinstance(splits, Mapping):  # by step, in its order
            new["identity"] = {**new["identity"], "splits": list(splits.values())}
    return new


# What must be equal before two runs stand in one table.
_ALIKE = (
    "bench", "bench_version", "numerics", "data_fingerprint", "splits", "profile", "course",
    "external_tests",
)  # fmt: skip


def _question(record: RunRecord) -> dict[str, Any]:
    """The part of a run's identity that says which question it answers.

    Text encoding, pre-trained weights and what tuning chose belong to the method: they name a row,
    not a table.
    A method from outside has no profile.
    """
    parts = {k: getattr(record.identity, k) for k in _ALIKE}
    if record.tuned is not None:
        parts["profile"] = record.tuned["profile_before"]
    profile = question(parts.pop("profile"))
    return parts if record.external else {**parts, "profile": profile}


def question(profile: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's settings that says which question it answers; see `_question`.

    Args:
        profile: of its identity, group → name → value.
    """
    groups = {k: v for k, v in profile.items() if k != "text"}
    backbone = {k: v for k, v in groups.pop("backbone", {}).items() if k != "weights"}
    return {**groups, **({"backbone": backbone} if backbone else {})}


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The settings in which two profiles differ, with both values; those not recorded are defaults.

    Args:
        one: group → name → value, where it is not the default.
        other: the same.
    """

    def leaves(profile: Mapping[str, Any]) -> dict[str, Any]:
        groups = {k: v if isinstance(v, Mapping) else {"": v} for k, v in profile.items()}
        return {f"{g}.{n}".rstrip("."): v for g, named in groups.items() for n, v in named.items()}

    a, b = leaves(one), leaves(other)
    names = [name for name in {**a, **b} if a.get(name, ...) != b.get(name, ...)]
    if "name" in names:  # of another profile all else may differ
        names = ["name"]
    return "; ".join(f"{n}: {a.get(n, 'default')}, {b.get(n, 'default')}" for n in names)


def refuse_mixture(records: Sequence[RunRecord]) -> None:
    """Runs of one table must answer the same question: same benchmark, data, splits and profile.

    Metrics that two runs have in common must be of one version.

    Raises:
        StoreError: they differ; names the two runs and what differs.
    """
    ordered = sorted(records, key=lambda r: bool(r.external))  # a profile to compare first
    versions: dict[str, Any] = {}
    for other in ordered:
        first = ordered[0]
        ours, theirs = _question(first), _question(other)
        differs = [
            k if k != "profile" else f"profile ({_changed(ours[k], theirs[k])})"
            for k in _ALIKE
            if k in theirs and ours.get(k) != theirs[k]
        ]
        if first.patients != other.patients:
            differs.insert(0, "phantom and patients")
        metric_versions = {name: how.get("version") for name, how in other.metrics.items()}
        if changed := sorted(
            m for m, v in metric_versions.items() if versions.setdefault(m, v) != v
        ):
            differs.append(f"metric versions ({', '.join(changed)})")
        if differs:
            raise StoreError(
                "these runs do not belong in one table",
                where=f"{first.strategy}/{first.run_id} and {other.strategy}/{other.run_id}",
                expected="the same benchmark, data, splits, profile, numerics and metrics",
                got="different " + ", ".join(differs),
                next_step="keep them in different results folders (--out, --results; of a study "
                "file `out`)"
                + ("; or score the older one again: `clbench score RUN`" if changed else ""),
            )
