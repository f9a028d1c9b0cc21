"""What a tuning leaves on disk: settings file, best so far, sensitivities, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clbench.tuning.figures import write_figures
from clbench.tuning.study import TunedStrategy, TuneSettings
from clbench.tuning.summary import write_csv
from clbench.tuning.tuned_file import write_tuned

FILE = "tuned.toml"
"""Name of the settings file."""


def write_outcome(
    tuned: Sequence[TunedStrategy], settings: TuneSettings, folder: Path
) -> list[Path]:
    """Write what a tuning leaves: settings file, `curve.csv`, `sensitivity.csv` and the figures.

    Args:
        tuned: the strategies.
        settings: how they were tuned.
        folder: where to; files of the same names are replaced.

    Returns:
        The files, the settings file first.

    Raises:
        StoreError: the folder cannot be written.
        SettingError: no trial of a strategy has a score.
    """
    file = folder / FILE
    write_tuned(file, tuned, settings)
    return [file, *write_csv(tuned, folder), *write_figures(tuned, settings, folder)]
