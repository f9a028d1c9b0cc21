"""The model card (README.md) of an exported model, and its `metadata.json` in MONAI's schema.

Every number is read from the run's record and scores; what only people know (licence, authors,
intended use) is a field to fill in, marked `FILL IN`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.deployment.masks import nested
from clbench.evaluation.metrics import continual
from clbench.report.past_images import past_card
from clbench.report.scores import (
    PHANTOM,
    Run,
    Scores,
    StrategyScores,
    on_phantom,
    read_frame,
    scores_of,
)
from clbench.report.tables.render import EMPTY, Table, number, render, signed
from clbench.report.template import filled
from clbench.spec.benchmark import Benchmark, Preprocessing
from clbench.spec.taxonomy import structure
from clbench.statistics.intervals import Interval
from clbench.statistics.macro_estimate import macro_interval
from clbench.store.record import RunRecord

FILL_IN = "FILL IN"
"""Stands where only the people who publish the model know."""
VERSION = "0.1.0"
"""Of the exported model, to be raised by hand where it is published again."""
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
"""The JSON schema that `python -m monai.bundle verify_metadata` checks `metadata.json` by."""
SCORING = "strict"
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a card is made from."""

    folder: Path
    """The run."""
    record: RunRecord
    """Its `run.json`."""
    benchmark: Benchmark
    """Its course."""
    preprocessing: Preprocessing
    """Grid, window and patch of the model."""
    step: int
    """1-based step after which the model is taken."""
    structures: tuple[str, ...]
    """Its output channels."""
    memory: dict[str, Any]
    """What the strategy remembers beside the weights; exported with them."""
    parameters: int
    """Numbers in the weights."""

    @property
    def title(self) -> str:
        """Course, strategy and step."""
        return f"{self.record.identity.bench}, {self.record.strategy}, step {self.step}"


def scores_of_run(about: Described) -> Scores:
    """Dice of the run."""
    run = Run(folder=about.folder, record=about.record)
    return scores_of(read_frame([run]), [run], scoring=SCORING)


def _mean(strategy: StrategyScores, at: Mapping[str, int]) -> Interval | None:
    """Mean Dice of some structures, each after its step; None: a hole."""
    table = strategy.table(at)
    return macro_interval(table, level=LEVEL, bounds=(0.0, 1.0)) if table else None


def _change(strategy: StrategyScores, own: Mapping[str, int], step: int) -> Interval | None:
    """Mean over structures of the Dice after `step` minus that after the own step, by patient."""
    before, after = strategy.table(own), strategy.table(dict.fromkeys(own, step))
    if not before or not after:
        return None
    return macro_interval({s: after[s] - before[s] for s in after}, level=LEVEL)


# ----------------------------------------------------------------------------------- the model card


def model_card(about: Described) -> str:
    """README.md: data, steps, strategy, scores with intervals, forgetting, fields to fill in."""
    scores, record = scores_of_run(about), about.record
    taught_from = dict.fromkeys(s.source for s in record.course.steps[: about.step])
    card = filled(
        "clbench.deployment.publish",
        "model_card.md.j2",
        about=about,
        record=record,
        phantom=PHANTOM,
        fill_in=FILL_IN,
        structures=_structures_table(about),
        steps=_steps_table(about),
        how=_how_table(about),
        scores=_scores_table(about, scores),
        forgotten=_forgotten(about, scores),
        run=shlex.quote(f"results/{record.identity.bench}/{record.strategy}/{record.run_id}"),
        sources=[about.benchmark.source(name) for name in taught_from],
    )
    return card + "\n"


def _structures_table(about: Described) -> str:
    steps = about.record.course.steps
    table = Table(
        title="Output channels",
        columns=("channel", "structure", "kind", "taught in step", "data set"),
        rows=tuple(
            (str(k), name, structure(name).kind, str(at), steps[at - 1].source)
            for k, name in enumerate(about.structures)
            for at in [about.benchmark.learned_at(name)]
        ),
        keys=5,
        notes=("every channel is a mask of its own: structures may lie inside each other",)
        if nested(about.structures)
        else (),
    )
    return render(table, "md")


