"""How good pseudo labels were, held against the phantom's truth; for readers, never for training.

A method that learns from predictions of the previous model, on images whose old structures nobody
annotated, can be no better than these predictions. On patients nobody knows how good they are. On
the phantom every organ of every case is known, also where the source does not annotate it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clbench import signals
from clbench.data.catalog import Catalog
from clbench.data.labels import PSEUDO_SCALE, UNKNOWN
from clbench.data.layouts import find_cases
from clbench.data.phantom.generate import make_phantom, with_all_organs
from clbench.data.volume import Volume
from clbench.deployment.predict import predict_volume
from clbench.deployment.trained import TrainedModel, load_trained
from clbench.errors import StoreError
from clbench.evaluation.metrics.continual import mean
from clbench.evaluation.scoring import context_of, score_case
from clbench.report.tables.render import EMPTY, Table, long_table, number, signed
from clbench.run.record import catalog_of, phantom_of, strategy_of
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.strategy.contract import Strategy
from clbench.training.resume import Watch
from clbench.types import Bits, bits_dtype

COLUMNS = "step structure case dice"
"""Of the CSV."""
NOTES = (
    (
        "Dice (strict) of the model after the step before. own test cases: of the source that "
        "taught the structure, as recorded. pseudo labels: on the training cases of the step, for "
        "all old structures; the phantom knows those too that nobody annotated there."
    ),
    (
        "Where the method makes no pseudo labels, the old model's prediction stands for them. A "
        "diagnosis after the run: no training saw this truth."
    ),
)
"""What the numbers are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoLabelRow:
    """An old structure in one training case of a later step."""

    step: int
    """1-based step that trains on the case."""
    structure: str
    """Learned in an earlier step."""
    source: str
    """Of the case."""
    case: str
    """A training case of the step."""
    dice: float
    """Strict Dice of the pseudo label, on the grid of the file; NaN where the body has none."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelQuality:
    """What the pseudo labels of a run were worth."""

    record: RunRecord
    """`run.json` of the run."""
    rows: tuple[PseudoLabelRow, ...]
    """One per step, case and old structure."""
    on_own_cases: dict[tuple[int, str], float]
    """(step, structure) → mean Dice that the same model scored on the test cases of the
    structure's own source, as the run recorded it."""

    def table(self) -> Table:
        """Per step and structure: on its own source, on the new cases, and the difference."""
        keys = list(dict.fromkeys((row.step, row.structure) for row in self.rows))
        lines: list[tuple[str, ...]] = []
        rules: set[int] = set()
        means: list[tuple[float, float]] = []
        for at, (step, structure) in enumerate(keys):
            dice = [r.dice for r in self.rows if (r.step, r.structure) == (step, structure)]
            held = [value for value in dice if not math.isnan(value)]
            own, new = self.on_own_cases.get((step, structure), math.nan), mean(held)
            means.append((own, new))
            lines.append(
                (
                    str(step),
                    structure,
                    number(own),
                    number(new),
                    EMPTY if math.isnan(own - new) else signed(new - own),
                    number(min(held, default=math.nan)),
                    f"{sum(value == 0 for value in held)} of {len(held)}",
                )
            )
            if at + 1 == len(keys) or keys[at + 1][0] != step:
                known = [pair for pair in means if not math.isnan(pair[0] - pair[1])]
                own, new = mean(a for a, _ in known), mean(b for _, b in known)
                change = EMPTY if math.isnan(new - own) else signed(new - own)
                lines.append((str(step), "mean", number(own), number(new), change, "", ""))
                rules.add(len(lines))
                means = []
        run = f"{self.record.identity.bench}, {self.record.strategy}, seed {self.record.seed}"
        return Table(
            title=f"{run}, on the PHANTOM: pseudo labels against the truth",
            columns=(
                "step",
                "old structure",
                "own test cases",
                "pseudo labels",
                "difference",
                "worst case",
                "missed whole",
            ),
            rows=tuple(lines),
            keys=2,
            rules=frozenset(rules - {len(lines)}),
            notes=NOTES,
            long=long_table(
                COLUMNS, [(r.step, r.structure, f"{r.source}/{r.case}", r.dice) for r in self.rows]
            ),
        )


