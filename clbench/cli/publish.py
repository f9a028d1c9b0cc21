"""Commands that publish a trained model, read a published one, and show its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clbench.cli import options
from clbench.cli.options import RESULTS, app
from clbench.errors import SettingError


@app.command()
def export(
    run: options.RunFolder,
    to: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    step: options.Step = None,
) -> None:
    """Publish a run's model: safetensors, model card, MONAI metadata, record; no code in it."""
    from clbench.deployment.publish.card import FILL_IN
    from clbench.deployment.publish.export import export_run

    for name in export_run(run, to, step=step):
        typer.echo(to / name)
    typer.echo(f"README.md and metadata.json say {FILL_IN} where only you know; then publish.")


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What clbench export wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of results that gets the run.")] = RESULTS,
) -> None:
    """Read an exported model back into a run, equal to the bit; nothing in it is executed."""
    from clbench.deployment.publish.export import import_run

    typer.echo(import_run(folder, out))


@app.command()
def view(
    run: options.RunFolder,
    case: Annotated[str, typer.Argument(metavar="CASE", help="Test case: source/case, or its id.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default RUN_CASE.html in this folder.")
    ] = None,
    data: options.Data = None,
    cache: options.Cache = None,
) -> None:
    """Write a page to look at a test case: image, truth and the prediction after each step."""
    from clbench.deployment.view.case_page import write_case_page

    if out is None:
        out = Path(f"{run.resolve().name}_{case.replace('/', '_')}.html")
    elif out.is_dir() or not out.name:
        raise SettingError(
            "a case is written as one page",
            where="--out",
            expected="an HTML file",
            got=f"the folder {out}",
            next_step=f"--out {out / 'case.html'}",
        )
    page = write_case_page(run, case, out, data=data, cache=cache)
    for note in page.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{page.path} ({page.size_bytes / 1e6:.1f} MB, needs no network): open in a browser")


@app.command()
def track(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    to: Annotated[list[str], typer.Option(help="tensorboard, mlflow or wandb; repeat for more.")],
    out: Annotated[
        Path, typer.Option(help="Files of trackers go to _trackers/NAME in it.")
    ] = RESULTS,
) -> None:
    """Send runs that lie on disk to an experiment tracker; `clbench run --track` does it live."""
    from clbench.tracking.follow import send

    for folder in runs:
        send(folder, to, out)
        typer.echo(f"{folder}: sent to {', '.join(to)}")