def _steps_table(about: Described) -> str:
    record, course = about.record, about.record.course
    splits = record.identity.splits
    return render(
        Table(
            title=f"Steps ({'patients' if record.patients else PHANTOM})",
            columns=("step", "name", "data set", "training", "validation", "test", "teaches"),
            rows=tuple(
                (
                    f"{i}" if i <= about.step else f"{i} (not in this model)",
                    step.name,
                    step.source,
                    str(len(course.train[i - 1])),
                    str(len(splits[i - 1].get("validation", ()))),
                    str(len(course.test[i - 1])),
                    ", ".join(step.learns),
                )
                for i, step in enumerate(course.steps, 1)
            ),
            keys=3,
        ),
        "md",
    )


def _how_table(about: Described) -> str:
    record, pre = about.record, about.preprocessing
    options = {k: v for k, v in record.strategy_options.items() if k != "version"}
    facts = [
        ("past images opened", past_card(record)),
        ("strategy's options", json.dumps(options, sort_keys=True)),
        ("profile", f"{record.identity.profile['name']}, seed {record.seed}"),
        ("weights", f"{about.parameters:,} numbers"),
        ("grid", f"{' x '.join(f'{v:g}' for v in pre.spacing_mm)} mm"),
        ("window", f"{pre.window_hu[0]:g} to {pre.window_hu[1]:g} HU"),
        ("patch", f"{' x '.join(map(str, pre.patch_vox))} voxels"),
        ("text encoding", str(record.text_encoding.get("encoding", "not recorded"))),
        ("backbone weights from a file", _backbone(record)),
        ("data fingerprint", record.data_fingerprint),
        ("hardware", record.device),
        ("versions", ", ".join(f"{k} {v}" for k, v in sorted(record.versions.items()))),
        ("what the strategy remembers", _memory(about)),
        ("starts from", _origin(record)),
    ]
    return render(Table(title="How", columns=("what", "value"), rows=tuple(facts), keys=2), "md")


def _origin(record: RunRecord) -> str:
    """What a run that extends another model says of it."""
    if not record.extends:
        return "initial weights"
    known = {k: v for k, v in record.extends.items() if k != "run"}
    return "another model: " + ", ".join(f"{k} {v}" for k, v in sorted(known.items()))


def _backbone(record: RunRecord) -> str:
    if not (loaded := record.backbone_weights):
        return "none"
    said = loaded.get("trained_on") or "training data not declared"
    overlap = loaded.get("overlap")
    return f"{len(loaded['loaded'])} tensors; {said}" + (
        f"; NAMES DATA OF THIS COURSE: {', '.join(overlap)}" if overlap else ""
    )


def _memory(about: Described) -> str:
    if not about.memory:
        return "nothing beside the weights"
    names = sorted(dict.fromkeys(str(k).partition("/")[0] for k in about.memory))
    return f"{len(about.memory)} entries ({', '.join(names)}), exported with the weights"


def _interval(mean: Interval | None, form: Callable[[float], str] = number) -> str:
    if mean is None:
        return EMPTY
    if math.isnan(mean.low):
        return form(mean.estimate)
    return f"{form(mean.estimate)} [{form(mean.low)}, {form(mean.high)}]"


def _scores_table(about: Described, scores: Scores) -> str:
    (strategy,) = scores.strategies
    whole = _mean(strategy, dict.fromkeys(about.structures, about.step))
    rows, flags, holes = [], dict[str, None](), False
    for name in about.structures:
        own = _mean(strategy, {name: scores.learned_at[name]})
        end = _mean(strategy, {name: about.step})
        cells = strategy.cells.get((about.step, strategy.home[name], name))
        patients = EMPTY if end is None else str(end.n)
        missed = EMPTY if cells is None else str(int(cells.missed[0]))
        rows.append((name, _interval(own), _interval(end), patients, missed))
        flags |= dict.fromkeys(() if end is None else end.flags)
        holes |= own is None or end is None
    return render(
        Table(
            title=f"Dice{on_phantom(scores)}, {SCORING} scoring",
            columns=(
                "structure",
                "after its own step",
                f"after step {about.step}",
                "patients",
                "missed",
            ),
            rows=(
                *rows,
                (f"mean of {len(rows)}", EMPTY, _interval(whole), EMPTY, EMPTY),
            ),
            notes=(
                f"[{LEVEL:.0%} interval] over test patients of the structure's own data set (t)",
                "missed: cases that hold it, nothing found",
                *(["–: no mean, for no test case was scored, or not every one"] * holes),
                *(f"intervals: {flag}" for flag in flags),
            ),
        ),
        "md",
    )


