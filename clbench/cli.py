"""The command line: parse, call, print. Nothing else.

Room: row 6. Heavy imports happen inside the commands, so that `clbench list` and the printed tables
start without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ClbenchError, SettingError, StoreError, unknown_name
from clbench.stop import STATUS, Stopped

if TYPE_CHECKING:
    from clbench.report.render import Table
    from clbench.spec import Split
    from clbench.testing import Report

app = typer.Typer(
    name="clbench",
    help="Continual-learning benchmarks for 3-D medical segmentation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")
check_app = typer.Typer(
    help="Is a strategy or a benchmark honest? Rule by rule; status 1 where one fails.",
    no_args_is_help=True,
)
app.add_typer(check_app, name="check")

Bench = Annotated[str, typer.Option(help="Benchmark, or path of a TOML file.")]
RESULTS = Path("results")


def existing(results: Path) -> Path:
    """A results folder somebody named must be there; the default one may still be missing."""
    if results != RESULTS and not results.is_dir():
        raise StoreError(
            "there is no such folder of results",
            where=results,
            next_step="name the --out of `clbench run`, as seen from this folder",
        )
    return results


Results = Annotated[Path, typer.Option(help="Folder of results.", callback=existing)]


def parse_seeds(text: str) -> list[int]:
    """`0-2,5` → [0, 1, 2, 5]."""
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise SettingError(
                "seeds are whole numbers or ranges",
                where="--seeds",
                expected="0-2 or 0,1,2",
                got=text or "nothing",
            )
        if dash and int(high) < int(low):
            raise SettingError(
                "a range of seeds runs backwards",
                where="--seeds",
                expected=f"{high}-{low}",
                got=part.strip(),
            )
        found += range(int(low), int(high or low) + 1)
    return list(dict.fromkeys(found))


def parse_splits(words: list[str]) -> dict[str, Split]:
    """`btcv=FILE.toml` or `btcv=NAME` (a split that comes with clbench) → source → split."""
    from importlib import resources

    from clbench.coursefile import load_split

    found = {}
    for word in words:
        source, equals, target = word.partition("=")
        if not equals:
            raise SettingError("--split needs SOURCE=FILE", got=word)
        if target.endswith(".toml"):
            path = Path(target)
        else:
            home = resources.files("clbench.benchmarks.splits")
            shipped = [p.name[:-5] for p in home.iterdir() if p.name.endswith(".toml")]
            if target not in shipped:
                raise unknown_name("split", target, shipped, f"--split {word}")
            path = Path(str(home / f"{target}.toml"))
        if source in found:
            raise SettingError("two splits are given for one", where=f"--split {word}")
        found[source] = load_split(path)
    return found


@app.command()
def run(
    bench: Bench,
    strategy: Annotated[str, typer.Option(help="Strategy.")],
    seed: Annotated[int | None, typer.Option(help="One seed; default 0.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds: 0-2 or 0,1,2.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Default: quick on the phantom, paper on real data.")
    ] = None,
    scoring: Annotated[
        str, typer.Option(help="Which scores to print: strict, paper or both. Both are recorded.")
    ] = "strict",
    data: Annotated[
        str | None,
        typer.Option(help="btcv=PATH,lits=PATH or one folder. Default: the embedded phantom."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=FILE.toml or STEP=FILE.toml: your own cases."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = RESULTS,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="group.name=value, any number of times.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    workers: Annotated[int, typer.Option(help="Loader processes.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat a finished run.")] = False,
    keep_predictions: Annotated[str, typer.Option(help="test or none.")] = "test",
    cache: Annotated[
        Path | None, typer.Option(help="Where preprocessed volumes and the phantom are kept.")
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between savings within a step; 0: every update.")
    ] = 300.0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On CUDA: operators that repeat to the bit.")
    ] = False,
) -> None:
    """Run a strategy on a benchmark: train each step, examine, record, print the scores."""
    scorings = one_of(
        "--scoring",
        scoring,
        {"strict": ["strict"], "paper": ["paper"], "both": ["strict", "paper"]},
    )
    keep = one_of("--keep-predictions", keep_predictions, {"test": True, "none": False})
    if seed is not None and seeds is not None:
        raise SettingError(
            "--seed and --seeds are given both", expected="one of them", got=f"{seed} and {seeds}"
        )
    numbers = [seed or 0] if seeds is None else parse_seeds(seeds)
    splits = parse_splits(split or [])
    typer.echo(
        "Data: "
        + (
            data
            if data
            else f"the embedded PHANTOM, not patients (real data: --data {_folders(bench)})"
        )
    )
    from clbench.plan import RunSettings
    from clbench.report.progress import Progress
    from clbench.report.tables import run_report
    from clbench.run import run_course

    for number in numbers:
        with Progress() as progress:
            folder = run_course(
                RunSettings(
                    bench=bench,
                    strategy=strategy,
                    seed=number,
                    profile=profile,
                    data=data,
                    splits=splits,
                    out=out,
                    overrides=tuple(set_ or ()),
                    device=device,
                    workers=workers,
                    threads=threads,
                    fresh=fresh,
                    keep_predictions=keep,
                    cache=cache,
                    checkpoint_s=checkpoint_every,
                    deterministic=deterministic,
                ),
                progress.watch,
            )
        for which in scorings:
            for table in run_report(folder, scoring=which):
                show(table, "terminal")
        typer.echo(f"Results: {folder}")


def _folders(bench: str) -> str:
    """What `--data` names in a benchmark: `btcv=PATH,lits=PATH`."""
    from clbench import registry

    return ",".join(f"{s.name}=PATH" for s in registry.benchmark(bench).sources)


@app.command()
def score(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Folders of finished runs.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="nsd, nsd_sweep, nsd_1.5mm, hd95_mm, volume_error_ml, lesion, patient, "
            "patient_50vox; default nsd,hd95_mm,volume_error_ml,lesion,patient."
        ),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Instead of RUN: a folder of NIfTI masks of any tool.")
    ] = None,
    bench: Annotated[str | None, typer.Option(help="With --predictions: benchmark.")] = None,
    step: Annotated[int | None, typer.Option(help="With --predictions: 1-based step.")] = None,
    name: Annotated[str | None, typer.Option(help="With --predictions: the method.")] = None,
    seed: Annotated[int, typer.Option(help="With --predictions: its training run.")] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="JSON of label values (nnU-Net's dataset.json). Default: dataset.json in the "
            "folder, else the benchmark's values of each source."
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave holes for cases without prediction.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="With --predictions: whose phantom; as in clbench run.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="As in clbench run.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = RESULTS,
    cache: Annotated[Path | None, typer.Option(help="As in clbench run.")] = None,
) -> None:
    """More metrics for finished runs, or a run folder from predictions made by any tool."""
    from clbench.metrics.native import DEFAULT, parse_words
    from clbench.outside import OutsideSettings, score_predictions
    from clbench.report.progress import Progress
    from clbench.report.scored import score_report
    from clbench.score import score_run

    words = DEFAULT if metrics is None else parse_words(metrics)
    if bool(runs) == (predictions is not None):
        raise SettingError(
            "clbench score needs run folders, or --predictions",
            expected="clbench score RUN, or clbench score --bench B --step N --predictions DIR "
            "--name METHOD",
            got="both" if runs else "neither",
        )
    folders = []
    for folder in runs or ():
        with Progress() as progress:
            folders.append(
                score_run(folder, words=words, data=data, cache=cache, watch=progress.watch)
            )
    if predictions is not None:
        if bench is None or step is None or name is None:
            raise SettingError(
                "--predictions needs to know what they are",
                expected="--bench, --step and --name",
                got=", ".join(
                    f"--{k} {v}"
                    for k, v in {"bench": bench, "step": step, "name": name}.items()
                    if v is not None
                )
                or "none of them",
            )
        with Progress() as progress:
            folder, holes = score_predictions(
                OutsideSettings(
                    bench=bench,
                    step=step,
                    predictions=predictions,
                    name=name,
                    seed=seed,
                    words=words,
                    labels=labels,
                    profile=profile,
                    data=data,
                    splits=parse_splits(split or []),
                    out=out,
                    cache=cache,
                    allow_missing=allow_missing,
                ),
                progress.watch,
            )
        folders.append(folder)
        if holes:
            typer.echo(f"Holes, without prediction after step {step}: {', '.join(holes)}")
    for folder in folders:
        for made in score_report(folder):
            show(made, "terminal")
            typer.echo("")
        typer.echo(f"Results: {folder}")


@app.command("list")
def list_() -> None:
    """Benchmarks, strategies, backbones, encodings and profiles, one line each."""
    from clbench import registry
    from clbench.settings import load_profile, profile_names

    for title, kind in (
        ("Benchmarks", "benchmark"),
        ("Strategies", "strategy"),
        ("Backbones", "backbone"),
        ("Encodings", "encoding"),
    ):
        typer.echo(title)
        for name in registry.entries(kind):
            typer.echo(f"  {name:<17} {registry.summary(kind, name)}")
    typer.echo("Profiles")
    for name in profile_names():
        typer.echo(f"  {name:<17} {load_profile(name).summary}")


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
    from clbench import registry
    from clbench.report.render import FORMATS
    from clbench.report.scale import PERCENT, SHARE

    scale = PERCENT if percent else SHARE
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    one_of("--format", format_, dict.fromkeys(FORMATS))
    wanted = None if seeds is None else parse_seeds(seeds)
    bench = None if bench is None else registry.name_of(bench)

    def paper(which: int) -> Table:
        from clbench.report.paper_tables import BENCH, paper_table

        own = bench in (None, BENCH[which])
        source_ = source or ("both" if own else "measured")
        one_of("--source", source_, {"printed": 1, "measured": 1, "both": 1})
        return paper_table(
            which, source=source_, results=results, bench=bench, scoring=scoring, seeds=wanted,
            ref=ref, scale=scale,
        )  # fmt: skip

    own = bench or "tumor_ext"

    def six() -> Table:
        from clbench.report.detection_table import table6

        source_ = source or "both"
        one_of("--source", source_, {"printed": 1, "measured": 1, "both": 1})
        return table6(source=source_, results=results, bench=own)

    def summary() -> Table:
        from clbench.report import tables

        return tables.summary(results=results, bench=own, scoring=scoring, scale=scale)

    def learning() -> Table:
        from clbench.report.evidence import gather
        from clbench.report.learning import learning_table

        return learning_table(gather(results, bench=own, ref=ref, scoring=scoring), scale)

    def continual() -> Table:
        from clbench.report.continual_table import continual_table

        return continual_table(
            results=results, bench=own, scoring=scoring, metric=metric, scale=scale
        )

    def distances() -> Table:
        from clbench.report import detection_table

        return detection_table.distances(results=results, bench=own)

    def cost() -> Table:
        from clbench.report.costs import cost_table

        return cost_table(results=results, bench=own)

    def calibration() -> Table:
        from clbench.report.calibration import calibration_table

        return calibration_table()

    def fuzz() -> Table:
        from clbench.report.fuzz import fuzz_table

        return fuzz_table()

    def torture() -> Table:
        from clbench.report.torture import torture_table

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
    from clbench.report.render import FORMATS

    one_of("--format", format_, dict.fromkeys(FORMATS))
    if runs:
        from clbench.costfile import recount

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
    from clbench.metrics.course_cost import course_costs
    from clbench.report import cost_tables

    found = course_costs(
        bench=bench, strategy=strategy, profile=profile, overrides=set_ or (), target=structures
    )
    made = [cost_tables.step_table(found), cost_tables.growth_table(found)]
    if format_ != "csv":  # the figures are of the paper's setting, not of this method
        from clbench.metrics.printed_flops import printed_figures

        made.append(cost_tables.printed_table(printed_figures()))
    for each in made:
        show(each, format_)
        typer.echo("")


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
    from clbench import registry
    from clbench.report.figures import FIGURES, Study, save

    if name == "list":
        for known, (_, words) in FIGURES.items():
            typer.echo(f"  {known:<20} {words}")
        return
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    study = Study(
        results=results,
        bench=registry.name_of(bench),
        ref=ref,
        scoring=scoring,
        step=step,
        data=data,
        cache=cache,
    )
    failed: list[ClbenchError] = []
    for one in FIGURES if name == "all" else [name]:
        try:
            for path in save(one, study, out):
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
    from clbench.report.paper import build

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
    from clbench.report.page import make_report
    from clbench.report.significance import Protocol

    made = make_report(
        results,
        bench=bench,
        ref=ref,
        out=out,
        scoring=scoring,
        protocol=Protocol(margin=margin, alpha=alpha),
    )
    for line in made.lines:
        typer.echo(line)


@app.command()
def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    data: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    cache: Annotated[Path | None, typer.Option(help="As in clbench run.")] = None,
) -> None:
    """Check a run's files and compute its numbers again; status 1 at the first difference."""
    from clbench.verify import verify_run

    for folder in runs:
        for line in verify_run(folder, data=data, cache=cache).lines():
            typer.echo(line)


