"""Taught steps that several runs share, each in a folder under its identity.

Such a folder holds `step<t>.pt`, what it took and who taught it (`step<t>.json`), its lines of the
log and of the trace, what it depends on (`identity.json`), and a lock while it is taught.
"""

from __future__ import annotations

from pathlib import Path

from clbench.errors import StoreError
from clbench.store import checkpoint, files, run_folder

TRACE = "trace.csv"


def run_name(folder: Path) -> str:
    """Course, strategy and id of a run, from its folder."""
    return "/".join(folder.absolute().parts[-3:])


def adopt_step(old: Path, path: Path) -> None:
    """Share a first step that was taught before 0.2, when strategies of one course shared it.

    Args:
        old: its checkpoint.
        path: where it lies from now on.

    Raises:
        StoreError: a file beside it is missing, or the disk is full.
    """
    origin = {"identity": path.parent.name, "run": None, "before": None}
    note = {**files.read_json(old.with_suffix(".json")), "origin": origin}
    files.write_json(path.with_suffix(".json"), note)
    files.link_or_copy(old.with_name("events.jsonl"), path.with_name("events.jsonl"))
    files.link_or_copy(old, path)


def continues(path: Path, before: str | None) -> bool:
    """Whether a step is taught, and from the very model that a run has.

    Two machines may teach equal steps to other bits; a step goes with the one it started from.

    Args:
        path: its checkpoint.
        before: `state_digest` of the run's step before it.

    Raises:
        StoreError: the note beside the checkpoint is damaged.
    """
    if not path.exists():
        return False
    origin = files.read_json(path.with_suffix(".json")).get("origin")
    return origin is not None and origin["before"] == before


def take_back(path: Path, folder: Path) -> bool:
    """Let a run have the checkpoint of a step again, where the one that runs share is still it.

    Args:
        path: the shared checkpoint.
        folder: of the run, which has the note beside its own one.

    Returns:
        Whether the run has it now.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    notes = [file.with_suffix(".json") for file in (path, folder / path.name)]
    if not all(file.is_file() for file in (path, *notes)):
        return False
    if notes[0].read_bytes() != notes[1].read_bytes():  # it was taught anew meanwhile
        return False
    try:
        checkpoint.load(path)
    except StoreError:
        return False
    files.link_or_copy(path, folder / path.name)
    return True


def take_step(path: Path, folder: Path) -> None:
    """Let a run have a taught step: its lines of log and trace, its cost, its checkpoint.

    The checkpoint comes last: a step without it is not taught. It is the same file under a second
    name, so it takes no further room, and stays when the shared one is deleted.

    Args:
        path: the checkpoint.
        folder: of the run, which holds the steps before.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    number = int(path.stem.removeprefix("step"))
    run_folder.take_events(folder / "events.jsonl", path.with_name("events.jsonl"), number)
    if (trace := path.with_name(TRACE)).exists():
        head, *lines = trace.read_bytes().splitlines(keepends=True)
        own = folder / TRACE
        before = own.read_bytes().splitlines(keepends=True)[1:] if own.exists() else []
        earlier = [line for line in before if int(line.partition(b",")[0]) < number]
        files.write_bytes(own, b"".join([head, *earlier, *lines]))
    for file in (path.with_suffix(".json"), path):
        files.link_or_copy(file, folder / file.name)
