"""Figures of a report: each a function from the runs to one picture, in vectors or pixels.

matplotlib is imported here and below, and nowhere else. `draw` makes the
bytes of one picture; equal runs give equal bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.errors import ClbenchError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clbench.report.significance.analysis import Analysis

FIGURES: Mapping[str, tuple[str, str]] = {
    "heatmap": ("heatmap", "score of every structure after every step, and its change"),
    "forgetting": ("curves", "old structures over the steps, with intervals over patients"),
    "forest": ("forest", "paired differences from the reference, structure by structure"),
    "critical-difference": ("ranks", "average ranks over patients, and who is not told apart"),
    "patients": ("paired", "every patient: old structures at their own step and at the end"),
    "cost": ("cost", "operations against score, bubbles for parameters (the paper's Fig. 7)"),
    "plane": ("plane", "what is kept against what is learned"),
    "rank-stability": ("ranks", "how the ranking moves when patients and seeds are resampled"),
    "external": ("ranks", "every strategy on the internal and on each external test set"),
    "strip": ("strip", "CT, truth and each strategy: the median and the worst case (Fig. 6)"),
}
"""Name → (module, what it shows)."""
ELSEWHERE = ("heatmap", "forgetting")
"""Figures that are drawn once more for every external test set and domain of a course."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StripOptions:
    """What the figure `strip` asks for beside the runs."""

    step: int | None = None
    """After which step it looks; None: the last."""
    data: str | None = None
    """Real data of the runs as given to `clbench run`; None: as the runs say."""
    cache: Path | None = None
    """Where preprocessed volumes are kept; None: as the runs say."""


def draw(name: str, study: Analysis, kind: str = "svg", strip: StripOptions | None = None) -> bytes:
    """One picture.

    Args:
        name: one of `FIGURES`.
        study: the runs.
        kind: `pdf`, `png` or `svg`.
        strip: of the figure `strip`.

    Raises:
        UnknownName: no such figure.
        StoreError: the runs cannot give it; says what is missing.
    """
    return draw_kinds(name, study, (kind,), strip)[kind]


def draw_kinds(
    name: str, study: Analysis, kinds: Sequence[str], strip: StripOptions | None = None
) -> dict[str, bytes]:
    """One picture in several formats, drawn once.

    Args:
        name: one of `FIGURES`.
        study: the runs.
        kinds: `pdf`, `png` or `svg`.
        strip: of the figure `strip`.

    Raises:
        UnknownName: no such figure.
        StoreError: the runs cannot give it; says what is missing.
    """
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    from clbench.report.figures import style

    with style.look():
        figure = _figure(name, study, strip)
        return {kind: style.to_bytes(figure, kind) for kind in kinds}


def _figure(name: str, study: Analysis, strip: StripOptions | None) -> Figure:
    module = importlib.import_module(f"clbench.report.figures.{FIGURES[name][0]}")
    make: Callable[..., Figure] = getattr(module, name.replace("-", "_"))
    return make(study, strip or StripOptions()) if name == "strip" else make(study)


def gallery(study: Analysis, kind: str = "svg") -> tuple[dict[str, bytes], dict[str, str]]:
    """Every picture these runs can give, and the reason for each they cannot.

    One figure that fails, for whatever reason, does not take the others down.

    Returns:
        Name → picture, and name → reason in one line, both in the order of `due`.
    """
    pictures: dict[str, bytes] = {}
    absent: dict[str, str] = {}
    for key, name, of in due(study):
        try:
            pictures[key] = draw(name, of, kind)
        except ClbenchError as err:
            absent[key] = err.brief
        except Exception as err:  # a fault of ours: the page says so, and is written
            absent[key] = f"{type(err).__name__}: {err}"
    return pictures, absent


def due(study: Analysis) -> Iterator[tuple[str, str, Analysis]]:
    """The figures of a gallery: its name there, one of `FIGURES`, and what it is drawn of.

    Those of `ELSEWHERE` come once more per external test set and domain, where it shows anything.
    """
    for name in FIGURES:
        if name != "external" or study.dice.external:
            yield name, name, study
    for on, other in study.elsewhere.items():
        taught = other.dice.learned_at.values()
        for name in ELSEWHERE:
            if name in FIGURES and taught and (name == "heatmap" or min(taught) < other.dice.last):
                yield f"{name}-{on}", name, other


def save(name: str, study: Analysis, out: Path, strip: StripOptions | None = None) -> list[Path]:
    """Write one picture as PDF and PNG, whole or not at all; return the files.

    Args:
        name: one of `FIGURES`.
        study: the runs.
        out: folder to write to.
        strip: of the figure `strip`.

    Raises:
        UnknownName: no such figure.
        StoreError: the runs cannot give it, or the folder cannot be written.
    """
    from clbench.store import files

    content = draw_kinds(name, study, ("pdf", "png"), strip)
    files.make_folder(out)
    written = []
    for kind, data in content.items():
        path = out / f"{study.bench}_{name}{f'-{study.on}' if study.on else ''}.{kind}"
        files.write_bytes(path, data)
        written.append(path)
    return written
