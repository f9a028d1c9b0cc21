"""What the runs cost, step by step: parameters, operations, time, memory, bytes kept.

Reads what was recorded; counts nothing itself.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.report.scores import Run, on_phantom
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, Table, long_table, number

if TYPE_CHECKING:
    from clbench.evaluation.cost.course import Costs, Size
    from clbench.evaluation.cost.paper_figures import Printed

Cost = Mapping[str, float]
"""Name of a quantity → value; the names are those of `cost.csv` and `run.json`."""
MACS = "forward, 10⁹ MACs"
COLUMNS = (
    ("parameters", "parameters, 10⁶", 1e6, 2),
    ("trainable_parameters", "trained, 10⁶", 1e6, 2),
    ("nonzero_parameters", "not zero, 10⁶", 1e6, 2),
    ("forward_macs", MACS, 1e9, 2),
    ("train_s", "training, min", 60.0, 1),
    ("prepare_s", "preparing, min", 60.0, 1),
    ("predict_case_s", "inference, s per case", 1.0, 1),
    ("examine_s", "examination, min", 60.0, 1),
    ("peak_rss_bytes", "training, peak RSS, GB", 1e9, 2),
    ("peak_cuda_bytes", "training, peak GPU, GB", 1e9, 2),
    ("examine_peak_rss_bytes", "examination, peak RSS, GB", 1e9, 2),
    ("examine_peak_cuda_bytes", "examination, peak GPU, GB", 1e9, 2),
    ("teacher_bytes", "old model, MB", 1e6, 1),
    ("pseudo_bytes", "pseudo labels, MB", 1e6, 1),
    ("checkpoint_bytes", "checkpoint, MB", 1e6, 1),
)
"""Quantity, header, unit, digits."""


def read_costs(run: Run) -> dict[int, Cost]:
    """Step → cost: `run.json`, with what `cost.csv` of the run says on top.

    Raises:
        StoreError: `cost.csv` has no column `step`, or a value of a known quantity is no number.
    """
    costs: dict[int, dict[str, float]] = {}
    for step, recorded in run.record.cost.items():
        flat = {**recorded, **recorded.get("train", {})}
        costs[int(step)] = {k: float(v) for k, v in flat.items() if isinstance(v, int | float)}
    path = run.folder / "cost.csv"
    if not path.exists():
        return dict(costs)
    known = {name for name, *_ in COLUMNS}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {k: float(v) for k, v in row.items() if k in known and v}
                costs.setdefault(int(row["step"]), {}).update(values)
    except (KeyError, ValueError, TypeError, OSError) as err:
        raise StoreError(
            "the costs of a run cannot be read",
            where=path,
            expected="a column step, one row per step, numbers in "
            + ", ".join(name for name, *_ in COLUMNS),
            got=err,
            next_step="write it anew: `clbench cost RUN`",
        ) from err
    return dict(costs)


def cost_table(study: Study) -> Table:
    """One row per strategy and step; means over seeds.

    Raises:
        StoreError: the runs do not belong in one table, or a cost cannot be read.
    """
    scores = study.scores(scoring="strict")
    strategies = scores.strategies if scores else ()
    rows, shown, long = [], set(), []
    for s in strategies:
        costs = [read_costs(run) for run in s.runs]
        for step in range(1, len(s.runs[0].record.course.steps) + 1):
            texts = {}
            for name, header, unit, digits in COLUMNS:
                value = continual.mean(c.get(step, {}).get(name, math.nan) for c in costs)
                texts[header] = number(value / unit, digits)
                long += [
                    (s.label, step, seed, name, c.get(step, {}).get(name, math.nan))
                    for seed, c in zip(s.seeds, costs, strict=True)
                ]
            shown |= {header for header, text in texts.items() if text != EMPTY}
            rows.append(((s.label, str(step), str(len(s.runs))), texts))
    devices = sorted({r.device for s in strategies for r in s.records})
    notes = [
        "means over seeds; a step that strategies share was trained once and is entered in each",
        "MACs: multiply-adds of one forward patch, counted once each; not zero: what pruning left",
        "inference: sliding window and clean-up, median of test cases; examination: all of it",
        "peak RSS: resident memory of the process; peak GPU: memory torch allocated",
        "old model, pseudo labels: what training keeps of the past; checkpoint: weights and memory",
        f"on: {', '.join(devices)}" if devices else "no finished run",
    ]
    if len(devices) > 1:
        notes.append("times from different devices are not comparable")
    notes += dict.fromkeys(
        f"operations not counted, {s.label}: {r.uncounted.splitlines()[0]}"
        for s in strategies
        for r in s.records
        if r.uncounted
    )
    if rows and MACS not in shown:
        notes.append("operations are not recorded: clbench cost RUN counts them without training")
    # a device without a GPU has no column for it
    heads = [header for _, header, *_ in COLUMNS if "GPU" not in header or header in shown]
    return Table(
        title=f"{study.bench}: cost per step" + on_phantom(scores),
        columns=("strategy", "step", "seeds", *heads),
        rows=tuple((*keys, *(texts[header] for header in heads)) for keys, texts in rows),
        keys=3,
        narrow=6,
        block=9,
        notes=(*notes, *(scores.notes() if scores else ())),
        long=long_table("strategy step seed measure value", long),
    )


# --------------------------------------------------------------------------------------------------
# Costs that were counted before any training, as tables: per step, growth, the paper's figures.
# Counting is done elsewhere; here it is set in type.


CONVENTION = (
    "MACs: multiply-adds of one forward pass of one patch, counted once each, in convolutions "
    "(transposed ones at input resolution), matrix products and attention; normalization, "
    "activation and elementwise arithmetic count zero"
)
AS_BUILT = (
    "as built; trained: in the first phase of the step; not zero, from the fewest if pruning goes "
    "as far as it may: how far it goes, the cost of a run says; old model: kept because the step "
    "asks for its answers"
)
LONG = (
    "step", "structures", "parameters", "trainable_parameters", "nonzero_parameters",
    "fewest_nonzero_parameters",
)  # fmt: skip


def step_table(costs: Costs) -> Table:
    """One row per step, at full precision in CSV."""
    parts = tuple(costs.steps[0].macs)
    shown = [p for p in parts if any(s.macs[p] for s in costs.steps) or p != "other"]
    title = (
        f"{costs.bench} v{costs.bench_version}, {costs.strategy}: cost per step, counted without "
        f"training (profile {costs.profile}, {costs.backbone}, patch "
        + " x ".join(map(str, costs.patch_vox)) + ")"
    )  # fmt: skip
    return Table(
        title=title,
        columns=(
            "step", "structures", "parameters, 10⁶", "trained, 10⁶", "not zero, 10⁶",
            "forward, 10⁹ MACs", *(f"{p}, 10⁹" for p in shown), "old model, MB",
        ),
        rows=tuple(
            (
                str(s.step), str(s.structures), _millions(s.parameters),
                _millions(s.trainable_parameters),
                _from(s.fewest_nonzero_parameters, s.nonzero_parameters),
                _billions(s.forward_macs), *(_billions(s.macs[p]) for p in shown),
                f"{s.teacher_bytes / 1e6:.1f}",
            )
            for s in costs.steps
        ),
        notes=(
            CONVENTION,
            AS_BUILT,
        ),
        keys=2,
        long=long_table(
            " ".join([*LONG, "forward_macs", *(f"{p}_macs" for p in parts), "teacher_bytes"]),
            (
                (*(getattr(s, name) for name in LONG), s.forward_macs, *s.macs.values(),
                 s.teacher_bytes)
                for s in costs.steps
            ),
        ),
    )  # fmt: skip


def growth_table(costs: Costs) -> Table:
    """What one more structure and one more step cost, and where that leads."""
    sizes: list[tuple[str, Size]] = []
    if (g := costs.growth) is not None:
        to = f"{g.target} structures"
        sizes = [
            ("one more structure", g.per_class),
            ("one more step, beside its structures", g.per_step),
            (f"{to}, all further ones in one step", g.one_step),
            (f"{to}, each further one in a step of its own", g.step_each),
        ]
    measured = (
        "growth: differences between models grown by one and two more structures, in one step and "
        "in two; carried on to more structures because these lie on a line"
    )
    title = f"{costs.bench}, {costs.strategy}: growth"
    prunes = any(s.fewest_parameters != s.parameters for _, s in sizes)
    return Table(
        title=title,
        columns=(
            "what", "parameters", *(("left by pruning, at the least",) if prunes else ()),
            "10⁹ MACs", "GFLOPs (2 per MAC)",
        ),
        rows=tuple(
            (
                what, f"{s.parameters:,}", *((f"{s.fewest_parameters:,}",) if prunes else ()),
                f"{s.forward_macs / 1e9:,.4f}",
                f"{2 * s.forward_macs / 1e9:,.4f}",
            )
            for what, s in sizes
        ),
        notes=costs.notes or (measured,),
        long=long_table(
            "what parameters fewest_parameters forward_macs",
            ((what, s.parameters, s.fewest_parameters, s.forward_macs) for what, s in sizes),
        ),
    )  # fmt: skip


def printed_table(p: Printed) -> Table:
    """The paper's 466.08 and 9.44e-4 GFLOPs beside the count."""
    per_structure = 2 * p.generator_macs / 1e9 + p.apply_gflops
    decoder = (
        f"466.08 is twice what one counter (ptflops 0.6.9) shows for the decoder, "
        f"{p.ptflops_compat / 1e9:.2f} GMac: it takes transposed convolutions at the resolution of "
        "their output, eight times too many, and one operation per element of normalization and "
        "activation; the authors name no counter, the number fits exactly"
    )
    head = (
        f"9.44e-4 is twice the multiply-adds and biases of the network that makes one head "
        f"({p.generator_macs:,} + {p.generator_biases}); the head still has to be applied"
    )
    ratio = (
        f"so a new structure costs {per_structure:.4f} GFLOPs and a new decoder "
        f"{p.decoder_gflops:.2f}: a ratio of {p.decoder_gflops / per_structure:,.0f}, where the "
        f"printed figures give {p.printed_decoder_gflops / p.printed_head_gflops:,.0f}; neither "
        "says what pruning a decoder saves; of Ji et al. the paper reports cost alone, no Dice"
    )
    return Table(
        title="the paper's two figures, counted anew (Swin UNETR 48, one patch of 96 x 96 x 96)",
        columns=("what", "printed, GFLOPs", "rebuilt, GFLOPs", "count, GFLOPs (2 per MAC)"),
        rows=(
            (
                "a decoder, as Ji et al. add per step", "466.08",
                f"{p.printed_decoder_gflops:.2f}", f"{p.decoder_gflops:.2f}",
            ),
            (
                "generating a structure's head", "9.44e-4",
                _small(p.printed_head_gflops), _small(2 * p.generator_macs / 1e9),
            ),
            ("applying that head to every voxel", "not counted", EMPTY, f"{p.apply_gflops:.4f}"),
        ),
        notes=(decoder, head, ratio),
    )  # fmt: skip


def _small(gflops: float) -> str:
    return f"{gflops:.2e}".replace("e-0", "e-")


def _millions(n: int) -> str:
    return f"{n / 1e6:.3f}"


def _from(fewest: int, most: int) -> str:
    """One number, or two where pruning decides."""
    return _millions(most) if fewest == most else f"{_millions(fewest)} to {_millions(most)}"


def _billions(n: int) -> str:
    return f"{n / 1e9:.4f}"