def pseudo_label_quality(
    folder: Path,
    *,
    cache: Path | None = None,
    device: str = "auto",
    watch: Watch = lambda event: None,
) -> PseudoLabelQuality:
    """Make the pseudo labels of a run's later steps anew and score them against the truth.

    Args:
        folder: a run on the phantom with its checkpoints; nothing in it is changed.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.
        device: where the models compute.
        watch: told about every case.

    Raises:
        StoreError: a run on patients, of one step, or without checkpoints.
        Stopped: by a signal.
    """
    record = RunRecord.read(folder)
    _refuse_unknown_truth(folder, record)
    catalog = catalog_of(record, cache=cache)
    rows: list[PseudoLabelRow] = []
    own: dict[tuple[int, str], float] = {}
    with signals.listening():
        for number_ in range(2, len(catalog.benchmark.steps) + 1):
            if number_ - 1 > record.steps_done:
                break
            model = load_trained(folder, step=number_ - 1, device=device)
            own |= {
                (number_, name): value for name, value in _on_own_cases(folder, record, number_ - 1)
            }
            rows += _of_step(record, catalog, model, number_, watch)
    return PseudoLabelQuality(record=record, rows=tuple(rows), on_own_cases=own)


def _refuse_unknown_truth(folder: Path, record: RunRecord) -> None:
    if record.patients or record.external:
        raise StoreError(
            "nobody knows the truth that pseudo labels stand for",
            where=folder,
            expected="a run of clbench on the phantom",
            got="predictions made elsewhere" if record.external else "a run on patients",
            next_step="look at a run of the same strategy without --data",
        )
    if len(record.course.steps) < 2 or record.steps_done < 1:
        raise StoreError(
            "the run has no step that could learn from an earlier model",
            where=folder,
            expected="a course of two steps or more, the first of them finished",
            got=f"{len(record.course.steps)} steps, {record.steps_done} finished",
            next_step="repeat the run's command; it goes on where it stopped",
        )


def _of_step(
    record: RunRecord, catalog: Catalog, model: TrainedModel, number: int, watch: Watch
) -> list[PseudoLabelRow]:
    """The rows of a step's training cases."""
    source, cases = catalog.source(number), catalog.splits[number - 1].train
    complete, strategy = with_all_organs(source), strategy_of(record)
    folders = make_phantom(
        catalog.cache.root.parent / "phantom", [complete], {source.name: cases}, phantom_of(record)
    )
    files = find_cases(folders[source.name], complete)
    context = context_of(record, catalog.benchmark, number - 1)
    rows = []
    for done, case in enumerate(cases, 1):
        volume = catalog.cache.get(files[case], complete, catalog.preprocessing)
        bits = _pseudo_bits(strategy, model, number, volume)
        rows += [
            PseudoLabelRow(
                step=number,
                structure=score.structure,
                source=source.name,
                case=case,
                dice=score.value,
            )
            for score in score_case(bits, model.structures, volume, context)
            if (score.scoring, score.metric) == ("strict", "dice")
        ]
        watch({"event": "exam", "done": done, "of": len(cases), "case": case})
        signals.check(f"scoring pseudo labels of step {number}, case {case}")
    order = {name: i for i, name in enumerate(model.structures)}
    return sorted(rows, key=lambda row: order[row.structure])


def _pseudo_bits(strategy: Strategy, model: TrainedModel, number: int, volume: Volume) -> Bits:
    """(D, H, W) bit patterns over `model.structures`: as the strategy labels the case.

    A soft pseudo label counts where its probability is above one half.
    """
    lesson = model.plan.lesson(number)
    if strategy.prepares(lesson):
        shown = volume.showing(model.plan.benchmark.shown(number))
        labels = strategy.prepare_case(lesson, shown, model.server).get("pseudo")
        if labels is not None:
            dtype = bits_dtype(len(model.structures))
            bits = labels.new_zeros(volume.image.shape).numpy().astype(dtype)
            for k, channel in enumerate(labels.numpy()):
                inside = (2 * channel.astype(int) > PSEUDO_SCALE) & (channel != UNKNOWN)
                bits |= inside.astype(dtype) << dtype.type(k)
            return bits
    return predict_volume(model, volume)


def _on_own_cases(folder: Path, record: RunRecord, step: int) -> Sequence[tuple[str, float]]:
    """Structure → mean strict Dice after `step`, on the test cases of its own step's source."""
    scores = [
        row
        for row in run_folder.read_scores(folder / "scores.csv")
        if (row.step, row.scoring, row.metric) == (step, "strict", "dice")
    ]
    answer = []
    for taught in record.course.steps[:step]:
        for name in taught.learns:
            values = [
                row.value
                for row in scores
                if (row.structure, row.eval_set) == (name, taught.source)
                and not math.isnan(row.value)
            ]
            answer.append((name, mean(values)))
    return answer
