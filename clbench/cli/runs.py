"""Commands that make runs and scores, and the list of what can be run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench import signals
from clbench.cli import options
from clbench.cli.options import (
    RESULTS,
    app,
    one_of,
    parse_expect_hu,
    parse_order,
    parse_seeds,
    parse_splits,
    refuse_beside,
    show,
    show_all,
)
from clbench.errors import SettingError
from clbench.training.launch import Place, launch, place

if TYPE_CHECKING:
    from clbench.run.plan import Plan, RunSettings


@app.command()
def run(
    bench: options.Bench,
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
    out: options.Out = RESULTS,
    set_: options.Overrides = None,
    device: options.Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Loader processes. None: by device.")] = None,
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
    tuned: Annotated[
        Path | None,
        typer.Option(help="Settings file of clbench tune; its choice for the strategy."),
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, mlflow or wandb; repeat for more.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="This many GPUs of this machine for one run.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="The same on CPUs: processes for one run.")
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="Teach the listed steps in another order: 3,1,2.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="Refuse, if the settings make another run than this one.")
    ] = None,
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
    here = place()
    count = _processes(gpus, processes, device)
    if here is not None:
        _refuse_other_place(here, gpus, processes, device)
    if here is None and count > 1:
        raise typer.Exit(launch(sys.argv[1:], count))
    if here is not None and here.rank > 0:  # the first one speaks for all
        sys.stdout, track = Path(os.devnull).open("w"), None  # noqa: SIM115
    if processes is not None:
        device = "cpu"
    splits = parse_splits(split or [])
    if order is not None:
        from clbench.spec import registry

        bench = registry.in_order(bench, parse_order(order))
    what = data or f"the embedded PHANTOM, not patients (real data: --data {_folders(bench)})"
    typer.echo(f"Data: {what}")
    from clbench.cli.progress import Progress
    from clbench.report.tables.summary import run_report
    from clbench.run.course import run_plan
    from clbench.run.plan import RunSettings, resolve
    from clbench.tracking.follow import tracked
    from clbench.training.ranks import join, own_device

    planned = None if tuned is None else _with_tuned(tuned, numbers)
    for number in numbers:
        with Progress() as progress, tracked(track or [], out, progress.warn) as also:
            settings = RunSettings(
                bench=bench,
                strategy=strategy,
                seed=number,
                profile=profile,
                data=data,
                splits=splits,
                out=out,
                overrides=tuple(set_ or ()),
                device=own_device(device, here),
                workers=workers,
                threads=threads,
                fresh=fresh,
                keep_predictions=keep,
                cache=cache,
                checkpoint_s=checkpoint_every,
                deterministic=deterministic,
            )
            plan = resolve(settings) if planned is None else planned(settings)
            plan.ranks, plan.watch = join(here, plan.device), progress.watch

            def watch(event: dict[str, Any]) -> None:
                progress.watch(event)  # called within this turn of the loop
                also(event)

            with signals.listening():  # looking at all cases may take long, too
                plan.open()
                if run_id is not None:
                    _refuse_other_run(plan, run_id)
                folder = run_plan(plan, watch)
        for which in scorings:
            for table in run_report(folder, scoring=which):
                show(table)
        typer.echo(f"Results: {folder}")


def _refuse_other_run(plan: Plan, run_id: str) -> None:
    """Refuse to make another run than the one that was planned when a job was handed out.

    Raises:
        SettingError: what the run depends on was changed since.
    """
    if plan.folder.name == run_id:
        return
    raise SettingError(
        "the settings make another run than the one asked for",
        where=f"--run-id, {plan.folder.parent}",
        expected=run_id,
        got=plan.folder.name,
        next_step="a course, split, tuned or data file, or clbench itself was changed since the "
        "run was planned: take it back, or repeat `clbench grid`, which plans the other run",
    )


def _processes(gpus: int | None, processes: int | None, device: str) -> int:
    """How many processes a run is to have, by its options.

    Raises:
        SettingError: they contradict each other, or there are fewer GPUs.
    """
    if gpus is None:
        if processes is not None and device not in ("auto", "cpu"):
            raise SettingError(
                "--processes compute on the CPU",
                where="`clbench run`",
                expected="--processes without --device, or --gpus",
                got=f"--processes {processes} and --device {device}",
                next_step=f"--gpus {processes} is one run on so many GPUs; or leave --device out",
            )
        return processes or 1
    if processes is not None or device != "auto":
        other = "--processes" if processes is not None else f"--device {device}"
        raise SettingError(
            "--gpus says already where to compute",
            expected=f"--gpus or {other.split()[0]}",
            got=f"--gpus {gpus} and {other}",
        )
    from clbench import reproducibility

    if gpus > (there := reproducibility.gpus()):
        raise SettingError(
            "there are not as many GPUs as asked for",
            where="--gpus",
            expected=f"at most {there}, which this torch can compute on" if there else "a GPU",
            got=gpus,
            next_step=f"--gpus {there}" if there else "--processes N computes on the CPU",
        )
    return gpus


def _refuse_other_place(here: Place, gpus: int | None, processes: int | None, device: str) -> None:
    """Refuse options that say another place than the launcher, such as torchrun, has given.

    Args:
        here: which process this is.
        gpus: as typed.
        processes: as typed.
        device: as typed.

    Raises:
        SettingError: another number of processes, or one GPU for all of them.
    """
    asked = gpus or processes
    if asked not in (None, here.size) or (device.startswith("cuda:") and here.size > 1):
        said = f"--device {device}"
        if asked is not None:
            said = f"--gpus {gpus}" if gpus is not None else f"--processes {processes}"
        raise SettingError(
            "the processes of this run are started already, each with its device",
            where="`clbench run`, under torchrun",
            expected=f"{here.size} processes, each on a GPU of its own where there are any",
            got=said,
            next_step="leave it out: --nproc-per-node of torchrun says how many",
        )


def _with_tuned(path: Path, seeds: list[int]) -> Callable[[RunSettings], Plan]:
    """What plans a run with the settings that a file holds for its strategy."""
    from clbench.tuning.tuned_file import plan_tuned, read_tuned, refuse_used_seeds

    tuned = read_tuned(path)
    refuse_used_seeds(tuned, seeds, path)
    typer.echo(f"Tuned settings: {path}, rule {tuned.label}")
    return lambda settings: plan_tuned(settings, path)


def _folders(bench: str) -> str:
    """What `--data` names in a benchmark: `btcv=PATH,lits=PATH`."""
    from clbench.spec import registry

    return ",".join(f"{s.name}=PATH" for s in registry.benchmark(bench).sources)


OF_PREDICTIONS = (
    *("bench", "step", "name", "seed", "labels", "allow_missing"),
    *("profile", "split", "set_", "out"),
)
"""Options of `clbench score` that describe predictions of another tool."""


@app.command()
def score(
    ctx: typer.Context,
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Folders of finished runs.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="nsd, nsd_sweep, nsd_1.5mm, hd95_mm, assd_mm, asd_bsp, volume_error_ml, lesion, "
            "patient, patient_50vox; default nsd,hd95_mm,volume_error_ml,lesion,patient."
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
            help="With --predictions: JSON of label values. Default: dataset.json (nnU-Net) in "
            "the folder, else the benchmark's values of each source."
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="With --predictions: holes for cases without one."),
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="With --predictions: whose phantom; as in clbench run.")
    ] = None,
    data: options.Data = None,
    split: Annotated[
        list[str] | None, typer.Option(help="With --predictions: as in clbench run.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --predictions: data.expect_hu=false, not in HU."),
    ] = None,
    out: Annotated[Path, typer.Option(help="With --predictions: where the run goes.")] = RESULTS,
    cache: options.Cache = None,
) -> None:
    """More metrics for finished runs, or a run folder from predictions made by any tool."""
    from clbench.cli.progress import Progress
    from clbench.evaluation.metrics.case import DEFAULT, parse_metrics
    from clbench.report.tables.rescored import score_report
    from clbench.run.external import OutsideSettings, score_predictions
    from clbench.run.rescore import score_run

    chosen = DEFAULT if metrics is None else parse_metrics(metrics)
    if bool(runs) == (predictions is not None):
        raise SettingError(
            "`clbench score` needs run folders, or --predictions",
            expected="`clbench score RUN`, or "
            "`clbench score --bench BENCH --step 1 --predictions DIR --name METHOD`",
            got="both" if runs else "neither",
        )
    if runs:
        refuse_beside(ctx, OF_PREDICTIONS, "a run, which records it", acts="--predictions")
    folders = []
    for folder in runs or ():
        with Progress() as progress:
            folders.append(
                score_run(folder, metrics=chosen, data=data, cache=cache, watch=progress.watch)
            )
    if predictions is not None:
        if bench is None or step is None or name is None:
            given = {"bench": bench, "step": step, "name": name}.items()
            raise SettingError(
                "--predictions needs to know what they are",
                expected="--bench, --step and --name",
                got=", ".join(f"--{k} {v}" for k, v in given if v is not None) or "none of them",
            )
        settings = OutsideSettings(
            bench=bench,
            step=step,
            predictions=predictions,
            name=name,
            seed=seed,
            metrics=chosen,
            labels=labels,
            profile=profile,
            data=data,
            splits=parse_splits(split or []),
            out=out,
            cache=cache,
            allow_missing=allow_missing,
            expect_hu=parse_expect_hu(set_ or []),
        )
        with Progress() as progress:
            folder, holes = score_predictions(settings, progress.watch)
        folders.append(folder)
        if holes:
            typer.echo(f"Holes, without prediction after step {step}: {', '.join(holes)}")
    for folder in folders:
        show_all(score_report(folder))
        typer.echo(f"Results: {folder}")


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="settings, layouts or structures; default what can be run.")
    ] = None,
) -> None:
    """Benchmarks, strategies, backbones, encodings and profiles; or settings, layouts, structures.

    One line each.
    """
    lists = {"settings": _settings, "layouts": _layouts, "structures": _structures}
    chosen = _runnable if what is None else one_of("`clbench list`", what, lists)
    typer.echo("\n".join(chosen()))


def _runnable() -> Iterator[str]:
    from clbench.spec import registry
    from clbench.spec.settings import load_profile, profile_names

    for title, kind in (
        ("Benchmarks", "benchmark"),
        ("Strategies", "strategy"),
        ("Backbones", "backbone"),
        ("Encodings", "encoding"),
    ):
        yield title
        for name in registry.entries(kind):
            yield f"  {name:<17} {registry.summary(kind, name)}"
        if kind == "strategy":
            yield "Strategies by composition, such as universal+plop: a head, and parts"
            for name, what in registry.load("resolver", "composition_list")():
                yield f"  {name:<17} {what}"
    yield "Profiles"
    for name in profile_names():
        yield f"  {name:<17} {load_profile(name).summary}"


def _settings() -> Iterator[str]:
    """What `--set` takes: name, default and meaning."""
    from clbench.spec.settings import GROUPS, described

    for group, kind in GROUPS.items():
        for name, default, meaning in described(kind):
            yield f"  {f'{group}.{name}={default}':<34} {meaning}"
    yield "  strategy.…                         the hyperparameters of a strategy: see its file"


def _layouts() -> Iterator[str]:
    """What `layout` takes in a course file, and the files of a case."""
    from clbench.data.layouts import LAYOUTS

    for name, layout in LAYOUTS.items():
        image, label = layout.paths(Path(), "1")
        written = f"{image} + {label}"
        yield f"  {name:<17} {getattr(layout, 'describes', written)}"


def _structures() -> Iterator[str]:
    """Every structure a course may name; it may declare more."""
    from clbench.spec.taxonomy import STRUCTURES

    for name, one in STRUCTURES.items():
        inside = f", inside {one.parent}" if one.parent else ""
        yield f"  {name:<28} {one.kind}{inside}; also {', '.join(one.aliases) or 'nothing else'}"