def _forgotten(about: Described, scores: Scores) -> str:
    taught = {name: scores.learned_at[name] for name in about.structures}
    old = {name: step for name, step in taught.items() if step < about.step}
    if not old:
        return "Nothing can be: this is the model after the step that taught all its structures."
    (strategy,) = scores.strategies
    (r,) = strategy.r
    gone = continual.forgetting(r, old, about.step)
    # NaN last: it is neither above nor below a number, and would leave the others unsorted
    worst = sorted(old, key=lambda name: (math.isnan(gone[name]), -gone[name]))
    rows = [(name, _change(strategy, {name: old[name]}, about.step), gone[name]) for name in worst]
    rows.append(
        (f"mean of {len(old)}", _change(strategy, old, about.step), continual.mean(gone.values()))
    )
    table = Table(
        title=f"Old structures{on_phantom(scores)}, most forgotten first",
        columns=("structure", "change of Dice since its own step", "forgetting"),
        rows=tuple((name, _interval(change, signed), number(lost)) for name, change, lost in rows),
        notes=(
            f"change: step {about.step} minus own step, patient by patient, [{LEVEL:.0%} interval]",
            "forgetting: best earlier step minus this one (Chaudhry et al. 2018)",
        ),
    )
    return render(table, "md")


# ---------------------------------------------------------------------------- MONAI's metadata.json


def monai_metadata(about: Described) -> dict[str, Any]:
    """`metadata.json` as a MONAI bundle has it.

    Source: the MONAI Bundle Specification, section "metadata.json File".
    """
    record, pre = about.record, about.preprocessing
    (strategy,) = scores_of_run(about).strategies
    mean = _mean(strategy, dict.fromkeys(about.structures, about.step))
    phantom = "" if record.patients else f"{PHANTOM}. "
    name = "mean_dice" if record.patients else "mean_dice_phantom"
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"run {record.run_id}, model after step {about.step}"},
        "monai_version": _release(record, "monai"),
        "pytorch_version": _release(record, "torch"),
        "numpy_version": _release(record, "numpy"),
        "required_packages_version": {
            "clbench": _release(record, "clbench"),
            "nibabel": _release(record, "nibabel"),
            "scipy": _release(record, "scipy"),
        },
        "name": about.title,
        "task": f"{phantom}Segmentation of {len(about.structures)} structures in CT",
        "description": f"{phantom}Taught by continual learning in {about.step} step(s) with "
        f"{record.strategy}; see README.md",
        "authors": FILL_IN,
        "copyright": FILL_IN,
        "intended_use": f"Research. {FILL_IN}",
        "data_source": ", ".join(
            dict.fromkeys(s.source for s in record.course.steps[: about.step])
        ),
        "data_type": "NIfTI" if record.patients else "synthetic CT",
        "eval_metrics": {} if mean is None else {name: mean.estimate},
        "spacing_mm": list(pre.spacing_mm),
        "network_data_format": _network_data_format(about),
    }


def _network_data_format(about: Described) -> dict[str, Any]:
    """What goes into the network and comes out: CT crops, a probability per structure."""
    pre = about.preprocessing

    def tensor(format_: str, modality: str, channels: Sequence[str]) -> dict[str, Any]:
        return {
            "type": "image",
            "format": format_,
            "modality": modality,
            "num_channels": len(channels),
            "spatial_shape": list(pre.patch_vox),
            "dtype": "float32",
            "value_range": [0, 1],
            "is_patch_data": True,
            "channel_def": {str(k): name for k, name in enumerate(channels)},
        }

    window = f"CT, {pre.window_hu[0]:g} to {pre.window_hu[1]:g} HU mapped to 0 to 1"
    return {
        "inputs": {"image": tensor("hounsfield", "CT", [window])},
        "outputs": {"pred": tensor("classes", "n/a", about.structures)},
    }


def _release(record: RunRecord, package: str) -> str:
    """A package's version without its build (`2.13.0`, not `2.13.0+cpu`)."""
    return str(record.versions.get(package, "unknown")).partition("+")[0]
