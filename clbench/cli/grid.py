"""Commands for many runs: work off a study, and see how far it is."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench import signals
from clbench.cli import options
from clbench.cli.options import (
    RESULTS,
    app,
    one_of,
    parse_seeds,
    parse_splits,
    refuse_beside,
    show,
)
from clbench.errors import SettingError, TrainingError

if TYPE_CHECKING:
    from clbench.grid.forecast import Forecast
    from clbench.grid.jobs import Job
    from clbench.grid.study_file import Cell, StudyFile
    from clbench.report.tables.render import Table
    from clbench.run.plan import Plan
    from clbench.spec.settings import TrainSettings

Study = Annotated[
    Path | None, typer.Argument(metavar="[STUDY.toml]", help="Courses, strategies, seeds, …")
]
Courses = Annotated[list[str] | None, typer.Option("--bench", help="Course; repeat for more.")]
Strategies = Annotated[
    list[str] | None, typer.Option("--strategy", help="Strategy; repeat for more.")
]
Seeds = Annotated[str | None, typer.Option(help="0-2 or 0,1,2.", show_default="0")]
Out = Annotated[Path | None, typer.Option(help="Where run folders go.", show_default=str(RESULTS))]
Profiles = Annotated[list[str] | None, typer.Option("--profile", help="As in clbench run.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="As in clbench run.")]
Data = Annotated[str | None, typer.Option(help="As in clbench run; of every course.")]
SLURM: dict[str, Any] = {"rich_help_panel": "On SLURM"}
SLURM_ALONE = ("minutes", "memory_gb", "partition", "account", "warning_s", "sbatch")
ACTS_ON = {
    "address": ("ray",),
    "gpus": ("slurm", "ray"),
    **dict.fromkeys(SLURM_ALONE, ("slurm",)),
    "device": ("local",),
}
"""Option of `clbench grid` → where it acts, for those that do not act everywhere."""
INSTEAD = {
    "gpus": "leave it out: a grid on this machine uses every GPU, --jobs N of them, or with "
    "--device cpu none",
    "device": "leave it out: with --gpus 1 runs compute on a GPU, without on the CPU",
}
"""Option → what to say in its place where it does not act."""


@app.command()
def grid(
    ctx: typer.Context,
    study: Study = None,
    bench: Courses = None,
    strategy: Strategies = None,
    seeds: Seeds = None,
    profile: Profiles = None,
    set_: Settings = None,
    data: Data = None,
    split: options.Splits = None,
    out: Out = None,
    cache: options.Cache = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time; default one per GPU, or as cores and memory or cluster allow.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each run; default 1, of a GPU's here its share of the cores.",
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="As in clbench run.")] = None,
    keep_predictions: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    checkpoint_every: Annotated[
        float | None, typer.Option(min=0, help="As in clbench run.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As in clbench run.")
    ] = False,
    track: Annotated[list[str] | None, typer.Option(help="As in clbench run.")] = None,
    on: Annotated[str, typer.Option(help="local, slurm (submits jobs), or ray.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="--on ray: its head, or auto; default a cluster of this machine alone."),
    ] = None,
    minutes: Annotated[int, typer.Option(min=1, help="Time limit of a job.", **SLURM)] = 1440,
    memory_gb: Annotated[int, typer.Option(min=1, help="Memory of a job.", **SLURM)] = 16,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs of a job: 0 or 1 (ray, too).", **SLURM)
    ] = 0,
    partition: Annotated[str | None, typer.Option(help="Default the cluster's.", **SLURM)] = None,
    account: Annotated[str | None, typer.Option(help="Default the user's.", **SLURM)] = None,
    warning_s: Annotated[
        int, typer.Option(min=1, help="Seconds before its end that a job is told to save.", **SLURM)
    ] = 120,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Further options of sbatch: qos=long.", **SLURM)
    ] = None,
    device: Annotated[str, typer.Option(help="auto or cpu; --on local alone.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what is done and what is left; start nothing.")
    ] = False,
) -> None:
    """Make every run of a study that is not finished; the same command goes on."""
    from clbench import reproducibility
    from clbench.grid import ray_cluster, slurm

    here = one_of("--device", device, {"auto": reproducibility.gpus(), "cpu": 0})
    _refuse_unknown(track, keep_predictions)
    one_of("--on", on, dict.fromkeys(("local", "slurm", "ray")))
    _refuse_elsewhere(ctx, on)
    cluster: slurm.Cluster | ray_cluster.RayCluster | None = None
    if on == "slurm":
        cluster = slurm.Cluster(
            minutes=minutes,
            threads=threads or 1,
            memory_gb=memory_gb,
            gpus=gpus,
            partition=partition,
            account=account,
            warning_s=warning_s,
            at_once=jobs,
            more=_sbatch(sbatch or ()),
        )
    elif on == "ray":
        cluster = ray_cluster.RayCluster(
            address=address, threads=threads or 1, gpus=gpus, at_once=jobs
        )
    planned = _plan(
        _study(study, bench, strategy, seeds, profile, set_, data, split, out),
        cache,
        on_gpu=bool(here if cluster is None else gpus),
    )
    show(_table(planned))
    if dry_run:
        return
    more = _words(
        {
            "--cache": _ray_cache(cache) if on == "ray" else cache,
            "--workers": workers,
            "--keep-predictions": keep_predictions,
            "--checkpoint-every": checkpoint_every,
            "--deterministic": deterministic,
            "--track": track,
        }
    )
    if isinstance(cluster, slurm.Cluster):
        submitted = slurm.submit(planned, cluster, more=more)
        told = "`clbench status` of the same study shows how far they are"
        typer.echo(f"{len(submitted)} jobs submitted; {told}")
        return
    mine = _left_by_slurm(planned)
    if cluster is not None:
        failed = ray_cluster.work_off(
            mine, cluster, more=more, watch=lambda event: _say(event, planned)
        )
    else:
        failed = _work_off_here(mine, jobs, threads, gpus=here, more=more)
    show(_table(planned))
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(planned)} runs failed",
            where="; ".join(job.cell.name for job in failed),
            got="\n".join(_failure(job) for job in failed),
            next_step="mend the cause and run the same command again: it goes on with these alone",
        )
    _leave_unfinished(planned)


def _leave_unfinished(planned: list[Job]) -> None:
    """End with `clbench.signals.STATUS` where another process, or a cluster, still makes runs.

    Raises:
        Exit: some runs are not finished.
    """
    left = [job for job in planned if not job.is_finished()]
    if not left:
        return
    said = TrainingError(
        f"{len(left)} runs are not finished",
        where="; ".join(job.cell.name for job in left),
        expected=f"{len(planned)} finished runs",
        got="they were left to another process, or to their job on the cluster",
        next_step="`clbench status` of the same study shows how far they are; when they have "
        "ended, run the same command again: it goes on with those that are left",
    )
    typer.echo(f"clbench: {said}", err=True)
    raise typer.Exit(signals.STATUS)


def _refuse_unknown(track: Iterable[str] | None, keep_predictions: str | None) -> None:
    """Refuse what every run would refuse.

    Raises:
        UnknownName: there is no such tracker.
        SettingError: predictions cannot be kept so.
    """
    from clbench.spec import registry

    for name in track or ():
        registry.load("tracker", name)
    if keep_predictions is not None:
        one_of("--keep-predictions", keep_predictions, {"test": True, "none": False})


def _words(options: Mapping[str, Any]) -> list[str]:
    """Words of `clbench run` for every run.

    Args:
        options: option → its value, or values; None and False: it was not typed.
    """
    words: list[str] = []
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [option, str(one)]
    return words


def _ray_cache(cache: Path | None) -> Path:
    """Where all workers keep volumes: they have the environment of `ray start`, and not this one.

    Args:
        cache: as typed; None: CLBENCH_CACHE, or the user's cache folder.
    """
    from clbench.data.cache import default_root

    return default_root().absolute() if cache is None else cache


def _left_by_slurm(planned: list[Job]) -> list[Job]:
    """Runs that are not queued on a cluster: a second process would only stand in their way."""
    from clbench.grid import slurm

    queued = slurm.queued(planned)
    if queued:
        typer.echo(f"{len(queued)} runs have a job on the cluster and are left to it (`scancel`)")
    return [job for job in planned if job not in queued]


def _refuse_elsewhere(ctx: typer.Context, on: str) -> None:
    """Refuse options that act in another place than where the runs are to be made."""
    for option, places in ACTS_ON.items():
        if on not in places:
            acts = " or ".join(f"--on {place}" for place in places)
            todo = INSTEAD.get(option, f"add {acts}, or leave it out")
            refuse_beside(ctx, [option], f"--on {on}", acts=acts, next_step=todo)


def _work_off_here(
    planned: list[Job], jobs: int | None, threads: int | None, *, gpus: int, more: list[str]
) -> list[Job]:
    """Make the runs on this machine; return those that failed.

    Args:
        planned: of the study.
        jobs: at a time; None: one per GPU, or as cores and free memory allow.
        threads: of each; None: see `clbench.grid.local.slots`.
        gpus: of this machine.
        more: further words of `clbench run` for each.
    """
    from clbench import reproducibility
    from clbench.grid import forks
    from clbench.grid.local import as_program, slots, work_off

    places = slots(jobs, threads, gpus=gpus, cpus=reproducibility.cores())
    left = sum(not job.is_finished() for job in planned)
    if jobs is None and not gpus:
        places = places[: _fitting(planned, min(left, len(places)))]
    if left:
        each = f"{places[0].threads} thread(s) each"
        typer.echo(f"{left} runs to make, {len(places)} at a time, {each}")
    forked = bool(left) and not gpus and forks.are_ready(places[0].environment)
    begin = forks.start if forked else as_program
    return work_off(
        planned, places, more=more, watch=lambda event: _say(event, planned), begin=begin
    )


def _fitting(planned: list[Job], wanted: int) -> int:
    """Runs at a time that the free memory holds, at least one; says so where fewer than wanted.

    Args:
        planned: of the study; those that measured their memory say what a run takes.
        wanted: runs at a time.
    """
    from clbench.grid.local import free_bytes, peak_bytes

    free, each = free_bytes(), peak_bytes(planned)
    fitting = max(1, free // each)
    if fitting < wanted:
        typer.echo(
            f"{fitting} at a time, as {_size(free)} of memory are free and a run may take "
            f"{_size(each)}; the cores would do for {wanted} (--jobs {wanted})"
        )
    return fitting


@app.command()
def status(
    study: Study = None,
    bench: Courses = None,
    strategy: Strategies = None,
    seeds: Seeds = None,
    profile: Profiles = None,
    set_: Settings = None,
    data: Data = None,
    split: options.Splits = None,
    out: Out = None,
    cache: options.Cache = None,
    every: Annotated[
        float | None, typer.Option(min=1, help="Look again after so many seconds, until Ctrl-C.")
    ] = None,
) -> None:
    """How far the runs of a study are, and how long the rest will take."""
    import time

    from rich.console import Console
    from rich.live import Live

    from clbench.report.tables.render import render

    planned = _plan(_study(study, bench, strategy, seeds, profile, set_, data, split, out), cache)
    if every is None:
        show(_table(planned))
        return
    from rich.text import Text

    console = Console()
    with (
        Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live
    ):
        while True:
            table = _table(planned)
            if live is None:  # a file or a pipe gets table after table
                show(table)
                sys.stdout.flush()
            else:
                live.update(Text(render(table, "terminal")), refresh=True)
            if all(job.is_finished() for job in planned):
                return
            time.sleep(every)


@app.command()
def plan(
    bench: options.Bench,
    strategy: Annotated[str, typer.Option(help="Strategy.")],
    profile: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    seeds: Annotated[str, typer.Option(help="0-2 or 0,1,2.")] = "0",
    data: Annotated[str | None, typer.Option(help="As in clbench run.")] = None,
    split: options.Splits = None,
    out: options.Out = RESULTS,
    set_: options.Overrides = None,
    cache: options.Cache = None,
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all.")] = None,
    alpha: Annotated[float, typer.Option(help="Level of the tests to come.")] = 0.05,
    comparisons: Annotated[int, typer.Option(min=1, help="Strategies to compare with.")] = 1,
) -> None:
    """Before running: time, memory, disk and the smallest difference, from a short trial here."""
    from clbench.cli.progress import Progress
    from clbench.grid.forecast import forecast
    from clbench.reproducibility import slow_bf16
    from clbench.run.plan import RunSettings, resolve

    settings = RunSettings(
        bench=bench, strategy=strategy, profile=profile, data=data,
        splits=parse_splits(split or []), out=out, overrides=tuple(set_ or ()), device=device,
        threads=threads, cache=cache,
    )  # fmt: skip
    if not 0 < alpha < 1:
        raise SettingError(
            "a level must lie between 0 and 1", where="--alpha", expected="such as 0.05", got=alpha
        )
    count = len(parse_seeds(seeds))
    planned = resolve(settings)
    if slow := slow_bf16(planned.profile.train.amp, planned.device):
        typer.echo(slow, err=True)
    with signals.listening(), Progress() as progress:  # looking at all cases may take long
        planned.watch = progress.watch
        catalog = planned.catalog
    patients = {
        (source.name, source.patient_of(case) if catalog.patients else case)
        for number, of in enumerate(catalog.splits, 1)
        for source in [catalog.source(number)]
        for case in of.test
    }
    try:
        ahead = forecast(planned)
    except signals.Stopped as err:
        typer.echo("clbench: stopped; nothing of a trial is kept", err=True)
        raise typer.Exit(130) from err
    show(_forecast_table(ahead, bench, strategy, count))
    typer.echo("\n".join(_smallest(len(patients), alpha, comparisons)))


def _forecast_table(ahead: Forecast, bench: str, strategy: str, seeds: int) -> Table:
    """Steps of a run, and what it needs."""
    from clbench.report.tables.render import Table

    stages = list(ahead.steps[0].seconds)
    rows = [
        (
            f"step {number}", str(step.cases), f"{step.updates:,}", str(step.tests),
            *(_hours(step.seconds[stage]) for stage in stages), _hours(step.total_s),
        )
        for number, step in enumerate(ahead.steps, 1)
    ]  # fmt: skip
    runs = f", {seeds} seeds one after the other {_hours(seeds * ahead.total_s)}" * (seeds > 1)
    notes = [
        f"one run: {_hours(ahead.total_s)}{runs}; on {ahead.device}",
        f"memory: {_memory(ahead)} at the trial's highest",
        (
            f"disk: {_size(ahead.cache_bytes)} of prepared volumes, shared by all runs; "
            f"{_size(ahead.run_bytes)} per finished run, {_size(ahead.running_bytes)} while it runs"
        ),
        f"measured in a trial of {ahead.trial_s:.0f} s on this device, as busy as it is now",
    ]
    if ahead.measured_s:
        mean = sum(ahead.measured_s) / len(ahead.measured_s)
        notes.append(
            f"{len(ahead.measured_s)} finished run(s) of these settings took {_hours(mean)}: the "
            f"forecast is {ahead.error:+.0%} of that"
        )
    if ahead.measured_bytes:
        size = _size(sum(ahead.measured_bytes) / len(ahead.measured_bytes))
        notes.append(f"they took {size} of memory: the trial is {ahead.memory_error:+.0%} of that")
    return Table(
        title=f"{bench}, {strategy}: what a run will take",
        columns=("", "cases", "updates", "test cases", *stages, "total"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _memory(ahead: Forecast) -> str:
    """What a run takes, of the machine and of a GPU if it computes there."""
    if ahead.device == "cpu":
        return _size(ahead.peak_bytes)
    return f"{_size(ahead.peak_bytes)} of the GPU and {_size(ahead.host_bytes)} of the machine"


def _smallest(patients: int, alpha: float, comparisons: int) -> list[str]:
    """The smallest difference these test patients can show, in words."""
    from clbench.grid.forecast import smallest_difference
    from clbench.statistics.verdicts import smallest_sample

    if patients < smallest_sample(alpha):
        return [
            (
                f"{patients} test patients can show nothing at alpha {alpha:g}: at least "
                f"{smallest_sample(alpha)} are needed"
            )
        ]
    times = smallest_difference(patients, alpha=alpha, comparisons=comparisons)
    example = ", ".join(f"{times * sd:.3f} at sd {sd:g}" for sd in (0.01, 0.02, 0.05))
    family = f", {comparisons} comparisons" * (comparisons > 1)
    return [
        (
            f"smallest difference (power 0.8, alpha {alpha:g}{family}): {times:.2f} times the "
            f"spread of {patients} test patients' differences, as {example} Dice"
        ),
        "from three seeds on a result can also hold beyond these training runs",
    ]


def _hours(seconds: float) -> str:
    """`12 s`, `4.3 min`, `17 h`, `4.3 d`."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length or (unit == "min" and seconds >= length):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    """`12.3 GB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _study(
    path: Path | None,
    bench: list[str] | None,
    strategy: list[str] | None,
    seeds: str | None,
    profile: list[str] | None,
    overrides: list[str] | None,
    data: str | None,
    split: list[str] | None,
    out: Path | None,
) -> StudyFile:
    """The study of a file, with the lists that options replace, or of options alone."""
    from clbench.grid.study_file import StudyFile, part_of, read_study

    if path is not None:
        given = {"--set": overrides, "--data": data, "--split": split}
        if both := [option for option, value in given.items() if value]:
            raise SettingError(
                f"{both[0]} beside a study file, which has settings, data and splits of its own",
                where=path,
                expected="--bench, --strategy, --seeds, --profile and --out, which replace what "
                "the file says",
                got=f"{both[0]} {given[both[0]]}",
                next_step="write it into the file, or leave the file out",
            )
        lists = {
            "courses": tuple(bench or ()),
            "strategies": tuple(strategy or ()),
            "seeds": tuple(parse_seeds(seeds)) if seeds is not None else (),
            "profiles": tuple(profile or ()),
            "out": "" if out is None else str(out),
        }
        whole = read_study(path)
        _refuse_without_data(whole, bench or (), path)
        return part_of(whole, {key: value for key, value in lists.items() if value})
    if not (bench and strategy):
        raise SettingError(
            "a study is a file, or --bench and --strategy",
            expected="`clbench grid STUDY.toml`, or "
            "`clbench grid --bench tumor_ext --strategy universal --strategy lwf --seeds 0-2`",
            got=" and ".join(o for o, of in (("--bench", bench), ("--strategy", strategy)) if of)
            or "neither",
        )
    courses = tuple(bench)
    return StudyFile(
        courses=courses,
        strategies=tuple(strategy),
        seeds=tuple(parse_seeds("0" if seeds is None else seeds)),
        profiles=tuple(profile or ()),
        settings={"": tuple(overrides)} if overrides else {},
        data=dict.fromkeys(courses, data) if data else {},
        splits=dict.fromkeys(courses, tuple(split)) if split else {},
        out=str(RESULTS if out is None else out),
    )


def _refuse_without_data(study: StudyFile, courses: Iterable[str], path: Path) -> None:
    """Refuse courses of which a file that names data says nothing: they would get the phantom.

    Args:
        study: what the file says.
        courses: as typed.
        path: of the file.

    Raises:
        SettingError: one of them is not in the file.
    """
    strange = [course for course in courses if course not in study.courses]
    if strange and (study.data or study.splits or study.tuned):
        raise SettingError(
            "--bench names a course of which the study's data, splits and tuned say nothing",
            where=path,
            expected=", ".join(study.courses),
            got=", ".join(strange),
            next_step="add the course to the file, or leave the file out",
        )


def _plan(study: StudyFile, cache: Path | None, *, on_gpu: bool | None = None) -> list[Job]:
    """The jobs of a study.

    Args:
        study: what to run.
        cache: of volumes; None: the default one.
        on_gpu: whether runs that are left will compute on a GPU, so that what they would refuse is
            refused here; None: none is to be made.

    Raises:
        ClbenchError: a run cannot be planned, or would refuse its settings at once.
    """
    from clbench.grid.jobs import plan_jobs
    from clbench.grid.study_file import cells, refuse_other_orders
    from clbench.run.plan import RunSettings, resolve

    refuse_other_orders(study)
    trains: dict[Path, TrainSettings] = {}
    profiles: dict[Path, Mapping[str, Any]] = {}

    from clbench.cli.progress import Progress

    def plan(cell: Cell) -> Plan:
        planned = open_plan(cell)
        trains[planned.folder] = planned.profile.train
        return planned

    def open_plan(cell: Cell) -> Plan:
        settings = RunSettings(
            bench=cell.bench,
            strategy=cell.strategy,
            seed=cell.seed,
            profile=cell.profile,
            data=cell.data,
            splits=parse_splits(list(cell.splits)),
            out=cell.out,
            overrides=cell.overrides,
            device="cpu",  # planning computes nothing
            cache=cache,
        )
        if cell.tuned is None:
            planned = resolve(settings)
            planned.watch = progress.watch
            profiles[planned.open().folder] = planned.identity.profile
            return planned
        from clbench.tuning.tuned_file import plan_tuned

        return plan_tuned(settings, Path(cell.tuned).expanduser())

    with signals.listening(), Progress() as progress:  # looking at all cases may take long
        jobs = plan_jobs(cells(study), plan)
    _note_questions(jobs, profiles)
    if on_gpu is not None:
        for train in (trains[job.folder] for job in jobs if not job.is_finished()):
            _refuse_settings(train, on_gpu=on_gpu)
    return jobs


def _note_questions(jobs: Iterable[Job], profiles: Mapping[Path, Mapping[str, Any]]) -> None:
    """Say where the runs of a course cannot stand in one table.

    Args:
        jobs: of the study.
        profiles: folder of a run → its settings; tuned runs are left out.
    """
    from clbench.store.record import question

    by_course: dict[tuple[Path, str], dict[str, str]] = {}
    for job in (job for job in jobs if job.folder in profiles):
        asked = json.dumps(question(profiles[job.folder]), sort_keys=True)
        name = f"{job.profile} {job.cell.settings}".strip()
        by_course.setdefault((job.cell.out, job.bench), {}).setdefault(asked, name)
    for (out, bench), names in by_course.items():
        if len(names) > 1:
            typer.echo(
                f"note: no table holds all runs of {bench}, as their settings ask different "
                f"questions ({', '.join(names.values())}): with a study file for each, whose `out` "
                f"is not {out}, every one has its tables"
            )


def _refuse_settings(train: TrainSettings, *, on_gpu: bool) -> None:
    """Refuse settings of which a run would say so when it starts.

    Raises:
        SettingError: they cannot be trained with, or not on such a device.
    """
    from clbench.reproducibility import refuse_fp16_on_cpu
    from clbench.run.plan import pick_device
    from clbench.training.ranks import Ranks
    from clbench.training.update import divide

    divide(train, Ranks())
    if not on_gpu:
        refuse_fp16_on_cpu(train.amp, pick_device("cpu"))


def _table(jobs: list[Job]) -> Table:
    """Runs by strategy and state, and how long the rest will take."""
    from clbench.grid.jobs import State, estimate, states
    from clbench.grid.slurm import with_queue
    from clbench.report.tables.render import Table

    now = with_queue(jobs, states(jobs))
    rows: dict[tuple[str, ...], Counter[State]] = {}
    for job, state in zip(jobs, now, strict=True):
        cell = job.cell
        settings = cell.settings or ", ".join(cell.overrides) or "default"
        key = (job.bench, job.profile, settings, cell.strategy)
        rows.setdefault(key, Counter())[state] += 1
    rest = estimate(jobs, now)
    steps: dict[Path, bool] = {}
    for job, state in zip(jobs, now, strict=True):
        for number, at in enumerate(job.step_folders, 1):  # an excerpt keeps no checkpoint
            done = state is State.FINISHED or job.taught(number)
            steps[at] = steps.get(at, False) or done
    of_runs = sum(len(job.step_folders) for job in jobs)
    taught = f"steps: {sum(steps.values())} of {len(steps)} taught"
    notes = [f"{taught}; these runs have {of_runs} in all, and share those that are alike"]
    if any(state is not State.FINISHED for state in now):
        work = f"work left, one run after the other: {_duration(rest.seconds)}"
        if rest.at_work > 1 and not math.isnan(rest.seconds):
            shared = _duration(rest.seconds / rest.at_work)
            work += f"; by the {rest.at_work} runs at work now: {shared}"
        notes.append(work)
    if rest.unmeasured and not math.isnan(rest.seconds):
        notes.append(
            f"{rest.unmeasured} runs with steps that none of their strategy and settings has "
            "measured are taken to last as long as the others"
        )
    running = [job for job, state in zip(jobs, now, strict=True) if state is State.RUNNING]
    notes += [f"{job.cell.name}: {_at_work(job)}" for job in running]
    notes += [_failure(job) for job, state in zip(jobs, now, strict=True) if state is State.FAILED]
    return Table(
        title=f"{len(jobs)} runs: "
        + ", ".join(f"{count} {state}" for state in State if (count := now.count(state))),
        columns=("course", "profile", "settings", "strategy", *State),
        rows=tuple(
            (*key, *(str(count[state]) if count[state] else "" for state in State))
            for key, count in rows.items()
        ),
        notes=tuple(notes),
    )


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "not known before a run of each course has measured each step"
    return f"about {timedelta(seconds=round(seconds))}"


def _at_work(job: Job) -> str:
    """What a run does: the step and the update it is at."""
    at = job.teaching()
    if at is None:
        return "all steps are taught, examining"
    step = f"step {at.number} of {len(job.step_folders)}"
    return f"{step}, update {at.done:,} of {at.of:,}" if at.of else f"{step}, no update yet"


def _failure(job: Job) -> str:
    """Why a run failed: its status, its last lines, its log."""
    from clbench.grid.slurm import left_queue

    failure = job.failed() or left_queue(job)
    status, killer = failure.get("status"), failure.get("signal")
    how = f"signal {killer}" if killer else f"status {status}"
    lines, log = failure.get("last_lines", ()), failure.get("log", job.log)
    if not lines:
        return f"{job.cell.name} failed with {how}; nothing is left in {log}"
    last = "".join(f"\n    {line}" for line in lines)
    return f"{job.cell.name} failed with {how}; {log} ends with:{last}"


def _say(event: Mapping[str, Any], jobs: list[Job]) -> None:
    """A line for a run that began or ended."""
    job: Job = event["job"]
    if event["event"] == "started":
        typer.echo(f"started: {job.cell.name}; output in {job.log}")
        return
    if event["event"] == "elsewhere":
        typer.echo(f"left alone, another process makes it: {job.cell.name}")
        return
    if event["event"] == "lost":
        typer.echo(f"its worker is lost, to be handed out again: {job.cell.name}")
        return
    finished = sum(j.is_finished() for j in jobs)
    word = "failed" if job.failed() else "finished" if job.is_finished() else "stopped"
    typer.echo(f"{word}: {job.cell.name} ({finished} of {len(jobs)} finished)")


def _sbatch(words: Iterable[str]) -> dict[str, str]:
    """`qos=long` → {"qos": "long"}."""
    options: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.lstrip("-").replace("_", "-")
        if not (name and equals and value):
            raise SettingError(
                "--sbatch needs NAME=VALUE", expected="an option of sbatch, as qos=long", got=word
            )
        if name in options:
            raise SettingError(
                "an option of sbatch is given twice",
                where=f"--sbatch {word}",
                expected=f"{name} once",
                got=f"{options[name]} and {value}",
                next_step="keep one of the two",
            )
        options[name] = value
    return options
