"""Predicting a batch of CTs, one after the other; a stopped batch goes on where it was.

The folder of predictions holds `predictions.json`: the model, the form of the outputs, and per case
the checksums of what it was made from and of what was written.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clbench import reproducibility, signals
from clbench.data.checks.hounsfield import SAMPLED, hounsfield_notes
from clbench.data.labels import PSEUDO_SCALE, in_hu
from clbench.data.nifti import Grid
from clbench.data.volume import Volume
from clbench.deployment.dicom_seg import highdicom, source_headers, write_segmentations
from clbench.deployment.inputs import InputCase
from clbench.deployment.masks import (
    OnScanGrid,
    Probabilities,
    Tally,
    dataset_json,
    nested,
    on_scan_grid,
    write_json,
    write_nifti,
)
from clbench.deployment.scan import Scan, prepare
from clbench.deployment.trained import TrainedModel
from clbench.errors import ClbenchError, DataError, SettingError, StoreError
from clbench.run.course import alone
from clbench.spec.benchmark import Rescale
from clbench.store import files
from clbench.store.run_folder import outside_runs
from clbench.training.resume import Watch
from clbench.types import Bits, mask_of

RECORD = "predictions.json"
"""The record of a folder of predictions."""
EARLIER = "of_earlier_image"
"""In the entry of a case: true where the image is refused now, and its files are of one before."""
SCHEMA = 1
"""Version of its layout."""
SLAB_BYTES = 2 << 30
"""Memory of the slabs in which a CT is predicted; a longer one is predicted in stretches."""
FORMS = ("auto", "labels", "masks")
"""`labels`: a label map per case; `masks`: a file per structure; `auto`: masks where structures lie
inside others, otherwise label maps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputForm:
    """What is written per case."""

    masks: bool
    """A mask per structure; otherwise one label map."""
    probabilities: bool = False
    """Also a probability per structure and voxel."""
    dicom_seg: bool = False
    """Also a DICOM segmentation object per structure, for cases that are DICOM series."""


@dataclass(kw_only=True)
class Batch:
    """What became of the cases of a call."""

    folder: Path
    """Where predictions lie."""
    predicted: list[str] = field(default_factory=list)
    """Cases predicted now."""
    finished_before: list[str] = field(default_factory=list)
    """Cases whose predictions were there already, made from the same image."""
    refused: dict[str, ClbenchError] = field(default_factory=dict)
    """Case → why it was not predicted."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the predictions should know."""


def output_form(
    form: str,
    structures: Sequence[str],
    *,
    probabilities: bool = False,
    dicom_seg: bool = False,
) -> OutputForm:
    """What `--format` asks for.

    Args:
        form: one of `FORMS`.
        structures: of the model.
        probabilities: also write probabilities.
        dicom_seg: also write DICOM segmentation objects.

    Raises:
        SettingError: no such form, or no library that writes DICOM.
    """
    if form not in FORMS:
        raise SettingError(
            "there is no such form of output",
            where="--format",
            expected=", ".join(FORMS),
            got=form,
        )
    masks = nested(structures) if form == "auto" else form == "masks"
    if dicom_seg:
        highdicom()  # before anything is predicted
    return OutputForm(masks=masks, probabilities=probabilities, dicom_seg=dicom_seg)


