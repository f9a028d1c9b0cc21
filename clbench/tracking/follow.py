"""Following a run: its events become numbers over updates; its scores come at the end of each step.

What is sent is read from the run's own files and events, so the run folder stays the truth: a run
that goes on, or one that was finished long ago, gives a tracker the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clbench.errors import ClbenchError, StoreError, first_line
from clbench.report.scores import Run, read_frame, scores_of
from clbench.signals import Stopped
from clbench.spec import registry
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.tracking.trackers import End, Tracker

FOLDER = "_trackers"
"""Folder beside the courses in which trackers keep their files."""


class Follower:
    """Sends the events of a run to one tracker; a tracker that fails is left, and the run goes on.

    Args:
        tracker: where the numbers go.
        warn: is told once why the tracking ended early.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], object]) -> None:
        self.tracker, self.warn = tracker, warn
        self.at = 0
        self.began: dict[str, int] = {}
        self.step, self.step_began = 0, 0
        self.broken = False
        self.open = False

    def watch(self, event: Mapping[str, Any]) -> None:
        """Take one event of a run; never changes the run."""
        if self.broken:
            return
        try:
            self._take(event)
        except Exception as err:  # somebody else's package must not stop a training of days
            self.broken = True
            self._leave()
            self.warn(f"the tracker {type(self.tracker).__name__} failed and is left: {err}")

    def replay(self, folder: Path) -> None:
        """Send a run that lies on disk, finished or not.

        Raises:
            StoreError: the run cannot be read.
            ClbenchError: the tracker failed.
        """
        record = RunRecord.read(folder)
        events = _events(folder, record)
        try:
            self.tracker.begin(_name(record), _flat(record.with_defaults or {}))
            for event in events:
                self._take(event)
            self._scores(folder)
            self._end("finished" if record.status == "finished" else "stopped")
        except ClbenchError:
            self._leave()
            raise
        except Exception as err:
            self._leave()
            raise ClbenchError(
                f"the tracker {type(self.tracker).__name__} failed",
                where=folder,
                expected="a tracker that takes the numbers of the run",
                got=first_line(err),
                next_step="see that its server or its folder can be reached, and send it again",
            ) from err

    def close(self, how: End) -> None:
        """The run was stopped or has failed.

        Args:
            how: it ended, where it did not finish.
        """
        if self.open:
            self.watch({"event": "ended", "how": how})

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "plan":
                self._begin(event["plan"])
            case "shared":  # taught by another run: its log has its updates
                path = Path(event["path"])
                if path.name == f"step{self.step}.pt":  # of which a part was sent
                    self.at = self.step_began
                self._read(path.parent / "events.jsonl")
            case "going on":  # updates after the saved place are made, and sent, once more
                self.at = self.began.get(event["phase"], 0) + event["updates"]
            case "update" | "validation":
                self._log(event)
            case "finished" | "already finished":
                self._scores(Path(event["folder"]))
                self._end("finished")
            case "ended":
                self._end(event["how"])

    def _begin(self, plan: Any) -> None:
        name = f"{plan.benchmark.name}/{plan.strategy_name}/{plan.identity.run_id}"
        groups = {"strategy": plan.identity.strategy, "profile": plan.identity.profile}
        self.tracker.begin(name, _flat({**groups, "seed": plan.settings.seed}))
        self.open = True
        if plan.settings.fresh:
            return
        # it goes on: what was sent before is sent again, at the same places
        self._read(plan.folder / "events.jsonl")
        for number in range(1, len(plan.benchmark.steps) + 1):
            if not (plan.folder / f"step{number}.pt").is_file():
                self._read(plan.step_folder(number) / "events.jsonl")
                break

    def _read(self, log: Path) -> None:
        if log.is_file():
            for event in run_folder.read_events(log):
                self._log(event)

    def _log(self, event: Mapping[str, Any]) -> None:
        if not (values := numbers(event)):
            return
        if event["step"] != self.step:
            self.step, self.step_began, self.began = event["step"], self.at, {}
        if event["event"] == "update":
            if event["epoch"] == event["iteration"] == 0 and event["phase"] in self.began:
                # the phase is taught anew, from its first update on, and so is what follows it
                self.at = self.began[event["phase"]]
                self.began = {name: at for name, at in self.began.items() if at < self.at}
            self.began.setdefault(event["phase"], self.at)
            self.at += 1
        self.tracker.log(values, self.at)

    def _scores(self, folder: Path) -> None:
        for step, values in scores(folder).items():
            self.tracker.log({f"dice after step {step}/{k}": v for k, v in values.items()}, self.at)

    def _leave(self) -> None:
        """End what failed, as far as it can be: open, it would get the numbers of the next run."""
        with suppress(Exception):
            self._end("failed")
        self.open = False

    def _end(self, how: End) -> None:
        if how == "finished":
            self.tracker.end()  # all that a tracker of an earlier clbench knows
        else:
            self.tracker.end(how)
        self.open = False


