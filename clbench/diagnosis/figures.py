"""The figures of an explained run, written as PDF (vectors) and PNG."""

from __future__ import annotations

from pathlib import Path

from clbench.diagnosis.explain import Explained
from clbench.diagnosis.strip_cases import strip_cases
from clbench.evaluation.explained import FIGURES, summarize, summarize_head_body
from clbench.report.figures import style
from clbench.report.figures.lost_dice import before_after_strip, lost_dice_figure
from clbench.store import files


def write_figures(explained: Explained, out: Path | None = None) -> list[Path]:
    """Draw where the lost Dice went by the last step, and cases before and after it.

    Args:
        explained: a run in which an old structure has a test case.
        out: folder to write to; None: `explain/` in the run.

    Returns:
        The files.

    Raises:
        StoreError: the folder cannot be written.
    """
    record = explained.record
    order = record.course.structures.index
    step = record.steps_done
    lost = [one for one in summarize(explained.rows, record.course.patient_of) if one.step == step]
    parts = summarize_head_body(explained.model_rows, record.course.patient_of)
    lost.sort(key=lambda one: order(one.structure))
    structures = [one.structure for one in lost]
    cases = strip_cases(explained.catalog, explained.predictions.of, explained.rows, step)
    folder = explained.folder / FIGURES if out is None else out
    files.make_folder(folder)
    written = []
    with style.look():
        figures = {
            "lost_dice": lost_dice_figure(record, lost, [p for p in parts if p.step == step]),
            "before_after": before_after_strip(record, cases, structures, step),
        }
        for name, figure in figures.items():
            for kind in ("pdf", "png"):
                written.append(folder / f"{name}.{kind}")
                files.write_bytes(written[-1], style.to_bytes(figure, kind))
    return written
