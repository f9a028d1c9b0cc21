"""Commands that check: runs, data, this machine, strategies and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clbench import signals
from clbench.cli import options
from clbench.cli.options import (
    RESULTS,
    app,
    check_app,
    data_app,
    existing,
    parse_expect_hu,
    parse_splits,
    refuse_beside,
)
from clbench.errors import SettingError

if TYPE_CHECKING:
    from clbench.testing.report import Report


@app.command()
def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    data: options.Data = None,
    cache: options.Cache = None,
) -> None:
    """Check a run's files and compute its numbers again; status 1 at the first difference."""
    from clbench.run.verify import verify_run

    for folder in runs:
        typer.echo("\n".join(verify_run(folder, data=data, cache=cache).lines()))


@app.command()
def excerpt(
    results: Annotated[Path, typer.Argument(help="Folder of results: the --out of runs.")],
    to: Annotated[Path, typer.Argument(help="Folder that gets them; runs it holds already stay.")],
) -> None:
    """Copy finished runs as record and tables alone, without weights: small enough to publish."""
    from clbench.store import publish as room

    for folder in room.excerpt(existing(results), to):
        typer.echo(folder)


@app.command()
def doctor(
    bench: options.Bench = "tumor_ext",
    data: Annotated[str | None, typer.Option(help="Data folders, as for `clbench run`.")] = None,
    split: options.Splits = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = RESULTS,
    cache: Annotated[Path | None, typer.Option(help="Cache folder.")] = None,
) -> None:
    """Look at Python, packages, devices, data, caches, runs, disk and plugins."""
    from clbench.cli.doctor import examine, lines

    findings = examine(bench=bench, data=data, results=out, cache=cache, splits=split or [])
    typer.echo("\n".join(lines(findings)))
    if any(f.level == "STOP" for f in findings):
        raise typer.Exit(1)


@data_app.command()
def check(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(help="A folder, or SOURCE=PATH,… as after --data.")],
    bench: options.Bench = "tumor_ext",
    layout: Annotated[
        str | None,
        typer.Option(help="In place of --bench: list the label values or masks of a layout."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=FILE.toml or STEP=FILE.toml, as in clbench run."),
    ] = None,
    set_: options.ExpectHu = None,
) -> None:
    """Read a data folder: per case what is there, what is annotated, and every problem.

    Status 1 where `clbench run` would refuse the data, or the split of a step.
    """
    from clbench.data.check import check_course, check_data, check_layout
    from clbench.spec import registry

    if layout is not None:
        acts = "a benchmark, without --layout"
        refuse_beside(ctx, ("bench", "split", "set_"), f"--layout {layout}", acts=acts)
        report = check_layout(Path(path).expanduser(), layout)
    else:
        course = registry.benchmark(bench)
        report = check_data(path, [course.reads(s.name) for s in course.sources])
        check_course(
            course, report, parse_splits(split or []), expect_hu=parse_expect_hu(set_ or [])
        )
    typer.echo("\n".join(report.lines()))
    if report.problems:
        raise typer.Exit(1)


@data_app.command("prepare")
def prepare_(
    bench: options.Bench = "tumor_ext",
    data: options.Data = None,
    profile: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    split: options.Splits = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="As in clbench run; groups data and phantom act here."),
    ] = None,
    cache: options.Cache = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default: as cores and free memory allow."),
    ] = None,
) -> None:
    """Preprocess the cases of a course ahead of a run, in several processes.

    `clbench run` does so by itself where there is much to do.
    """
    from clbench.cli.progress import Progress
    from clbench.run.plan import RunSettings, resolve
    from clbench.run.prepare import prepare, processes, unprepared

    for word in set_ or ():
        if word.startswith("strategy."):
            raise SettingError(
                "no setting of a strategy reaches the volumes",
                where=f"--set {word}",
                expected="settings of data and phantom",
                next_step="leave it out: every strategy uses the same volumes",
            )
    plan = resolve(
        RunSettings(
            bench=bench,
            strategy="finetune",  # none of its settings reaches the volumes
            profile=profile,
            data=data,
            splits=parse_splits(split or []),
            overrides=tuple(set_ or ()),
            cache=cache,
            device="cpu",
        )
    )
    with signals.listening(), Progress() as progress:
        plan.jobs, plan.watch = jobs, progress.watch
        catalog = plan.catalog
        jobs = jobs or processes(unprepared(catalog), catalog.preprocessing)
        count = prepare(catalog, jobs, progress.watch)
    typer.echo(f"{count} cases prepared, {jobs} at a time; the others were ready")


@data_app.command("split")
def split_(
    path: Annotated[str, typer.Argument(help="A folder, or SOURCE=PATH, as after --data.")],
    out: Annotated[Path, typer.Option(help="Split file to write, FILE.toml.")],
    bench: Annotated[str | None, typer.Option(help="Benchmark whose source it is.")] = None,
    layout: Annotated[str | None, typer.Option(help="Instead of --bench: the layout.")] = None,
    train: Annotated[
        int | None, typer.Option(min=1, help="Patients; default: those that are left.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(min=0, help="Patients; default: one in ten.")
    ] = None,
    test: Annotated[int | None, typer.Option(min=1, help="Patients; default: one in five.")] = None,
    seed: Annotated[int, typer.Option(help="Changes the order of the patients.")] = 0,
    needs: Annotated[
        list[str] | None, typer.Option(help="A structure every case must hold; with --bench.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="A case id to leave out.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="With --needs: where what was read of labels is kept.")
    ] = None,
) -> None:
    """Draw a split from the cases at hand, patient by patient, and write it as a split file."""
    from clbench.data.checks.draw_split import DrawSettings, draw_split, write_split

    drawn = draw_split(
        DrawSettings(
            path=path,
            bench=bench,
            layout=layout,
            train=train,
            validation=validation,
            test=test,
            seed=seed,
            needs=tuple(needs or ()),
            without=tuple(without or ()),
            cache=cache,
        )
    )
    write_split(drawn.split, out)
    typer.echo("\n".join(drawn.lines(out)))


@check_app.command("strategy")
def check_strategy(
    name: Annotated[str, typer.Argument(help="Strategy by name, or MODULE:CLASS.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="strategy.name=value, any number of times.")
    ] = None,
) -> None:
    """Try every rule of the contract on a strategy: a tiny course on the CPU, in about a minute."""
    from clbench.spec.settings import split_overrides
    from clbench.testing.strategy_check import check_strategy as check_it

    groups = split_overrides(set_ or [])
    if others := sorted(set(groups) - {"strategy"}):
        raise SettingError(
            "a check takes hyperparameters of the strategy only",
            where="--set",
            expected="strategy.name=value",
            got=", ".join(others),
        )
    _tell(check_it(name, overrides=groups.get("strategy", {})))


@check_app.command("benchmark")
def check_benchmark(
    name: Annotated[str, typer.Argument(help="Registered benchmark, or path of a TOML file.")],
) -> None:
    """Try every rule on a benchmark, and two steps of it on the phantom where it can."""
    from clbench.testing.benchmark_check import check_benchmark as check_it

    _tell(check_it(name))


def _tell(report: Report) -> None:
    typer.echo("\n".join(report.lines()))
    if not report.ok:
        raise typer.Exit(1)
