"""Commands that print tables: of runs, of the paper, of cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clbench.cli.options import RESULTS, Results, app, one_of, parse_seeds, show
from clbench.errors import SettingError

if TYPE_CHECKING:
    from clbench.report.tables.render import Table


@app.command()
def table(
    name: Annotated[
        str,
        typer.Argument(
            help="6, 10, 11 (the paper's), summary, learning, continual, distances, cost, "
            "calibration, fuzz or torture."
        ),
    ],
    source: Annotated[str | None, typer.Option(help="printed, measured or both.")] = None,
    bench: Annotated[
        str | None, typer.Option(help="Benchmark; default the table's own (summary: tumor_ext).")
    ] = None,
    results: Results = RESULTS,
    scoring: Annotated[str, typer.Option(help="strict or paper.")] = "strict",
    seeds: Annotated[
        str | None, typer.Option(help="Seeds every strategy must have, or its row is a hole.")
    ] = None,
    ref: Annotated[str, typer.Option(help="Reference of the verdicts.")] = "universal",
    metric: Annotated[str, typer.Option(help="continual: dice, nsd, …")] = "dice",
    percent: Annotated[
        bool, typer.Option("--percent", help="10, 11, summary, learning, continual: 81.7 for 0.817")
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", help="terminal, md, csv, tex or html.")
    ] = "terminal",
) -> None:
    """The paper's tables, printed and measured, side by side; and a summary of all runs."""
    from clbench.report.tables.render import FORMATS, PERCENT, SHARE
    from clbench.spec import registry

    scale = PERCENT if percent else SHARE
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    one_of("--format", format_, dict.fromkeys(FORMATS))
    wanted = None if seeds is None else parse_seeds(seeds)
    bench = None if bench is None else registry.name_of(bench)

    def paper(which: int) -> Table:
        from clbench.report.paper.table import BENCH, paper_table

        own = bench in (None, BENCH[which])
        source_ = source or ("both" if own else "measured")
        one_of("--source", source_, {"printed": 1, "measured": 1, "both": 1})
        return paper_table(
            which, source=source_, results=results, bench=bench, scoring=scoring, seeds=wanted,
            ref=ref, scale=scale,
        )  # fmt: skip

    own = bench or "tumor_ext"

    def six() -> Table:
        from clbench.report.paper.detection import table6

        source_ = source or "both"
        one_of("--source", source_, {"printed": 1, "measured": 1, "both": 1})
        return table6(source=source_, results=results, bench=own)

    def summary() -> Table:
        from clbench.report.tables import summary as summary_module

        return summary_module.summary(results=results, bench=own, scoring=scoring, scale=scale)

    def learning() -> Table:
        from clbench.report.evidence import gather
        from clbench.report.tables.continual import learning_table

        return learning_table(gather(results, bench=own, ref=ref, scoring=scoring), scale)

    def continual() -> Table:
        from clbench.report.tables.continual import continual_table

        return continual_table(
            results=results, bench=own, scoring=scoring, metric=metric, scale=scale
        )

    def distances() -> Table:
        from clbench.report.paper import detection

        return detection.distances(results=results, bench=own)

    def cost() -> Table:
        from clbench.report.tables.costs import cost_table

        return cost_table(results=results, bench=own)

    def calibration() -> Table:
        from clbench.report.page.calibration import calibration_table

        return calibration_table()

    def fuzz() -> Table:
        from clbench.report.page.calibration import fuzz_table

        return fuzz_table()

    def torture() -> Table:
        from clbench.report.page.calibration import torture_table

        return torture_table()

    make: Callable[[], Table] = one_of(
        "table",
        name,
        {
            "6": six,
            "10": lambda: paper(10),
            "11": lambda: paper(11),
            "summary": summary,
            "learning": learning,
            "continual": continual,
            "distances": distances,
            "cost": cost,
            "calibration": calibration,
            "fuzz": fuzz,
            "torture": torture,
        },
    )
    show(make(), format_)


@app.command()
def cost(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Finished runs: write their cost.csv anew. Without: count a method."),
    ] = None,
    bench: Annotated[str | None, typer.Option(help="Benchmark, or path of a TOML file.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Strategy.")] = None,
    profile: Annotated[str, typer.Option(help="As in clbench run; paper: the paper's.")] = "quick",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="group.name=value, any number of times.")
    ] = None,
    structures: Annotated[
        int, typer.Option(help="Carry the growth on to this many (143: Ji et al.).")
    ] = 143,
    format_: Annotated[
        str, typer.Option("--format", help="terminal, md, csv, tex or html.")
    ] = "terminal",
) -> None:
    """Parameters and operations of every step, without training; the paper's figures explained."""
    from clbench.report.tables.render import FORMATS

    one_of("--format", format_, dict.fromkeys(FORMATS))
    if runs:
        from clbench.run.cost_table import recount

        if bench or strategy:
            raise SettingError("clbench cost takes runs, or a benchmark and a strategy", got="both")
        for folder in runs:
            typer.echo(recount(folder))
        return
    if bench is None or strategy is None:
        raise SettingError(
            "clbench cost needs a benchmark and a strategy, or runs",
            expected="clbench cost --bench B --strategy S, or clbench cost RUN",
        )
    from clbench.evaluation.cost.course import course_costs
    from clbench.report.tables import costs

    found = course_costs(
        bench=bench, strategy=strategy, profile=profile, overrides=set_ or (), target=structures
    )
    made = [costs.step_table(found), costs.growth_table(found)]
    if format_ != "csv":  # the figures are of the paper's setting, not of this method
        from clbench.evaluation.cost.paper_figures import printed_figures

        made.append(costs.printed_table(printed_figures()))
    for each in made:
        show(each, format_)
        typer.echo("")
