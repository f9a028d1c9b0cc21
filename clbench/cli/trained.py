"""Commands that use a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clbench.cli import options
from clbench.cli.options import RESULTS, app, refuse_beside, show_all
from clbench.errors import DataError


@app.command()
def predict(
    ctx: typer.Context,
    run: options.RunFolder,
    input_: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="NIfTI file, folder, or DICOM series in a folder or zip."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of predictions; new, or of this command.")],
    step: options.Step = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="labels: a label map per case; masks: a file per structure; auto: masks where "
            "structures lie inside others, otherwise labels.",
        ),
    ] = "auto",
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also a probability per structure and voxel.")
    ] = False,
    dicom_seg: Annotated[
        bool,
        typer.Option("--dicom-seg", help="Of DICOM series also a segmentation object a structure."),
    ] = False,
    series: Annotated[
        str | None, typer.Option(help="SeriesInstanceUID, where a folder holds several series.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Source of the course whose `rescale` makes HU of these images."),
    ] = None,
    device: options.Device = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default as the run had.")
    ] = None,
) -> None:
    """Predict new CTs with a run's model; the same command goes on where it was stopped."""
    from clbench.cli.progress import Progress
    from clbench.deployment.inputs import find_inputs
    from clbench.deployment.predict import output_form, predict_cases
    from clbench.deployment.trained import load_trained

    cases = find_inputs(input_, out=out, uid=series)
    if all(case.series is None for case in cases):
        of_dicom = ("series", "dicom_seg")
        refuse_beside(ctx, of_dicom, f"{input_}, which is NIfTI", acts="a DICOM series")
    trained = load_trained(run, step=step, device=device)
    form = output_form(
        format_, trained.structures, probabilities=probabilities, dicom_seg=dicom_seg
    )
    with Progress() as progress:
        progress.lesson = f"step {trained.step}/{len(trained.record.course.steps)}"
        batch = predict_cases(
            trained,
            cases,
            out=out,
            form=form,
            source=source,
            threads=threads,
            watch=progress.watch,
        )
    before = f", {len(batch.finished_before)} were there" if batch.finished_before else ""
    typer.echo(f"{len(batch.predicted)} cases predicted{before}: {', '.join(trained.structures)}")
    for note in batch.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"Predictions: {batch.folder}")
    if len(cases) == 1 and batch.refused:
        raise next(iter(batch.refused.values()))
    if batch.refused:
        raise DataError(
            f"{len(batch.refused)} of {len(cases)} cases could not be predicted",
            where=input_,
            got="; ".join(f"{name}: {err.brief}" for name, err in list(batch.refused.items())[:5])
            + ("; …" if len(batch.refused) > 5 else ""),
            next_step=f"predictions.json in {out} names each; mend or remove the files, and run "
            "the same command again",
        )


@app.command()
def extend(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Folder of a run, or its step2.pt; or weights from elsewhere: a state dict, a "
            "MONAI bundle, a trained folder of nnU-Net v2, a checkpoint of the Universal Model.",
        ),
    ],
    learn: Annotated[
        list[str], typer.Option(help="Structure to learn, any number of times: spleen_cyst.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of annotated CTs; ten are a good number.")],
    old_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of CTs that annotate structures the model knows: it is scored on them "
            "before and after, and never learns from them."
        ),
    ] = None,
    step: options.Step = None,
    strategy: Annotated[
        str | None, typer.Option(help="What teaches the new step; default as the model's run.")
    ] = None,
    structures: Annotated[
        str | None,
        typer.Option(help="Of weights from elsewhere: spleen,liver,… in order of the channels."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Of weights from elsewhere; default paper.")
    ] = None,
    inside: Annotated[
        str | None, typer.Option(help="The structure that contains a new one: spleen.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of a new structure: organ, vessel, duct, device, tumor, cyst; default by name."
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="How --data is laid out; default as its names say.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="JSON of label values of --data; default dataset.json beside it."),
    ] = None,
    patient: Annotated[
        str, typer.Option(help="Regular expression with one group: the patient in a case id.")
    ] = "(.+)",
    split: Annotated[
        Path | None, typer.Option(help="FILE.toml: your own train, validation and test cases.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default as the model's run.")] = None,
    out: options.Out = RESULTS,
    set_: options.Overrides = None,
    device: options.Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default all.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat a finished extension.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where preprocessed volumes are kept.")] = None,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between savings; 0: every update.")
    ] = 300.0,
) -> None:
    """Teach a trained model more structures from CTs of your own; its old data is not needed."""
    from clbench.cli.progress import Progress
    from clbench.deployment.extension.cost import extension_tables
    from clbench.deployment.extension.extend import ExtendSettings
    from clbench.deployment.extension.extend import extend as extend_model
    from clbench.spec.toml import load_split

    settings = ExtendSettings(
        model=model,
        learn=tuple(name.strip() for names in learn for name in names.split(",")),
        data=data,
        old_data=old_data,
        step=step,
        strategy=strategy,
        structures=tuple(w.strip() for w in (structures or "").split(",") if w.strip()),
        profile=profile,
        kind=kind,
        inside=inside,
        layout=layout,
        labels=labels,
        patient=patient,
        split=None if split is None else load_split(split),
        seed=seed,
        out=out,
        overrides=tuple(set_ or ()),
        device=device,
        threads=threads,
        fresh=fresh,
        cache=cache,
        checkpoint_s=checkpoint_every,
    )
    with Progress() as progress:
        folder = extend_model(settings, progress.watch)
    show_all(extension_tables(folder))
    typer.echo(f"Results: {folder}")
