"""Commands that write figures, reports and the paper's set."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from clbench.cli import options
from clbench.cli.options import RESULTS, app, course_name, one_of, refuse_beside
from clbench.errors import ClbenchError, unknown_name


@contextmanager
def rare_collections() -> Iterator[None]:
    """Search for unused cycles seldom: most of what a report makes lives until it is written.

    At Python's own thresholds the searches take a sixth of a report's time; 10 % more memory.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@app.command()
@rare_collections()
def figure(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Which one, or all; see `clbench figure list`.")],
    bench: options.Bench = "tumor_ext",
    results: options.Results = RESULTS,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("figures"),
    ref: Annotated[str, typer.Option(help="Reference strategy.")] = "universal",
    scoring: options.Scoring = "strict",
    external: Annotated[
        str, typer.Option(help="heatmap, forgetting: on this external test set or domain.")
    ] = "",
    step: Annotated[int | None, typer.Option(help="strip: after which step; default last.")] = None,
    data: Annotated[
        str | None, typer.Option(help="strip: where the images are; default as the runs say.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="strip: the runs' cache.")] = None,
) -> None:
    """Figures of a benchmark's runs, each as PDF (vectors) and PNG (300 dpi)."""
    from clbench.report.figures import ELSEWHERE, FIGURES, StripOptions, save
    from clbench.report.significance.analysis import Analysis

    if name == "list":
        refuse_beside(ctx, {*ctx.params} - {"name"}, "the list of figures", acts="a figure")
        for known, (_, caption) in FIGURES.items():
            typer.echo(f"  {known:<20} {caption}")
        return
    if name not in (*FIGURES, "all"):
        raise unknown_name("figure", name, FIGURES)
    if name not in ELSEWHERE:
        acts = f"the figure {' or '.join(ELSEWHERE)}"
        refuse_beside(ctx, ["external"], f"the figure {name}", acts=acts)
    if name not in ("strip", "all"):
        of_strip = ("step", "data", "cache")
        refuse_beside(ctx, of_strip, f"the figure {name}", acts="the figure strip")
    study = Analysis(
        results=results,
        bench=course_name(bench, results),
        reference=ref,
        scoring=scoring,
        on=external,
    )
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
@rare_collections()
def paper(
    plan: Annotated[Path, typer.Argument(help="TOML file that lists tables and figures.")],
    results: Annotated[
        Path | None, typer.Option(help="Folder of runs; default the plan's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("paper_figs/out"),
) -> None:
    """Every table and figure of a plan; what the runs cannot give is a hole with its reason."""
    from clbench.report.paper.build import build
    from clbench.store.run_folder import outside_runs

    outside_runs(out, "tables and figures of a paper are")
    for output in build(plan, out, results):
        if output.hole:
            typer.echo(f"{output.file}: HOLE, {output.hole}")
        else:
            typer.echo(f"{output.file}: {', '.join(str(p) for p in output.paths)}")


@app.command()
@rare_collections()
def report(
    bench: options.Bench,
    ref: Annotated[str, typer.Option(help="Strategy that all others are compared with.")],
    results: options.Results = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
    scoring: options.Scoring = "strict",
    margin: Annotated[
        float, typer.Option(help="Half-width of equivalent, Dice; declare it before looking.")
    ] = 0.02,
    alpha: Annotated[float, typer.Option(help="Level of every family of tests.")] = 0.05,
    correction: Annotated[
        str, typer.Option(help="Adjustment of p over a family: max-t or holm.")
    ] = "max-t",
) -> None:
    """Test a strategy against the others: verdicts, tables, figures, one page without network."""
    chosen = one_of("--correction", correction, {"max-t": "max-t", "holm": "holm"})
    from clbench.report.page.page import make_report
    from clbench.report.significance.analysis import Analysis
    from clbench.report.study import Protocol
    from clbench.store.run_folder import outside_runs

    outside_runs(out, "a report is")
    study = Analysis(
        results=results,
        bench=course_name(bench, results),
        reference=ref,
        scoring=scoring,
        protocol=Protocol(margin=margin, alpha=alpha, correction=chosen),
    )
    written = make_report(study, out)
    typer.echo("\n".join(written.lines))


@app.command()
@rare_collections()
def league(
    submissions: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Results folders or excerpts, one per submission."),
    ],
    bench: options.Bench = "tumor_ext",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("league"),
    scoring: options.Scoring = "strict",
    alpha: Annotated[float, typer.Option(help="Level of the family of all pairs.")] = 0.05,
    correction: Annotated[
        str, typer.Option(help="Adjustment of p over all pairs: max-t or holm.")
    ] = "max-t",
    data: options.Data = None,
    cache: options.Cache = None,
) -> None:
    """Compare many people's runs of one course, each verified first; status 1 if any is refused."""
    from clbench.store.run_folder import outside_runs

    outside_runs(out, "a league is")
    chosen = one_of("--correction", correction, {"max-t": "max-t", "holm": "holm"})
    from clbench.report.league import (
        Refusal,
        Submission,
        league_of,
        read_submission,
        write_league,
    )
    from clbench.report.study import Protocol
    from clbench.report.tables.render import render
    from clbench.spec import registry

    protocol = Protocol(alpha=alpha, correction=chosen)
    name = registry.name_of(bench)
    read: list[Submission | Refusal] = []
    for folder in submissions:
        try:
            read.append(read_submission(folder, name, data=data, cache=cache))
        except ClbenchError as err:
            read.append(Refusal(name=folder.name, error=err))
    whole = league_of(read, scoring=scoring, protocol=protocol)
    typer.echo(render(whole.table(), "terminal"))
    for refusal in whole.refused:
        typer.echo(f"REFUSED {refusal.name}: {refusal.error}", err=True)
    typer.echo(f"League: {write_league(whole, out)[0]}")
    if whole.refused:
        raise typer.Exit(1)
