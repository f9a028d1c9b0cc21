"""run.json, typed: what a run was made of, how far it is, and what it took.

Records of earlier versions are brought up to date here, and nowhere else, when they are read. A
key this version does not know is written back as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.store import checksums, run_folder

_LEFT_OUT = (
    "external",
    "past",
    "with_defaults",
    "host",
    "starts",
    "resumed_elsewhere",
    "uncounted",
    "warnings",
    "reexamined",
    "predictions",
    "files",
    "record_sha256",
    "excerpt",
)
"""Fields that are no keys of the file while they are None; every other None is written."""


@dataclass(kw_only=True)
class RunRecord:
    """The content of `run.json`; each field is the key of that name."""

    schema: int = run_folder.SCHEMA
    """Version of the layout of a run folder."""
    status: str
    """`finished`, or `unfinished`."""
    external: bool | None = None
    """True: the predictions were made elsewhere; None: by clbench."""
    steps_done: int
    """Steps that are taught and examined; of predictions made elsewhere the last one scored."""
    run_id: str
    """Name of the run folder, made from `identity`."""
    strategy: str
    """Name of the strategy, or of the method from outside."""
    past: str | None = None
    """What the strategy declares to need of earlier steps; None: not recorded."""
    identity: dict[str, Any]
    """What the run id is made from: benchmark, strategy, profile, data, splits, seed, numerics."""
    with_defaults: dict[str, Any] | None = None
    """`strategy` and `profile` with every default; None: not recorded."""
    patients: bool
    """Whether the data are patients; False: the phantom."""
    data_fingerprint: str
    """Checksum of the data."""
    text_encoding: dict[str, Any] = field(default_factory=dict)
    """How structures were encoded as vectors; empty: not known."""
    backbone_weights: dict[str, Any] | None = None
    """What was loaded into the backbone from a file of weights; None: nothing."""
    course: dict[str, Any]
    """`steps`, `groups`, `train`, `test` and `patient_of`; see `clbench.run.record.course_of`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the command line asked for."""
    split_sha256: dict[str, str] = field(default_factory=dict)
    """Split of each step → checksum."""
    shared_step1: str | None = None
    """Folder of the first step's checkpoint, which strategies share; None: there is none."""
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
    """Set where this is a copy without weights."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """Keys this version does not know."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.identity["seed"])

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path | str = "run.json") -> RunRecord:
        """The record as this version writes it.

        Args:
            content: of `run.json`, of this schema; it is not changed.
            where: the file, for the error.

        Raises:
            StoreError: something that every version recorded is missing.
        """
        content = _upgraded(content)
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "unknown"}
        required = [
            n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
        ]
        if absent := [name for name in required if name not in content]:
            raise StoreError(
                "the record of a run is not whole",
                where=where,
                expected=", ".join(required),
                got=f"no {', '.join(absent)}",
                next_step="take the record from a copy, or run again with --fresh",
            )
        return cls(
            **{name: content[name] for name in known if name in content},
            unknown={k: v for k, v in content.items() if k not in known},
        )

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of a run folder.

        Raises:
            StoreError: missing, damaged, of another schema, or not whole.
        """
        return cls.from_json(run_folder.read_record(folder), folder / "run.json")

    def to_json(self) -> dict[str, Any]:
        """The content of `run.json`."""
        content = {
            f.name: value
            for f in dataclasses.fields(self)
            if f.name != "unknown"
            and ((value := getattr(self, f.name)) is not None or f.name not in _LEFT_OUT)
        }
        return {**content, **self.unknown}

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        run_folder.write_record(folder, self.to_json())

    def seal(self, folder: Path) -> None:
        """Enter the checksum of every file of the run, and of the record itself."""
        content = self.to_json()
        checksums.seal(folder, content)
        self.files, self.record_sha256 = content["files"], content["record_sha256"]

    def reseal(self, folder: Path) -> None:
        """Seal again after a file of a finished run was made anew; without a seal it stays so."""
        if self.record_sha256 is not None:
            self.seal(folder)


def _upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which what earlier versions recorded otherwise stands where it stands today."""
    new = dict(content)
    if "past" not in new and (declared := new.get("declares")):
        new["past"] = declared.get("past")
    if isinstance(new.get("identity"), dict):
        splits = new["identity"].get("splits")
        if isinstance(splits, Mapping):  # by step, in its order
            new["identity"] = {**new["identity"], "splits": list(splits.values())}
    if isinstance(new.get("course"), dict):
        new["course"] = {"patient_of": {}, **new["course"]}  # each case a patient
    return new
