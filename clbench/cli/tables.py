"""Commands that print tables: of runs, of the paper, of cost."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from clbench.cli import options
from clbench.cli.options import (
    RESULTS,
    app,
    course_name,
    existing,
    one_of,
    parse_seeds,
    refuse_beside,
    show,
    show_all,
    typed,
)
from clbench.errors import SettingError

OWN_BENCH = {
    "11": "body_ext",
    **dict.fromkeys(("bsp_II", "bsp_III", "bsp_IV", "bsp_V"), "public_ext"),
}
"""Table → its benchmark, where that is not tumor_ext."""


@app.command()
def table(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="6, 10, 11 (the paper's), bsp_II to bsp_V, summary, learning, continual, "
            "external, domains, orders, distances, cost, lost_dice or calibration."
        ),
    ],
    source: Annotated[str | None, typer.Option(help="printed, measured or both.")] = None,
    bench: Annotated[
        str | None, typer.Option(help="Benchmark; default the table's own (summary: tumor_ext).")
    ] = None,
    results: Annotated[
        Path,
        typer.Option(
            help="Folder of results; not looked at for calibration and printed numbers.",
            callback=existing,
        ),
    ] = RESULTS,
    scoring: options.Scoring = "strict",
    seeds: Annotated[
        str | None, typer.Option(help="Seeds every strategy must have, or its row is a hole.")
    ] = None,
    ref: Annotated[
        str, typer.Option(help="Reference of the verdicts; where it is named, it stands first.")
    ] = "universal",
    metric: Annotated[str, typer.Option(help="continual: dice, nsd, hd95_mm, …")] = "dice",
    percent: Annotated[
        bool,
        typer.Option(
            "--percent",
            help="10, 11, summary, learning, continual, external, domains, orders: 81.7 for 0.817",
        ),
    ] = False,
    external: Annotated[
        str, typer.Option(help="summary, learning, continual: on this external test set or domain.")
    ] = "",
    format_: options.Format = "terminal",
) -> None:
    """The paper's tables, printed and measured, side by side; and a summary of all runs."""
    from clbench.report.significance.analysis import Analysis
    from clbench.report.tables import TABLES, make_table
    from clbench.report.tables.render import PERCENT, SHARE

    takes = one_of("table", name, TABLES)[2].split()
    if name == "calibration":
        refuse_beside(ctx, ["bench"], "the table calibration", acts="a table of runs")
    given = {
        "source": source,
        "scoring": scoring,
        "seeds": seeds,
        "ref": ref,
        "metric": metric,
        "percent": percent,
        "external": external,
    }
    for option, value in given.items():
        if option not in takes and typed(ctx, [option]):
            raise SettingError(
                f"the table {name} does not take --{option}",
                where=f"`clbench table {shlex.quote(name)}`",
                expected=", ".join(f"--{o}" for o in takes) or "none of these options",
                got=value,
                next_step=f"leave --{option} out",
            )
    own = OWN_BENCH.get(name, "tumor_ext")
    bench = own if bench is None else course_name(bench, results)
    source = source or ("both" if bench == own or name == "6" else "measured")
    one_of("--source", source, {"printed": 1, "measured": 1, "both": 1})
    if source == "printed":
        of_runs = ["scoring", "seeds", "ref", *(["bench"] if name == "6" else [])]
        refuse_beside(ctx, of_runs, "--source printed", acts="--source measured or both")
    if "metric" in takes:
        _refuse_no_row(metric)
    study = Analysis(results=results, bench=bench, reference=ref, scoring=scoring, on=external)
    ref_is_typed = bool(typed(ctx, ["ref"]))
    if ref_is_typed and (scores := study.scores()) is not None:
        study.reference_first(scores)  # refuses one that has no run
    made = make_table(
        name,
        study,
        source=source,
        seeds=None if seeds is None else parse_seeds(seeds),
        metric=metric,
        scale=PERCENT if percent else SHARE,
        reference_first=ref_is_typed,
    )
    show(made, format_)


def _refuse_no_row(metric: str) -> None:
    """Refuse a metric that no row of `scores.csv` can have: the table would be holes alone.

    Raises:
        SettingError: it is none.
    """
    from clbench.evaluation.metrics.case import row_names, word_of

    if metric != "nsd" and metric not in (rows := row_names(word_of(metric), "liver_tumor")):
        raise SettingError(
            f"no row of scores.csv is called {metric!r}",
            where="--metric",
            expected=", ".join(rows),
            got=metric,
            next_step=f"--metric {rows[0]}",
        )


@app.command()
def cost(
    ctx: typer.Context,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Finished runs: write their cost.csv anew, without options. Or count a method."
        ),
    ] = None,
    bench: Annotated[str | None, typer.Option(help="Benchmark, or path of a TOML file.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Strategy.")] = None,
    profile: Annotated[str, typer.Option(help="As in clbench run; paper: the paper's.")] = "quick",
    set_: options.Overrides = None,
    structures: Annotated[
        int, typer.Option(help="Carry the growth on to this many (143: Ji et al.).")
    ] = 143,
    format_: options.Format = "terminal",
) -> None:
    """Parameters and operations of every step, without training; the paper's figures explained."""
    if runs:
        from clbench.run.cost_table import recount

        if bench or strategy:
            raise SettingError(
                "`clbench cost` takes runs, or a benchmark and a strategy",
                expected="`clbench cost RUN`, or `clbench cost --bench BENCH --strategy STRATEGY`",
                got="both",
                next_step="leave out the runs, whose cost.csv is written anew, or the options",
            )
        of_method = ("profile", "set_", "structures", "format_")
        refuse_beside(ctx, of_method, "a run, whose cost.csv is written", acts="a method to count")
        for folder in runs:
            typer.echo(recount(folder))
        return
    if bench is None or strategy is None:
        raise SettingError(
            "`clbench cost` needs a benchmark and a strategy, or runs",
            expected="`clbench cost --bench BENCH --strategy STRATEGY`, or `clbench cost RUN`",
        )
    from clbench.evaluation.cost.course import course_costs
    from clbench.report.tables import costs
    from clbench.run.plan import RunSettings, resolve

    asked = RunSettings(
        bench=bench, strategy=strategy, profile=profile, overrides=tuple(set_ or ()), device="cpu"
    )
    plan = resolve(asked)
    counted = course_costs(
        plan.benchmark, plan.strategy, plan.profile, name=plan.strategy_name, target=structures
    )
    tables = [costs.step_table(counted), costs.growth_table(counted)]
    if format_ != "csv":  # the figures are of the paper's setting, not of this method
        from clbench.evaluation.cost.paper_figures import printed_figures

        tables.append(costs.printed_table(printed_figures()))
    show_all(tables, format_)
