"""The command that chooses settings by validation cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.cli import options
from clbench.cli.options import RESULTS, app, one_of, parse_splits, show_all

if TYPE_CHECKING:
    from clbench.tuning.study import TuneSettings

SEED = 1000
"""Of trials and search where none is given: the first seeds stay fresh for runs."""


@app.command()
def tune(
    bench: options.Bench,
    strategy: Annotated[
        list[str], typer.Option(help="Strategy; repeat for more, each with the whole budget.")
    ],
    budget: Annotated[
        float, typer.Option(help="For each strategy: what all its trials together may take.")
    ],
    unit: Annotated[str, typer.Option(help="updates or seconds.")] = "updates",
    rule: Annotated[
        str,
        typer.Option(
            help="first_step: validation cases of the first two steps. transfer: of a whole "
            "course, for use on others. oracle: of the end of this course; unrealistic."
        ),
    ] = "first_step",
    search: Annotated[str, typer.Option(help="sobol, or optuna (extra `tune`).")] = "sobol",
    space: Annotated[
        list[str] | None,
        typer.Option(help="NAME=LOW..HIGH, with :log or :int, or NAME=a|b; adds or replaces."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the trials and of the search.")] = SEED,
    profile: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    data: options.Data = None,
    split: options.Splits = None,
    set_: options.Overrides = None,
    out: options.Out = RESULTS,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder of settings file and figures; default OUT/_tuning/BENCH/RULE."),
    ] = None,
    device: options.Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Loader processes. None: by device.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all.")] = None,
    cache: options.Cache = None,
) -> None:
    """Choose settings of strategies by validation cases, at an equal budget; never by test cases.

    The same command goes on with the trials that are missing, and a larger budget adds trials.
    """
    from clbench.cli.progress import Progress
    from clbench.run.plan import RunSettings
    from clbench.tuning.outcome import write_outcome
    from clbench.tuning.study import TuneSettings, output_folder
    from clbench.tuning.study import tune as run_trials
    from clbench.tuning.summary import tables

    settings = TuneSettings(
        strategies=tuple(strategy),
        base=RunSettings(
            bench=bench,
            strategy=strategy[0],
            seed=seed,
            profile=profile,
            data=data,
            splits=parse_splits(split or []),
            out=out,
            overrides=tuple(set_ or ()),
            device=device,
            workers=workers,
            threads=threads,
            cache=cache,
        ),
        rule=rule,
        budget=budget,
        unit=one_of("--unit", unit, {"updates": "updates", "seconds": "seconds"}),
        search=one_of("--search", search, {"sobol": "sobol", "optuna": "optuna"}),
        space=tuple(space or ()),
    )
    with Progress() as progress:

        def watch(event: dict[str, Any]) -> None:
            if event["event"] in ("trial", "tried"):
                typer.echo(_line(event))
            else:
                progress.watch(event)

        tuned = run_trials(settings, watch)
    file, *others = write_outcome(tuned, settings, to or output_folder(settings))
    show_all(tables(tuned, settings))
    for path in others:
        typer.echo(f"wrote {path}")
    typer.echo(f"Settings: {file}")
    typer.echo("Train the chosen settings anew, on fresh seeds:")
    for one in tuned:
        typer.echo(f"  {_command(settings, one.name, file, split or [])}")


def _line(event: dict[str, Any]) -> str:
    """What a trial begins with, or what became of it."""
    if event["event"] == "trial":
        what = " ".join(f"{k}={v}" for k, v in event["settings"].items()) or "the defaults"
        return f"{event['strategy']}, trial {event['number']}: {what}"
    trial = event["trial"]
    if trial.score is None:
        how = "failed" if trial.fault else "diverged"
        return f"{event['strategy']}, trial {trial.number}: training {how}: {trial.failure}"
    return f"{event['strategy']}, trial {trial.number}: validation Dice {trial.score:.3f}"


def _command(settings: TuneSettings, name: str, file: Path, split: list[str]) -> str:
    """The `clbench run` that trains what was chosen."""
    import shlex

    base = settings.base
    bench = base.bench if settings.rule != "transfer" else "ANOTHER_COURSE"
    words = ["clbench", "run", "--bench", bench, "--strategy", name, "--tuned", str(file)]
    words += ["--seeds", "0-2" if base.seed > 2 else "100-102"]
    words += ["--profile", base.profile] if base.profile else []
    if settings.rule != "transfer":
        words += ["--data", base.data] if base.data else []
        words += [word for value in split for word in ("--split", value)]
    words += [word for value in base.overrides for word in ("--set", value)]
    words += ["--out", str(base.out)] if base.out != RESULTS else []
    return shlex.join(words)
