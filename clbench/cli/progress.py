"""Progress of a run: what is being done, how far, how long it will take, and where its log lies.

A terminal gets a bar per stage; a file (the output of a SLURM job) gets a line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from clbench.store.record import RunRecord

STAGES = {
    "looked at": "look at cases",
    "prepared": "preprocess",
    "opened": "open cases",
    "pseudo": "pseudo labels",
    "exam": "examine",
    "validated": "score validation cases",
    "predicted": "predict",
}
"""Event of one case → what is done with it."""
LINE_S = 60.0
"""Seconds between two lines of a stage where the output is a file."""


@dataclass(kw_only=True)
class Stage:
    """One row of equal pieces of work: updates of a phase, cases of an examination."""

    name: str
    """What is printed."""
    total: int
    """Pieces of work."""
    done: int
    """Pieces that are done, also by an attempt that was stopped."""
    first: int
    """`done` when this process was first told of one."""
    began_s: float
    """When that was."""
    printed_s: float = float("-inf")
    """When its last line was printed."""

    def left_s(self, now_s: float) -> float | None:
        """Seconds the rest will take at the pace of this process; None: not known yet."""
        here = self.done - self.first
        return (now_s - self.began_s) / here * (self.total - self.done) if here else None


class Progress:
    """A context that turns the events of a run into one bar, or lines, per stage.

    Args:
        console: where to print; None: standard output.
        clock: seconds since some moment.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.clock = console or Console(), clock
        self.bars = Bars(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.stage = Stage(name="", total=0, done=0, first=0, began_s=0.0)
        self.resumed_at = 0
        self.lesson, self.logs = "", tuple[str, ...]()

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say what is odd, and go on."""
        self._print(f"warning: {text}", style="yellow")

    def _advance(self, name: str, done: int | None, total: int, note: str) -> None:
        """One more piece of work is done; `done` counts them, None: one more than before."""
        name, now_s = f"{self.lesson}: {name}" if self.lesson else name, self.clock()
        if name != self.stage.name:
            before = self.resumed_at if done is None else done - 1
            self.stage = Stage(name=name, total=total, done=before, first=before + 1, began_s=now_s)
            self.resumed_at = 0
            self.task = self.bars.add_task(name, total=total, completed=before, note="")
        stage = self.stage
        stage.done = stage.done + 1 if done is None else done
        left_s = stage.left_s(now_s)
        if left_s is not None and stage.done < total:
            note += f", {timedelta(seconds=round(left_s))} left"
        self.bars.update(self.task, completed=stage.done, note=note)
        due = now_s - stage.printed_s >= LINE_S or stage.done == total
        if not self.console.is_terminal and due:
            stage.printed_s = now_s
            self._print(f"{name} {stage.done}/{total}, {note}")

    def watch(self, event: dict[str, Any]) -> None:
        """Show one event; never changes the run."""
        match event["event"]:
            case "plan":
                self._plan(event["plan"])
            case "step":
                number = event["lesson"].number
                self.lesson = f"step {number}/{event['of']}"
                log = f": log {self.logs[number - 1]}" if self.logs else ""
                self._print(f"{self.lesson}{log}")
            case "shared":
                self._print(f"{self.lesson}: already taught by a run that shares it")
            case "going on":
                self.resumed_at = event["updates"]
                self._print(
                    f"{self.lesson}: going on in phase {event['phase']}, after update "
                    f"{event['updates']}"
                )
            case "passed over":
                self._print(f"warning: {event['what']}", style="yellow")
            case "note":
                self._print(f"note: {event['what']}")
            case "already finished":
                self._print("this run is finished; --fresh repeats it")
            case "finished":
                for warning in RunRecord.read(event["folder"]).warnings or ():
                    self._print(f"WARNING: {warning['message']}", style="yellow")
            case "update":
                self._advance(event["phase"], None, event["of"], f"loss {event['loss']:.3f}")
            case kind if kind in STAGES:
                self._advance(STAGES[kind], event["done"], event["of"], f"case {event['case']}")

    def _plan(self, plan: Any) -> None:
        """What will be run, on what, and where it is written."""
        splits = zip(plan.benchmark.steps, plan.catalog.splits, strict=True)
        steps = "; ".join(
            f"{step.name}: learned elsewhere"
            + (f", {len(split.test)} test ({step.source})" if split.test else "")
            if step.given is not None
            else f"{step.name}: {len(split.train)} train, {len(split.test)} test ({step.source})"
            for step, split in splits
        )
        steps += "".join(
            f"; {external.name}: {len(split.test)} test"
            for external, split in zip(
                plan.benchmark.external_tests, plan.catalog.external_splits, strict=True
            )
        )
        self._print(
            f"{plan.benchmark.name} v{plan.benchmark.version}, {plan.strategy_name}, "
            f"profile {plan.profile.name}, seed {plan.settings.seed}, {plan.device}\n"
            f"{steps}\nrun folder: {plan.folder}"
        )
        self.logs = tuple(
            str(plan.step_folder(i + 1) / "events.jsonl") for i in range(len(plan.benchmark.steps))
        )
        if plan.weights is not None:
            self._print(
                f"backbone weights: {len(plan.weights.loaded)} tensors loaded, "
                f"{len(plan.weights.skipped)} of the file skipped, "
                f"{len(plan.weights.missing)} of the network missing (named in run.json); "
                + ", ".join(f"{p} {a} of {b}" for p, (a, b) in plan.weights.parts.items())
            )
