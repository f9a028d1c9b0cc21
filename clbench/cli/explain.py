"""The commands that say why a run forgot, and how good its pseudo labels were."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clbench.cli import options
from clbench.cli.options import app, phantom_app, show, show_all


@app.command()
def explain(
    run: options.RunFolder,
    data: options.Data = None,
    cache: options.Cache = None,
    device: options.Device = "auto",
    voxels_only: Annotated[
        bool, typer.Option("--voxels-only", help="No heads, bodies and probes: no model is run.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the figures; default explain/ in the run.")
    ] = None,
) -> None:
    """Where the lost Dice of a run went: background, others, borders; and head or body."""
    from clbench.cli.progress import Progress
    from clbench.diagnosis.explain import explain_run
    from clbench.diagnosis.figures import write_figures
    from clbench.report.tables.lost_dice import lost_dice_tables

    with Progress() as progress:
        explained = explain_run(
            run,
            data=data,
            cache=cache,
            device=device,
            models=not voxels_only,
            watch=progress.watch,
        )
    show_all(lost_dice_tables(explained.record, explained.rows, explained.model_rows))
    for note in explained.notes:
        typer.echo(f"note: {note}")
    for path in write_figures(explained, out):
        typer.echo(f"Figure: {path}")
    typer.echo(f"Results: {explained.folder}")


@phantom_app.command("pseudo-labels")
def pseudo_labels(
    run: options.RunFolder,
    cache: options.Cache = None,
    device: options.Device = "auto",
    format_: options.Format = "terminal",
) -> None:
    """How good the pseudo labels of a run on the phantom were: Dice against the phantom's truth."""
    from clbench.cli.progress import Progress
    from clbench.diagnosis.pseudo_label_quality import pseudo_label_quality

    with Progress() as progress:
        watch = progress.watch if format_ == "terminal" else lambda event: None
        quality = pseudo_label_quality(run, cache=cache, device=device, watch=watch)
    show(quality.table(), format_)
