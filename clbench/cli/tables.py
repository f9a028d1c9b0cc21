"""Commands that print tables: of runs, of the paper, of cost."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.cli.options import RESULTS, Results, app, one_of, parse_seeds, show
from clbench.errors import SettingError

if TYPE_CHECKING:
    from clbench.report.significance.analysis import Analysis
    from clbench.report.tables.render import Scale, Table

DEFAULTS: Mapping[str, Any] = {
    "source": None,
    "scoring": "strict",
    "seeds": None,
    "ref": "universal",
    "metric": "dice",
    "percent": False,
}
"""Options that some tables take, and what they are where they are not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a table is made from."""

    study: Analysis
    """The runs."""
    source: str
    """`printed`, `measured` or `both`."""
    seeds: Sequence[int] | None
    """Those every strategy must have."""
    metric: str
    """Of the table `continual`."""
    scale: Scale
    """How the numbers are written."""


def _in(module: str, function: str) -> Callable[..., Table]:
    """A function of `clbench.report`, imported when its table is asked for."""
    made: Callable[..., Table] = getattr(import_module(f"clbench.report.{module}"), function)
    return made


def _paper(which: int) -> Callable[[Asked], Table]:
    return lambda a: _in("paper.table", "paper_table")(
        which, a.study, source=a.source, seeds=a.seeds, scale=a.scale
    )


PAPER = "source scoring seeds ref percent"
TABLES: dict[str, tuple[str, Callable[[Asked], Table]]] = {
    "6": ("source", lambda a: _in("paper.detection", "table6")(a.study, source=a.source)),
    "10": (PAPER, _paper(10)),
    "11": (PAPER, _paper(11)),
    "summary": ("scoring percent", lambda a: _in("tables.summary", "summary")(a.study, a.scale)),
    "learning": (
        "scoring ref percent",
        lambda a: _in("tables.continual", "learning_table")(a.study, a.scale),
    ),
    "continual": (
        "scoring metric percent",
        lambda a: _in("tables.continual", "continual_table")(
            a.study, metric=a.metric, scale=a.scale
        ),
    ),
    "distances": ("", lambda a: _in("paper.detection", "distances")(a.study)),
    "cost": ("", lambda a: _in("tables.costs", "cost_table")(a.study)),
    "calibration": ("", lambda a: _in("page.calibration", "calibration_table")()),
}
"""Name → (options of `DEFAULTS` it takes, how it is made)."""
OWN_BENCH = {"11": "body_ext"}
"""Table → its benchmark, where that is not tumor_ext."""


@app.command()
def table(
    name: Annotated[
        str,
        typer.Argument(
            help="6, 10, 11 (the paper's), summary, learning, continual, distances, cost "
            "or calibration."
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
    from clbench.report.significance.analysis import Analysis
    from clbench.report.tables.render import FORMATS, PERCENT, SHARE
    from clbench.spec import registry

    takes, make = one_of("table", name, TABLES)
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    one_of("--format", format_, dict.fromkeys(FORMATS))
    given = {
        "source": source,
        "scoring": scoring,
        "seeds": seeds,
        "ref": ref,
        "metric": metric,
        "percent": percent,
    }
    for option, value in given.items():
        if value != DEFAULTS[option] and option not in takes.split():
            raise SettingError(
                f"the table {name} does not take --{option}",
                where=f"`clbench table {shlex.quote(name)}`",
                expected=", ".join(f"--{o}" for o in takes.split()) or "none of these options",
                got=value,
                next_step=f"leave --{option} out",
            )
    own = OWN_BENCH.get(name, "tumor_ext")
    bench = own if bench is None else registry.name_of(bench)
    source = source or ("both" if bench == own or name == "6" else "measured")
    one_of("--source", source, {"printed": 1, "measured": 1, "both": 1})
    study = Analysis(results=results, bench=bench, reference=ref, scoring=scoring)
    asked = Asked(
        study=study,
        source=source,
        seeds=None if seeds is None else parse_seeds(seeds),
        metric=metric,
        scale=PERCENT if percent else SHARE,
    )
    show(make(asked), format_)


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
            raise SettingError(
                "`clbench cost` takes runs, or a benchmark and a strategy", got="both"
            )
        for folder in runs:
            typer.echo(recount(folder))
        return
    if bench is None or strategy is None:
        raise SettingError(
            "`clbench cost` needs a benchmark and a strategy, or runs",
            expected="`clbench cost --bench BENCH --strategy STRATEGY`, or `clbench cost RUN`",
        )
    from clbench.report.tables import costs
    from clbench.run.cost_table import count_course
    from clbench.run.plan import RunSettings, resolve

    asked = RunSettings(
        bench=bench, strategy=strategy, profile=profile, overrides=tuple(set_ or ()), device="cpu"
    )
    found = count_course(resolve(asked), target=structures)
    made = [costs.step_table(found), costs.growth_table(found)]
    if format_ != "csv":  # the figures are of the paper's setting, not of this method
        from clbench.evaluation.cost.paper_figures import printed_figures

        made.append(costs.printed_table(printed_figures()))
    for each in made:
        show(each, format_)
        typer.echo("")