@app.command()
def excerpt(
    results: Annotated[Path, typer.Argument(help="Folder of results: the --out of runs.")],
    to: Annotated[Path, typer.Argument(help="Folder that gets them; runs it holds already stay.")],
) -> None:
    """Copy finished runs as record and tables alone, without weights: small enough to publish."""
    from clbench import excerpt as room

    for folder in room.excerpt(existing(results), to):
        typer.echo(folder)


@app.command()
def doctor(
    bench: Bench = "tumor_ext",
    data: Annotated[str | None, typer.Option(help="Data folders, as for `clbench run`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = RESULTS,
    cache: Annotated[Path | None, typer.Option(help="Cache folder.")] = None,
) -> None:
    """Look at Python, packages, devices, data, caches, runs, disk and plugins."""
    from clbench.doctor import examine, lines

    found = examine(bench=bench, data=data, results=out, cache=cache)
    for line in lines(found):
        typer.echo(line)
    if any(f.level == "STOP" for f in found):
        raise typer.Exit(1)


@app.command(hidden=True)
def readme(path: Path) -> None:
    """Write the blocks of a Markdown file anew that name the clbench command they come from."""
    from clbench.report.readme import rewrite

    path.write_text(rewrite(path.read_text(encoding="utf-8"), app), encoding="utf-8")


@data_app.command()
def check(
    path: Annotated[str, typer.Argument(help="A folder, or SOURCE=PATH,… as after --data.")],
    bench: Bench = "tumor_ext",
    layout: Annotated[
        str | None,
        typer.Option(help="Without a benchmark: list the label values or masks of a layout."),
    ] = None,
) -> None:
    """Read a data folder: per case what is there, what is annotated, and every problem."""
    from clbench import registry
    from clbench.data.check import check_data, check_layout, split_remarks

    if layout is not None:
        report = check_layout(Path(path).expanduser(), layout)
    else:
        course = registry.benchmark(bench)
        report = check_data(path, [course.reads(s.name) for s in course.sources])
        report.remarks += split_remarks(course, report)
    for line in report.lines():
        typer.echo(line)
    if report.problems:
        raise typer.Exit(1)


@check_app.command("strategy")
def check_strategy(
    name: Annotated[str, typer.Argument(help="Registered strategy.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="strategy.name=value, any number of times.")
    ] = None,
) -> None:
    """Try every rule of the contract on a strategy: a tiny course on the CPU, in seconds."""
    from clbench.settings import split_overrides
    from clbench.testing import check_strategy as check_it

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
    from clbench.testing import check_benchmark as check_it

    _tell(check_it(name))


def _tell(report: Report) -> None:
    for line in report.lines():
        typer.echo(line)
    if not report.ok:
        raise typer.Exit(1)


def one_of(option: str, value: str, choices: dict[str, Any]) -> Any:
    """The choice called `value`, or an error that lists them."""
    if value not in choices:
        raise SettingError("unknown value", where=option, expected=", ".join(choices), got=value)
    return choices[value]


def show(table: Table, format_: str) -> None:
    """Print a table."""
    from clbench.report.render import render

    typer.echo(render(table, format_))


def main() -> None:
    """Entry point: a `ClbenchError` is printed without traceback and ends with status 1.

    A run that was stopped by a signal and can go on ends with `clbench.stop.STATUS`.
    """
    try:
        app()
    except Stopped as err:
        typer.echo(f"clbench: {err}", err=True)
        sys.exit(STATUS)
    except ClbenchError as err:
        typer.echo(f"clbench: {err}", err=True)
        sys.exit(1)
