"""Figures of a report: each a function from the runs to one picture, in vectors or pixels.

matplotlib is imported here and below, and nowhere else. `draw` makes the
bytes of one picture; equal runs give equal bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.errors import ClbenchError, StoreError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clbench.report.evidence import Evidence
    from clbench.report.significance.confirmatory import Comparison, Protocol
    from clbench.report.significance.exploratory import ClassTest
    from clbench.report.significance.ranking import SetRanking, Stable

FIGURES: Mapping[str, tuple[str, str]] = {
    "heatmap": ("heatmap", "score of every structure after every step, and its change"),
    "forgetting": ("curves", "old structures over the steps, with intervals over patients"),
    "forest": ("forest", "paired differences from the reference, structure by structure"),
    "critical-difference": ("ranks", "average ranks over patients, and who does not differ"),
    "patients": ("paired", "every patient: old structures at their own step and at the end"),
    "cost": ("cost", "operations against score, bubbles for parameters (the paper's Fig. 7)"),
    "plane": ("plane", "what is kept against what is learned"),
    "rank-stability": ("ranks", "how the ranking moves when patients and seeds are resampled"),
    "strip": ("strip", "CT, truth and each strategy: the median and the worst case (Fig. 6)"),
}
"""Name → (module, what it shows)."""
KINDS = ("pdf", "png", "svg")
"""What `draw` can make."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs a figure shows; everything is computed when first asked for."""

    results: Path
    """Folder of runs."""
    bench: str
    """Benchmark."""
    ref: str = "universal"
    """Reference strategy."""
    scoring: str = "strict"
    """`strict` or `paper`."""
    cache: Path | None = None
    """Where preprocessed volumes are kept; for the strip."""
    data: str | None = None
    """Real data of the runs as given to `clbench run`; for the strip. None: as the runs say."""
    step: int | None = None
    """After which step the strip looks; None: the last."""

    @cached_property
    def evidence(self) -> Evidence:
        """The runs as arrays."""
        from clbench.report.evidence import gather

        return gather(self.results, bench=self.bench, ref=self.ref, scoring=self.scoring)

    @cached_property
    def protocol(self) -> Protocol:
        """What was decided before looking."""
        from clbench.report.significance.confirmatory import Protocol

        return Protocol()

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The confirmatory tests."""
        from clbench.report.significance.confirmatory import confirm

        return confirm(self.evidence, self.protocol)

    @cached_property
    def classes(self) -> list[ClassTest]:
        """The tests of single structures."""
        from clbench.report.significance.exploratory import by_class

        return by_class(self.evidence, self.protocol)

    @cached_property
    def rankings(self) -> list[SetRanking]:
        """Rankings per eval set."""
        from clbench.report.significance.ranking import rankings

        return rankings(self.evidence, self.protocol)

    @cached_property
    def stable(self) -> Stable:
        """Ranking stability."""
        from clbench.report.significance.ranking import stable

        return stable(self.evidence, self.protocol)

    def need(self, condition: object, what: str, next_step: str) -> None:
        """Refuse a figure that cannot be drawn from these runs.

        Args:
            condition: what must be true or not empty.
            what: what is wrong if it is not, as a clause.
            next_step: what the reader can do about it.

        Raises:
            StoreError: the condition does not hold.
        """
        if not condition:
            raise StoreError(what, where=self.results / self.bench, next_step=next_step)


def draw(name: str, study: Study, kind: str = "svg") -> bytes:
    """One picture.

    Args:
        name: one of `FIGURES`.
        study: the runs.
        kind: `pdf`, `png` or `svg`.

    Raises:
        UnknownName: no such figure.
        StoreError: the runs cannot give it; says what is missing.
    """
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    from clbench.report.figures import style

    with style.look():
        return style.to_bytes(_maker(name)(study), kind)


def gallery(study: Study, kind: str = "svg") -> tuple[dict[str, bytes], dict[str, str]]:
    """Every picture these runs can give, and the reason for each they cannot.

    Returns:
        Name → picture, and name → reason in one line, both in the order of `FIGURES`.
    """
    pictures: dict[str, bytes] = {}
    absent: dict[str, str] = {}
    for name in FIGURES:
        try:
            pictures[name] = draw(name, study, kind)
        except ClbenchError as err:
            absent[name] = err.brief
    return pictures, absent


def _maker(name: str) -> Callable[[Study], Figure]:
    module = importlib.import_module(f"clbench.report.figures.{FIGURES[name][0]}")
    made: Callable[[Study], Figure] = getattr(module, name.replace("-", "_"))
    return made


def save(name: str, study: Study, out: Path) -> list[Path]:
    """Write one picture as PDF and PNG, whole or not at all; return the files.

    Args:
        name: one of `FIGURES`.
        study: the runs to draw.
        out: folder for `NAME.pdf` and `NAME.png`.

    Raises:
        UnknownName: no such figure.
        StoreError: the runs cannot give it, or the folder cannot be written.
    """
    from clbench.store import files

    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    from clbench.report.figures import style

    with style.look():
        figure = _maker(name)(study)
        content = {kind: style.to_bytes(figure, kind) for kind in ("pdf", "png")}
    files.make_folder(out)
    written = []
    for kind, data in content.items():
        path = out / f"{study.bench}_{name}.{kind}"
        files.write_bytes(path, data)
        written.append(path)
    return written
