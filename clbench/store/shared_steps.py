"""Taught steps that several runs share, each in a folder under its identity.

Such a folder holds `step<t>.pt`, what it took and who taught it (`step<t>.json`), its lines of the
log and of the trace, what it depends on (`identity.json`), and a lock while it is taught.
"""

from __future__ import annotations

from pathlib import Path

from clbench.errors import StoreError
from clbench.store import checkpoint, files, run_folder

TRACE = "trace.csv"
EVENTS = "events.jsonl"


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
    files.link_or_copy(old.with_name(EVENTS), path.with_name(EVENTS))
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
    if not (path.exists() and path.with_name(EVENTS).exists()):
        return False  # or its folder was removed while it was taught
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
        StoreError: the disk is full, the folder cannot be written, or the step's log is gone.
    """
    number = int(path.stem.removeprefix("step"))
    log = path.with_name(EVENTS)
    if not log.exists():
        raise StoreError(
            "the log of a step that was just taught is gone",
            where=log,
            expected="a folder that nobody removes while runs are made",
            got="no such file",
            next_step="repeat the run's command: the step is taught anew, those before it are kept",
        )
    later = {n for n in _steps(folder) if n > number}
    run_folder.take_events(folder / EVENTS, log, number, later)
    if (trace := path.with_name(TRACE)).exists():
        head, *lines = trace.read_bytes().splitlines(keepends=True)
        own = folder / TRACE
        before = own.read_bytes().splitlines(keepends=True)[1:] if own.exists() else []
        of_step = [(int(line.partition(b",")[0]), line) for line in before]
        earlier = [line for step, line in of_step if step < number]
        after = [line for step, line in of_step if step in later]
        files.write_bytes(own, b"".join([head, *earlier, *lines, *after]))
    for file in (path.with_suffix(".json"), path):
        files.link_or_copy(file, folder / file.name)


def _steps(folder: Path) -> set[int]:
    """Numbers of the steps whose checkpoints a run has."""
    names = (path.stem.removeprefix("step") for path in folder.glob("step*.pt"))
    return {int(name) for name in names if name.isdecimal()}
