"""A finished run's model as a folder to publish, and such a folder read back into a run.

The folder is an excerpt of the run (`clbench.store.publish`) with the weights of one step, sealed
anew over what it holds:

| file | what |
|---|---|
| `stepN.safetensors` | all of the checkpoint after step N: weights, and the strategy's memory |
| `vectors.safetensors` | the text vector of every structure, as the model was built with |
| `run.json`, `*.csv`, `course/` | record, scores, costs, and the course's file where it has one |
| `README.md`, `metadata.json` | model card, and MONAI's metadata; to be edited, hence not sealed |

Weights and memory are kept whole, for both are needed: predicting asks the strategy to serve the
model and to bound structures along the body, and both look into the memory (thresholds, heights,
averaged weights); teaching one more step starts from the two of them. Left out is what only the
next update of a broken-off step would need (optimizer, random states), predictions, events, the
checkpoints of other steps, and what a strategy remembers of single patients (`published`). Folders
of the machine the run was made on are cut from the record.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import save as save_arrays

from clbench.deployment.publish.card import Described, model_card, monai_metadata
from clbench.deployment.publish.tensors import read_tensors, write_tensors
from clbench.deployment.trained import VECTORS, checkpoint_path, load_trained
from clbench.errors import StoreError
from clbench.run.record import benchmark_of
from clbench.spec.names import need_name
from clbench.store import checkpoint, files, run_folder
from clbench.store.checksums import check_files, check_record
from clbench.store.publish import without_folders
from clbench.store.record import RunRecord

SUFFIXES = (".safetensors", ".json", ".toml", ".md", ".csv")
"""Endings of the files of an exported model; no other file is imported."""
PASSED_OVER = (".git", ".gitattributes", ".gitignore", ".cache")
"""What a model hub leaves in a downloaded folder; never read."""
AGAIN = "download the folder again, or export the run again"


def export_run(run: Path, to: Path, *, step: int | None = None) -> list[str]:
    """Write the model of a finished run after a step as a folder to publish.

    Args:
        run: the run.
        to: a new or empty folder.
        step: 1-based; None: the last.

    Returns:
        The names of the files written.

    Raises:
        StoreError: the run is not finished, was changed, or has no checkpoint of that step; the
            folder holds files, or cannot be written. Nothing is left behind then.
        SettingError: a step the course does not have.
    """
    record = RunRecord.read(run)
    _need_whole(run, record)
    _need_empty(to)
    run_folder.outside_runs(to, "an exported model is")
    trained = load_trained(run, step=step, device="cpu")
    content = checkpoint.load(checkpoint_path(run, record, trained.step))
    content["memory"] = trained.plan.strategy.published(content["memory"])
    about = Described(
        folder=run,
        record=without_folders(record),
        benchmark=trained.plan.benchmark,
        preprocessing=trained.preprocessing,
        step=trained.step,
        structures=trained.structures,
        memory=content["memory"],
        parameters=sum(t.numel() for t in content["model"].values()),
    )
    texts = {
        "README.md": model_card(about),
        "metadata.json": json.dumps(monai_metadata(about), indent=2) + "\n",
    }
    names = trained.plan.benchmark.structures(len(record.course.steps))
    vectors = dict(zip(names, trained.plan.kit.encoding(names).numpy(), strict=True))

    def fill(part: Path) -> None:
        for source in _kept(run):
            target = part / source.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        with (part / f"step{trained.step}.safetensors").open("wb") as file:
            write_tensors(file, content)
        (part / VECTORS).write_bytes(save_arrays(vectors))
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        said = f"model after step {trained.step}, record and tables of a run"
        _write_record(part, without_folders(record), said)

    files.atomic_folder(
        to,
        fill,
        what="the exported model",
        next_step="free some disk space, or name another folder; nothing was left behind",
    )
    return sorted(p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file())


def import_run(folder: Path, out: Path) -> Path:
    """Read an exported model back into a run folder below `out`, equal to the bit.

    Nothing of the folder is run or unpickled. The run it becomes is predicted with, reported and
    verified as any other; it holds the checkpoint of the one step that was exported.

    Args:
        folder: what `export_run` wrote, perhaps downloaded; card and metadata may have been edited.
        out: a results folder, as `--out` of `clbench run`.

    Returns:
        The run folder, `<out>/<bench>/<strategy>/<run id>`.

    Raises:
        StoreError: files that are no part of an exported model, a file that is missing, changed or
            damaged, a run of that name that is there already, or a folder that cannot be written.
        SpecError: a record whose names would lead out of `out`.
        ClbenchError: its course is unknown here, or another one.
    """
    names = _listed(folder)
    record, weights = _checked_record(folder, names)
    benchmark = benchmark_of(record)
    content = read_tensors(folder / weights)
    number = int(weights.removeprefix("step").removesuffix(".safetensors"))
    _of_this_run(folder / weights, content, number, benchmark)
    target = out / record.identity.bench / record.strategy / record.run_id
    if target.exists():
        raise StoreError(
            "a run of this name is there already",
            where=target,
            expected="no such folder",
            next_step="choose another folder with --out",
        )

    def fill(part: Path) -> None:
        for name in names:
            if name.endswith((".csv", ".toml")) or name == VECTORS:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes((folder / name).read_bytes())
        checkpoint.save(part / f"step{number}.pt", content)
        _write_record(part, record, f"imported model after step {number}, record and tables")

    files.atomic_folder(
        target,
        fill,
        what="the imported run",
        next_step="free some disk space, or choose another folder with --out; nothing was left",
    )
    return target


# ------------------------------------------------------------------------------------------- export


def _need_whole(run: Path, record: RunRecord) -> None:
    """Refuse a run that is not finished, or was changed since."""
    record.need_finished(run)
    raw = run_folder.read_record(run)
    if check_record(run, raw):
        for error in check_files(run, raw):
            raise error


def _need_empty(to: Path) -> None:
    if to.is_dir() and not any(to.iterdir()):
        return
    if to.exists():
        there = sorted(p.name for p in to.iterdir()) if to.is_dir() else ["a file"]
        raise StoreError(
            "the folder for the exported model is not empty",
            where=to,
            expected="a new or empty folder",
            got=", ".join(there[:5]) + (", …" if len(there) > 5 else ""),
            next_step="name another folder",
        )


def _kept(run: Path) -> Iterator[Path]:
    """Tables and the copy of the course file."""
    yield from sorted(run.glob("*.csv"))
    yield from sorted(p for p in run.glob("course/**/*.toml") if p.is_file())
    yield from sorted(run.glob(VECTORS))  # of a run that was imported itself; written anew


def _write_record(part: Path, record: RunRecord, said: str) -> None:
    """Seal a copy of the record over the files of a folder, and write it there."""
    copy = dataclasses.replace(record, excerpt=said)
    copy.seal(part)
    copy.write(part)


# ------------------------------------------------------------------------------------------- import


def _listed(folder: Path) -> list[str]:
    """The files of an exported model.

    Raises:
        StoreError: one that is none, by its ending, or a link.
    """
    names = []
    for parent, folders, inner in os.walk(folder):
        here = Path(parent)
        top = here == folder
        folders[:] = [d for d in folders if not (top and d in PASSED_OVER)]
        for name in (*inner, *(d for d in folders if (here / d).is_symlink())):
            path = here / name
            if top and name in PASSED_OVER:
                continue
            if path.is_symlink() or path.suffix not in SUFFIXES:
                raise StoreError(
                    "a file is no part of an exported model",
                    where=path,
                    expected="files that end in " + ", ".join(SUFFIXES),
                    got="a link" if path.is_symlink() else path.name,
                    next_step="nothing was read; remove it, if the folder is from whom you trust",
                )
            names.append(path.relative_to(folder).as_posix())
    if "run.json" not in names:
        raise _not_exported(folder, ", ".join(sorted(names)[:5]) or "no file")
    return sorted(names)


def _checked_record(folder: Path, names: Sequence[str]) -> tuple[RunRecord, str]:
    """The record of an exported model whose files are as it says, and the name of its weights.

    Args:
        folder: the exported model.
        names: its files.

    Raises:
        StoreError: a file is missing, changed or of another run.
        SpecError: a name in the record is none of a folder.
    """
    raw = run_folder.read_record(folder)
    if not check_record(folder, raw):
        raise _not_exported(folder, "a record without checksums")
    for error in check_files(folder, raw):
        what = error.what.replace("of the run", "of the model")
        error.what = what.replace("after the run was", "after it was")
        error.next_step = AGAIN
        raise error
    record = RunRecord.from_json(raw, folder / "run.json")
    weights = sorted(n for n in names if re.fullmatch(r"step\d+\.safetensors", n))
    if len(weights) != 1 or VECTORS not in names or "scores.csv" not in names:
        raise _not_exported(folder, ", ".join(names[:8]))
    where = folder / "run.json"
    identity = record.identity
    for name in (identity.bench, record.strategy, record.run_id):
        need_name(name, where)
    if identity.run_id != record.run_id:
        raise StoreError(
            "the run id does not belong to the record",
            where=where,
            expected=identity.run_id,
            got=record.run_id,
            next_step=AGAIN,
        )
    if not isinstance(record.settings.get("bench"), str):
        raise _not_exported(folder, "a record whose settings name no course")
    return record, weights[0]


def _not_exported(folder: Path, got: str) -> StoreError:
    return StoreError(
        "the folder holds no exported model",
        where=folder,
        expected=f"run.json with checksums, scores.csv, {VECTORS} and one stepN.safetensors",
        got=got,
        next_step="name the folder that `clbench export` wrote",
    )


def _of_this_run(path: Path, content: dict[str, Any], number: int, benchmark: Any) -> None:
    """The weights must be of the course and step that their file and record name."""
    expected = (benchmark.name, benchmark.version, number)
    got = tuple(content.get(k) for k in ("bench", "bench_version", "step"))
    steps = len(benchmark.steps)
    structures = list(benchmark.structures(number)) if 1 <= number <= steps else []
    if got != expected or content.get("structures") != structures:
        raise StoreError(
            "the weights are of another course or step",
            where=path,
            expected="{} version {}, step {}".format(*expected),
            got="{} version {}, step {}".format(*got),
            next_step=AGAIN,
        )