def predict_cases(
    trained: TrainedModel,
    cases: Sequence[InputCase],
    *,
    out: Path,
    form: OutputForm,
    source: str | None = None,
    threads: int | None = None,
    watch: Watch = lambda event: None,
) -> Batch:
    """Predict every case that is not predicted yet.

    A case that cannot be predicted does not keep others from being: it is in `Batch.refused`.

    Args:
        trained: the model.
        cases: what to predict.
        out: the folder of predictions.
        form: what is written per case.
        source: of the run's course, whose `rescale` makes HU of the images; None: they are HU.
        threads: CPU threads; None: as many as the run was examined with, so that equal images
            give equal bits.
        watch: told about every case.

    Raises:
        SettingError: the course has no such source.
        StoreError: `out` holds other files, or predictions of another model or form; it cannot be
            written, or the disk is full.
        Stopped: by a signal; finished cases are kept.
    """
    outside_runs(out, "predictions of new images are")
    rescale = None if source is None else trained.read_as(source).rescale
    count = trained.record.threads if threads is None else threads
    with signals.listening(), alone(out, wait=False), reproducibility.threads(count):
        record = _opened(trained, out, form, source)
        batch = Batch(folder=out)
        for done, case in enumerate(cases, 1):
            try:
                image = {"path": str(case.path), "sha256": case.checksum()}
                if _is_finished(out, record["cases"].get(case.name), image):
                    batch.finished_before.append(case.name)
                    if _is_good_again(record, case.name):
                        files.write_json(out / RECORD, record)
                else:
                    start = time.monotonic()
                    entry = _predict(trained, case, out, form, rescale)
                    entry |= {"input": image, "seconds": round(time.monotonic() - start, 3)}
                    record["cases"][case.name] = entry
                    record["refused"].pop(case.name, None)
                    files.write_json(out / RECORD, record)
                    batch.predicted.append(case.name)
            except DataError as err:
                batch.refused[case.name] = err
                record["refused"][case.name] = str(err)
                if case.name in record["cases"]:  # its files stay, and must not pass for new ones
                    record["cases"][case.name][EARLIER] = True
                files.write_json(out / RECORD, record)
            watch({"event": "predicted", "done": done, "of": len(cases), "case": case.name})
            signals.check(f"predicting, case {case.name}")
        if not form.masks:
            write_json(out / "dataset.json", dataset_json(trained.structures, len(record["cases"])))
        batch.notes = _notes(record, [c.name for c in cases])
    return batch


def _notes(record: Mapping[str, Any], cases: Sequence[str]) -> list[str]:
    notes = [
        f"case {name}: {note}"
        for name in cases
        for note in (record["cases"].get(name) or {}).get("notes", ())
    ]
    notes += [
        f"case {name}: its files were made from an earlier image; the one there now is refused"
        for name in cases
        if (record["cases"].get(name) or {}).get(EARLIER)
    ]
    changed = {
        name: entry["relabelled_vox"]
        for name in cases
        if (entry := record["cases"].get(name)) and entry.get("relabelled_vox")
    }
    if not changed:
        return notes
    overlap = (
        f"in {len(changed)} of {len(cases)} cases structures overlap (up to "
        f"{max(changed.values())} voxels): the label map shows the inner one, or the one learned "
        "later; --format masks keeps both"
    )
    return [overlap, *notes]


# ------------------------------------------------------------------------------- the output folder


