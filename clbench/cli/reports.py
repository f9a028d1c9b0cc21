"""Commands that write figures, reports, the paper's set, and the tables of READMEs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from clbench.cli.options import RESULTS, Bench, Results, app, one_of
from clbench.errors import ClbenchError


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="Which one, or all; see `clbench figure list`.")],
    bench: Bench = "tumor_ext",
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("figures"),
    ref: Annotated[str, typer.Option(help="Reference strategy.")] = "universal",
    scoring: Annotated[str, typer.Option(help="strict or paper.")] = "strict",
    step: Annotated[int | None, typer.Option(help="strip: after which step; default last.")] = None,
    data: Annotated[
        str | None, typer.Option(help="strip: where the images are; default as the runs say.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="strip: the runs' cache.")] = None,
) -> None:
    """Figures of a benchmark's runs, each as PDF (vectors) and PNG (300 dpi)."""
    from clbench.report.figures import FIGURES, StripOptions, save
    from clbench.report.significance.analysis import Analysis
    from clbench.spec import registry

    if name == "list":
        for known, (_, words) in FIGURES.items():
            typer.echo(f"  {known:<20} {words}")
        return
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    study = Analysis(results=results, bench=registry.name_of(bench), reference=ref, scoring=scoring)
    strip = StripOptions(step=step, data=data, cache=cache)
    failed: list[ClbenchError] = []
    for one in FIGURES if name == "all" else [name]:
        try:
            for path in save(one, study, out, strip):
                typer.echo(path)
        except ClbenchError as err:
            if name != "all":
                raise
            typer.echo(f"{one}: {err}", err=True)
            failed.append(err)
    if failed:
        raise typer.Exit(1)


@app.command()
def paper(
    plan: Annotated[Path, typer.Argument(help="TOML file that lists tables and figures.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder of runs; default the plan's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("paper_figs/out"),
) -> None:
    """Every table and figure of a plan; what the runs cannot give is a hole with its reason."""
    from clbench.report.paper.build import build

    for made in build(plan, out, results):
        if made.hole:
            typer.echo(f"{made.file}: HOLE, {made.hole}")
        else:
            typer.echo(f"{made.file}: {', '.join(str(p) for p in made.paths)}")


@app.command()
def report(
    bench: Bench,
    ref: Annotated[str, typer.Option(help="Strategy that all others are compared with.")],
    results: Results = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
    scoring: Annotated[str, typer.Option(help="strict or paper.")] = "strict",
    margin: Annotated[
        float, typer.Option(help="Half-width of equivalent, Dice; declare it before looking.")
    ] = 0.02,
    alpha: Annotated[float, typer.Option(help="Level of every family of tests.")] = 0.05,
) -> None:
    """Test a strategy against the others: verdicts, tables, figures, one page without network."""
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    from clbench.report.page.page import make_report
    from clbench.report.significance.analysis import Analysis
    from clbench.report.study import Protocol

    study = Analysis(
        results=results,
        bench=bench,
        reference=ref,
        scoring=scoring,
        protocol=Protocol(margin=margin, alpha=alpha),
    )
    made = make_report(study, out)
    for line in made.lines:
        typer.echo(line)


@app.command(hidden=True)
def readme(
    pages: Annotated[list[Path], typer.Argument(help="Markdown files.")],
) -> None:
    """Write the blocks of Markdown files anew that name the clbench command they come from."""
    for path in pages:
        path.write_text(rewrite(path.read_text(encoding="utf-8"), app), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Blocks of a Markdown file that name the command they come from, written anew by running it.
#
# A block reads `<!-- $ clbench table summary … -->`, the output, `<!-- end -->`. So no number in a
# README is typed by hand, and a test can tell a stale one. Where the command is `clbench figure`,
# the output is a link to the picture it has written.


_BLOCK = re.compile(r"(<!-- \$ clbench (?P<command>[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewrite(text: str, app: typer.Typer) -> str:
    """A Markdown text with every block's content replaced by what its command prints now.

    Commands run in the current folder, and their paths are relative to it.

    Raises:
        ClbenchError: a command fails; names it.
    """

    def fresh(block: re.Match[str]) -> str:
        arguments = shlex.split(block["command"])
        result = CliRunner().invoke(app, arguments)
        if result.exit_code != 0:
            raise ClbenchError(
                "a command of the README fails", where=block["command"], got=result.exception
            )
        output = result.stdout.strip()
        if arguments[0] == "figure":
            output = _picture(arguments[1], output.splitlines())
        return f"{block[1]}\n{output}\n\n{block[3]}"

    return _BLOCK.sub(fresh, text)


def _picture(name: str, paths: Sequence[str]) -> str:
    """Markdown that shows the PNG among the files of a figure, with what it shows in words."""
    from clbench.report.figures import FIGURES

    (png,) = [path for path in paths if path.endswith(".png")]
    return f"![{FIGURES[name][1]}]({png})"
