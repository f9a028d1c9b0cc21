"""Progress of a run on the terminal: what is being done, how far, how long."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from clbench.store.record import RunRecord


class Progress:
    """A context that turns the events of a run into one bar per stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.bars = Bars(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self.stage: tuple[str, Any] | None = None
        self.lesson = ""

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

    def _advance(self, stage: tuple[str, Any], total: int, note: str) -> None:
        if stage != self.stage:
            self.stage = stage
            self.task = self.bars.add_task(f"{self.lesson}: {stage[0]}", total=total, note="")
        self.bars.update(self.task, advance=1, note=note)

    def watch(self, event: dict[str, Any]) -> None:
        """Show one event; never changes the run."""
        match event["event"]:
            case "plan":
                plan = event["plan"]
                steps = "; ".join(
                    f"{step.name}: {len(split.train)} train, {len(split.test)} test ({step.source})"
                    for step, split in zip(plan.benchmark.steps, plan.catalog.splits, strict=True)
                )
                self.console.print(
                    f"{plan.benchmark.name} v{plan.benchmark.version}, {plan.strategy_name}, "
                    f"profile {plan.profile.name}, seed {plan.settings.seed}, {plan.device}\n"
                    f"{steps}",
                    highlight=False,
                )
                if plan.weights is not None:
                    self.console.print(
                        f"backbone weights: {len(plan.weights.loaded)} tensors loaded, "
                        f"{len(plan.weights.skipped)} of the file skipped, "
                        f"{len(plan.weights.missing)} of the network missing (named in run.json)",
                        highlight=False,
                    )
            case "step":
                lesson = event["lesson"]
                self.lesson = f"step {lesson.number}/{event['of']}"
            case "shared":
                self.console.print(
                    f"{self.lesson}: already taught, shared by strategies that start alike"
                )
            case "going on":
                self.console.print(
                    f"{self.lesson}: going on in phase {event['phase']}, after update "
                    f"{event['updates']}",
                    highlight=False,
                )
            case "passed over":
                self.console.print(f"warning: {event['what']}", style="yellow", highlight=False)
            case "note":
                self.console.print(f"note: {event['what']}", highlight=False)
            case "already finished":
                self.console.print("this run is finished; --fresh repeats it")
            case "finished":
                for warning in RunRecord.read(event["folder"]).warnings or ():
                    self.console.print(
                        f"WARNING: {warning['message']}", style="yellow", highlight=False,
                        markup=False,
                    )  # fmt: skip
            case "update":
                stage = (event["phase"], event["step"])
                self._advance(stage, event["of"], f"loss {event['loss']:.3f}")
            case "pseudo":
                self._advance(("pseudo labels", self.lesson), event["of"], f"case {event['case']}")
            case "exam":
                self._advance(("examine", self.lesson), event["of"], f"case {event['case']}")
            case "predicted":
                self._advance(("predict", self.lesson), event["of"], f"case {event['case']}")