def _opened(
    trained: TrainedModel, out: Path, form: OutputForm, source: str | None
) -> dict[str, Any]:
    """The record of the folder, begun where it is empty.

    Raises:
        StoreError: other files, or another model's predictions.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "run_id": trained.record.run_id,
            "bench": trained.record.identity.bench,
            "strategy": trained.record.strategy,
            "seed": trained.record.seed,
            "step": trained.step,
            "weights": trained.digest,
        },
        "structures": list(trained.structures),
        "format": "masks" if form.masks else "labels",
        "probabilities": form.probabilities,
        "dicom_seg": form.dicom_seg,
        "postprocess": trained.postprocess,
        "source": source,
        "cases": {},
        "refused": {},
    }
    path = out / RECORD
    if not path.exists():
        if others := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
            raise StoreError(
                "the output folder holds other files",
                where=out,
                expected="a new or empty folder, or one this command wrote",
                got=", ".join(others[:5]) + (", …" if len(others) > 5 else ""),
                next_step="choose another folder with --out",
            )
        files.write_json(path, record)
        return record
    there = files.read_json(path)
    for key in (k for k in record if k not in ("cases", "refused")):
        if there.get(key) != record[key]:
            raise StoreError(
                "the output folder holds predictions of another model, step or form",
                where=path,
                expected=f"{key}: {record[key]}",
                got=f"{key}: {there.get(key)}",
                next_step="choose another folder with --out",
            )
    return {**record, "cases": dict(there["cases"]), "refused": dict(there["refused"])}


def _is_finished(out: Path, entry: Mapping[str, Any] | None, image: Mapping[str, str]) -> bool:
    """Whether a case was predicted from the same bytes, and its files are as they were written."""
    if entry is None or entry["input"]["sha256"] != image["sha256"]:
        return False
    written: Mapping[str, str] = entry["files"]
    return all(
        (out / name).is_file() and files.sha256(out / name) == digest
        for name, digest in written.items()
    )


def _is_good_again(record: Mapping[str, Any], case: str) -> bool:
    """Take back that a case was refused; returns whether the record said so."""
    refused = record["refused"].pop(case, None) is not None
    return record["cases"][case].pop(EARLIER, False) or refused


# ---------------------------------------------------------------------------------------- one case


def _predict(
    trained: TrainedModel,
    case: InputCase,
    out: Path,
    form: OutputForm,
    rescale: Rescale | None,
) -> dict[str, Any]:
    """Predict and write one case; returns its entry of the record."""
    scan = replace(case.read(), rescale=rescale)
    grid = scan.grid
    notes = [*scan.notes, *_odd_values(trained, scan)]
    volume = prepare(scan, case=case.name, source=trained.source, pre=trained.preprocessing)
    del scan  # the stored voxels are not needed any more
    structures = trained.structures
    series = case.series() if form.dicom_seg and case.series is not None else None
    if series is not None:
        source_headers(series, notes)  # what is missing is said before the case is predicted
    elif form.dicom_seg:
        notes.append("no DICOM series, hence no segmentation object")
    written: list[Path] = []
    with ExitStack() as stack:
        probabilities = None
        if form.probabilities:
            scratch = stack.enter_context(tempfile.TemporaryFile(dir=out))
            probabilities = Probabilities(scratch, len(structures), volume.image.shape)
        bits = predict_volume(trained, volume, probabilities)
        way = on_scan_grid(volume, grid)
        tally = Tally(structures)
        if series is not None:
            folder = out / f"{case.name}_dicom_seg"
            written += write_segmentations(folder, bits, structures, way, series)
        if form.masks:
            written += _write_masks(out / case.name, bits, structures, way, grid)
            for slab in way.slabs(bits):
                tally.count(slab)
        else:
            written.append(out / f"{case.name}.nii.gz")
            write_nifti(written[-1], map(tally.label, way.slabs(bits)), grid)
        if probabilities is not None:
            for k, name in enumerate(structures):
                path = out / f"{case.name}_probabilities" / f"{name}.nii.gz"
                slabs = way.slabs(probabilities.array[k])
                write_nifti(path, slabs, grid, scale=1 / PSEUDO_SCALE)
                written.append(path)
    return {
        "files": {p.relative_to(out).as_posix(): files.sha256(p) for p in written},
        "bits_sha256": hashlib.sha256(bits.tobytes()).hexdigest(),
        "notes": notes,
        "voxels": tally.voxels,
        "relabelled_vox": tally.relabelled_vox,
    }


def _odd_values(trained: TrainedModel, scan: Scan) -> list[str]:
    """What speaks against a scan being a CT in HU; nothing where a model learned other values.

    Raises:
        DataError: a `rescale` of the run's course makes HU of it, and was not asked for.
    """
    profile = (trained.record.with_defaults or {}).get("profile", {})
    if not profile.get("data", {}).get("expect_hu", True):
        return []
    step = max(1, math.ceil((scan.stored.size / SAMPLED) ** (1 / 3)))
    sampled = scan.stored[::step, ::step, ::step]
    notes = hounsfield_notes(scan.hu(sampled))
    for name in trained.sources if notes and scan.rescale is None else ():
        rescale = trained.read_as(name).rescale
        if rescale is not None and not hounsfield_notes(in_hu(scan.hu(sampled), rescale)):
            raise DataError(
                "the image is stored as a source of the run's course is, not in HU",
                where=scan.path,
                expected="a CT in HU, or the source whose rescale makes HU of it",
                got=notes[0],
                next_step=f"--source {name} reads it as that source: HU = {rescale.slope:g} * "
                f"value + {rescale.intercept:g}",
            )
    return list(notes)


def predict_volume(
    trained: TrainedModel, volume: Volume, probabilities: Probabilities | None = None
) -> Bits:
    """The masks of a prepared image on the model's grid, as the run's examination computes them.

    Args:
        trained: the model.
        volume: the image.
        probabilities: takes the probabilities, before any post-processing.

    Returns:
        (D, H, W), bit k = `trained.structures[k]`.
    """
    with trained.enough_memory(volume.case):
        return trained.server.predict(
            volume,
            postprocess=trained.postprocess,
            watch_slab=None if probabilities is None else probabilities.put,
            most_bytes=SLAB_BYTES,
        )


def _write_masks(
    folder: Path, bits: Bits, structures: Sequence[str], way: OnScanGrid, grid: Grid
) -> list[Path]:
    """Write a file per structure; returns their paths."""
    paths = []
    for k, name in enumerate(structures):
        paths.append(folder / f"{name}.nii.gz")
        write_nifti(paths[-1], way.slabs(mask_of(bits, k).view("uint8")), grid)
    return paths
