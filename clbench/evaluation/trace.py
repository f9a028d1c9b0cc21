"""Tracing old structures while a new step is taught (stability gap): writes `trace.csv`.

Every so many updates the model that would be served is measured on the
validation cases of this and all earlier steps (purpose `trace` in the ledger: looked at, never
trained on). Forward passes run in evaluation mode with the random state put back, so a traced run
has the bits of an untraced one, and the same run id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clbench.data.catalog import Catalog
from clbench.evaluation.metrics.overlap import counts_of, dice, pattern_pairs
from clbench.evaluation.metrics.stability_gap import FILE, TraceRow, read_trace, write_trace
from clbench.evaluation.scoring import bit_pairs
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.strategy.contract import Lesson


def trace_cases(catalog: Catalog, step: int) -> dict[tuple[str, str], int]:
    """(source, case) → step, of every validation case of the steps up to `step`, each once."""
    return {
        (catalog.source(number).name, case): number
        for number in range(step, 0, -1)
        for case in catalog.splits[number - 1].validation
    }


class Tracer:
    """Traces one step of a run.

    Args:
        lesson: the step; the first has no old structures and is not traced.
        every: updates between two measurements; 0 is off.
        folder: the run's own folder.
        catalog: opens the cases.
        served: the model as it would be examined now, ready to answer.
        scratch: the step starts with a new model, so there is no update 0 to compare with.
        past: events of this step from before it was interrupted: rows of later updates go.
        postprocess: as in the examination.
    """

    def __init__(
        self,
        lesson: Lesson,
        *,
        every: int,
        folder: Path,
        catalog: Catalog,
        served: Callable[[], VolumePredictor],
        scratch: bool = False,
        past: Iterable[dict[str, Any]] = (),
        postprocess: bool = False,
    ) -> None:
        self.lesson, self.catalog, self.served = lesson, catalog, served
        self.every = every if lesson.number > 1 else 0
        self.path, self.postprocess = folder / FILE, postprocess
        self.update = sum(e["event"] == "update" for e in past)
        self.rows: list[TraceRow] = []
        if not self.every:
            return
        self._homes = {
            s: catalog.source(catalog.benchmark.learned_at(s)).name for s in lesson.structures
        }
        if self.path.exists():
            place = (lesson.number, self.update)
            self.rows = [r for r in read_trace(self.path, ()) if (r.step, r.update) <= place]
        if self.update == 0 and not scratch:
            self._measure()

    def see(self, event: dict[str, Any]) -> None:
        """Count an update, and measure after every `every` of them."""
        if event["event"] == "update":
            self.update += 1
            if self.every and self.update % self.every == 0:
                self._measure()

    def end(self) -> None:
        """Measure what the step ends with, if its last update was not."""
        if self.every:
            self._measure()

    def _measure(self) -> None:
        """Write the rows of this moment; a second look at the same moment replaces the first."""
        number = self.lesson.number
        self.rows = [r for r in self.rows if (r.step, r.update) != (number, self.update)]
        server = self.served()
        for (source, case), step in trace_cases(self.catalog, number).items():
            volume = self.catalog.open(step, case, "trace")
            # a structure is looked at where it was taught: its Dice on two sources never mix
            names = [s for s in self.lesson.structures if self._homes[s] == source]
            places = bit_pairs(server.structures, volume, names)
            bits = server.predict(volume, postprocess=self.postprocess)
            for name, counts in counts_of(pattern_pairs(bits, volume.bits), places).items():
                self.rows.append(
                    TraceRow(
                        step=number,
                        update=self.update,
                        eval_set=source,
                        case=case,
                        structure=name,
                        learned_at=self.catalog.benchmark.learned_at(name),
                        value=dice(counts),
                        status=counts.status,
                    )
                )
        write_trace(self.path, self.rows)