def _events(folder: Path, record: RunRecord) -> list[dict[str, Any]]:
    """The log of a run; of an excerpt, which may hold none, its scores alone are sent.

    Raises:
        StoreError: it has lost its log.
    """
    log = folder / "events.jsonl"
    if not log.is_file() and record.excerpt is None:
        raise StoreError(
            "the log of a run is missing",
            where=log,
            expected="the events of its updates",
            got="no such file",
            next_step="take the file back from a copy of the run",
        )
    return run_folder.read_events(log) if log.is_file() else []


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """What of an event is sent: loss, its terms, learning rate, gradient norm; validation.

    Args:
        event: a line of `events.jsonl`.

    Example:
        >>> from clbench.tracking.follow import numbers
        >>> numbers({"event": "update", "step": 2, "loss": 0.5, "terms": {"dice": 0.4}, "lr": 0.1})
        {'step 2/loss': 0.5, 'step 2/loss dice': 0.4, 'step 2/lr': 0.1}
    """
    match event.get("event"):
        case "update":
            terms = {f"loss {term}": value for term, value in (event.get("terms") or {}).items()}
            named = {name: event.get(name) for name in ("loss", "lr", "grad_norm")} | terms
        case "validation":
            named = {"validation dice": event.get("dice")}
        case _:
            return {}
    return {
        f"step {event['step']}/{name}": float(value)
        for name, value in sorted(named.items())
        if isinstance(value, int | float) and math.isfinite(value)
    }


def scores(folder: Path) -> dict[int, dict[str, float]]:
    """Step → structure → Dice, as the tables have it: strict, on the source that taught it.

    Args:
        folder: of a run with `scores.csv`.

    Raises:
        StoreError: the scores cannot be read.
    """
    run = Run.read(folder)
    (matrix,) = scores_of(read_frame([run]), [run], scoring="strict").reference.r
    means: dict[int, dict[str, float]] = {}
    for (step, name), value in matrix.items():
        if math.isfinite(value):
            means.setdefault(step, {})[name] = value
    return means


@contextmanager
def tracked(
    names: Sequence[str], out: Path, warn: Callable[[str], object]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A context in which the events of a run go to trackers.

    Args:
        names: registered trackers.
        out: results folder; files of trackers go to `_trackers/NAME` in it.
        warn: is told why a tracking ended early.

    Yields:
        What takes one event.

    Raises:
        UnknownName: no such tracker.
        ClbenchError: its package is not installed.
    """
    followers = [Follower(tracker, warn) for tracker in _trackers(names, out)]

    def watch(event: Mapping[str, Any]) -> None:
        for follower in followers:
            follower.watch(event)

    how: End = "failed"
    try:
        yield watch
    except (Stopped, KeyboardInterrupt):
        how = "stopped"
        raise
    finally:
        for follower in followers:
            follower.close(how)


def send(folder: Path, names: Sequence[str], out: Path) -> None:
    """Send a run that lies on disk to trackers.

    Args:
        folder: of the run.
        names: registered trackers.
        out: folder in which trackers keep their files, `_trackers/NAME`.

    Raises:
        UnknownName: no such tracker.
        ClbenchError: its package is not installed, or it failed.
        StoreError: the run cannot be read.
    """
    for tracker in _trackers(names, out):
        Follower(tracker, print).replay(folder)


def _trackers(names: Sequence[str], out: Path) -> list[Tracker]:
    return [registry.load("tracker", n)(out / FOLDER / n) for n in dict.fromkeys(names)]


def _name(record: RunRecord) -> str:
    return f"{record.identity.bench}/{record.strategy}/{record.run_id}"


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `profile.train.lr` → text."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
