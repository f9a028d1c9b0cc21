"""Rules about a whole run: what is opened, what is saved, and that a seed means the same numbers.

The run is that of `clbench run`, on the tiny course; every file that is opened
while it goes on is heard through Python's audit events.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from clbench.errors import StoreError, TrainingError
from clbench.evaluation.scoring import ScoreContext, score_case
from clbench.reproducibility import seeded
from clbench.run.course import run_plan
from clbench.run.plan import Plan
from clbench.run.teach import StepState
from clbench.store import checkpoint, run_folder
from clbench.store.run_folder import Score
from clbench.testing.fixtures import first_difference, same
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Broken
from clbench.training.past_data import FileAccessMonitor, listening_to_opens

ROW = 10
"""Voxels in a row that are looked for in what a strategy keeps."""
MOST_ROWS = 1000
"""So many rows are looked for."""
MIN_COPIED_ROWS = 8
"""So many of them found are no coincidence."""
ALIKE = 0.999
"""Least correlation of a row with what is kept of it; rounding to a byte a voxel lowers it less."""
LEAST_CONTRAST = 0.1
"""Length of a row, its mean taken away, in a window of 0 to 1; rounding must not hide it."""
SMALL_PIECE = 1024
"""Tensors and arrays of fewer values are looked at together with the rest of their entry."""
STOPPED_AT = (3, 2)
"""Step and update, both from 1, before whose end the run is broken off; the updates before it are
saved."""


class RecordedRun:
    """One run of the tiny course, broken off and resumed, with everything it opened."""

    def __init__(self, harness: StrategyHarness) -> None:
        self.plan: Plan = harness.plan_run("run")
        self.file_access = FileAccessMonitor(self.plan.catalog)
        self.updates: list[tuple[Any, ...]] = []
        self.plan.settings = dataclasses.replace(self.plan.settings, checkpoint_s=0)
        try:
            try:
                self._run(stop_at=STOPPED_AT)
            except _Stop:
                if harness.strategy.declaration.resumes == "step":  # which begins anew
                    self.updates = [u for u in self.updates if u[0] != STOPPED_AT[0]]
                self.plan = harness.plan_run("run")
                self.file_access.catalog = self.plan.catalog
                self._run(stop_at=None)
        except TrainingError:
            if not self.file_access.unrecorded_reads:
                raise
            # stopped at a file read past the catalog; a rule says what sort of file it was

    def _run(self, *, stop_at: tuple[int, int] | None) -> None:
        with seeded(1), listening_to_opens(self.file_access):
            run_plan(self.plan, lambda event: self._watch(event, stop_at))

    def _watch(self, event: Mapping[str, Any], stop_at: tuple[int, int] | None) -> None:
        if event["event"] != "update":
            return
        of_step = sum(update[0] == event["step"] for update in self.updates)
        if (event["step"], of_step + 1) == stop_at:
            raise _Stop
        self.updates.append(_losses(event))

    def checkpoint(self, number: int) -> dict[str, Any]:
        """Model and memory after a step, as the run saved them."""
        return checkpoint.load(self.plan.folder / f"step{number}.pt")


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Breaks a run off between two updates."""


def _losses(update: Mapping[str, Any]) -> tuple[Any, ...]:
    return (update["step"], update["phase"], update["iteration"], update["terms"])


def run_of(harness: StrategyHarness) -> RecordedRun:
    """The run, made once."""
    if not hasattr(harness, "_run"):
        harness._run = RecordedRun(harness)  # type: ignore[attr-defined]
    run: RecordedRun = harness._run  # type: ignore[attr-defined]
    return run


# ----------------------------------------------------------------------------------- the rules


def _asked(harness: StrategyHarness) -> list[tuple[int, int, str]]:
    """(step, step of the case, case) of every case that extra_cases names."""
    return [
        (number, step, case)
        for number in (1, 2, 3)
        for step, case in harness.teaches(number).extra_cases(
            harness.lesson(number), harness.memory_before(number)
        )
    ]


def no_test_case_is_asked_for(harness: StrategyHarness) -> None:
    """A case once trained on tests nothing."""
    tests = harness.plan.catalog.test_cases
    for number, step, case in _asked(harness):
        if (harness.plan.catalog.source(step).name, case) in tests:
            raise Broken(
                "a test case is asked for in training",
                where=f"extra_cases, step {number}: case {case} of step {step}",
                expected="cases of step.past",
            )


def the_past_is_used_as_declared(harness: StrategyHarness) -> None:
    """Tables compare methods by what they need of the past: images, predictions, weights."""
    past = harness.strategy.declaration.past
    images = past in ("cases", "images")
    asked = [
        f"step {step} case {case}"
        for number, step, case in _asked(harness)
        if number != step or case not in harness.lesson(number).cases
    ]
    if asked and not images:
        raise Broken(
            "cases of earlier steps are asked for without being declared",
            where="extra_cases",
            expected=f"none: past = {past!r} is declared",
            got=", ".join(sorted(set(asked))),
            next_step="declare past = 'cases' (some) or 'images' (all)",
        )
    if images and not asked:
        raise Broken(
            f"past = {past!r} is declared, but no case of an earlier step is asked for",
            where="extra_cases, steps 2 and 3",
            next_step="declare what is needed: 'predictions', 'weights' or 'nothing'",
        )
    _ladder(harness)
    if not images:
        _no_stored_image(harness)


def _ladder(harness: StrategyHarness) -> None:
    """`nothing` is a fresh start; `predictions` are the old model's; `weights` is the old model."""
    lesson, strategy = harness.lesson(2), harness.strategy
    predicts = strategy.takes_teacher(lesson) or strategy.prepares(lesson)
    from_old = strategy.declaration.starts_from == "previous"
    if strategy.declaration.past == "nothing" and (predicts or from_old):
        raise Broken(
            "past = 'nothing' is declared, but the old model is used",
            where="takes_teacher or prepares" if predicts else "starts_from",
            expected="starts_from = 'scratch', no teacher, nothing prepared",
            next_step="declare past = 'weights' or 'predictions'",
        )
    if strategy.declaration.past == "predictions" and not predicts:
        raise Broken(
            "past = 'predictions' is declared, but the old model is never asked",
            where="takes_teacher and prepares, step 2",
            next_step="declare past = 'weights'",
        )
    if strategy.declaration.past == "weights" and not (predicts or from_old):
        raise Broken(
            "past = 'weights' is declared, but the old model is never used",
            where="starts_from, takes_teacher and prepares, step 2",
            next_step="declare past = 'nothing'",
        )


def _pieces(value: Any) -> Iterator[Tensor]:
    """The numbers in a value, flat and in order: tensors, arrays, text, and numbers one by one."""
    if isinstance(value, Tensor):
        yield from _in_tensor(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        yield from _in_tensor(torch.from_numpy(np.array(value, order="C")))
    elif isinstance(value, int | float | np.number):
        yield torch.tensor([float(value)])
    elif isinstance(value, str | bytes | bytearray):
        yield from _in_text(value)
    elif isinstance(value, list | tuple) and all(type(v) is float for v in value):
        yield torch.tensor(value)
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _pieces(item)


def _in_text(value: str | bytes | bytearray) -> Iterator[Tensor]:
    """The numbers that long text, base64, hexadecimal digits or bytes may stand for."""
    if len(value) < SMALL_PIECE:
        return
    raw = value.encode(errors="replace") if isinstance(value, str) else bytes(value)
    readings = [raw]
    for decode in (base64.b64decode, binascii.unhexlify):
        with contextlib.suppress(ValueError):
            readings.append(decode(raw))
    for reading in readings:
        yield from _in_bytes(reading)


def _in_tensor(value: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor, flat; of complex ones both parts; of whole ones what they encode."""
    value = value.detach().cpu()
    for part in (value.real, value.imag) if value.is_complex() else (value,):
        yield part.float().flatten()
    if value.numel() >= SMALL_PIECE and not (value.is_complex() or value.is_floating_point()):
        yield from _in_bytes(value.contiguous().view(torch.uint8).numpy().tobytes())


def _in_bytes(raw: bytes) -> Iterator[Tensor]:
    """The numbers that bytes may stand for."""
    for kind in ("<f4", "<f2", "<f8", "u1", "<i2"):
        whole = len(raw) // np.dtype(kind).itemsize * np.dtype(kind).itemsize
        with np.errstate(all="ignore"):
            yield torch.from_numpy(np.frombuffer(raw[:whole], kind).astype(np.float32))


def _held(state: StepState) -> Iterator[tuple[str, Tensor]]:
    """(where, numbers) of all that a step leaves behind, weights included.

    What is large stands alone; small pieces of one entry of the memory are looked at together, for
    an image may be kept as rows or as single numbers.
    """
    for key, value in state.memory.items():
        small: list[Tensor] = []
        for piece in _pieces(value):
            if piece.numel() < SMALL_PIECE:
                small.append(piece)
            else:
                yield f"memory[{key!r}]", piece
        if small:
            yield f"memory[{key!r}]", torch.cat(small)
    for name, held in state.model.state_dict().items():
        if isinstance(held, Tensor) and held.numel() >= ROW:
            yield from ((f"the model's {name}", numbers) for numbers in _in_tensor(held))


def _no_stored_image(harness: StrategyHarness) -> None:
    """No training image in memory or in the model, as it is or shifted, scaled or rounded."""
    volumes = harness.material(harness.start(1)).volumes.values()
    rows = _rough_rows([volume.image for volume in volumes])
    for number in (1, 2):
        for where, numbers in _held(harness.end(number)):
            copied = max(_copied(rows, numbers), _copied(rows, numbers.flip(0)))
            if copied >= MIN_COPIED_ROWS:
                raise Broken(
                    "a training image is kept",
                    where=f"after step {number}: {where}",
                    expected=f"no image: past = {harness.strategy.declaration.past!r} is declared",
                    got=f"{copied} rows of {ROW} voxels of a case of step 1, of {len(rows)} "
                    "looked for",
                    next_step="declare past = 'cases', and ask for cases through extra_cases",
                )


def _rough_rows(images: Iterable[NDArray[Any]]) -> Tensor:
    """Rows of neighbouring voxels along every axis, each of mean 0 and length 1: (n, ROW).

    Only rows that no cubic comes near: a ramp or a plateau stands in many a table that holds no
    image.
    """
    rows = torch.cat(
        [
            torch.from_numpy(np.array(image)).double().unfold(axis, ROW, 1).reshape(-1, ROW)
            for image in images
            for axis in range(3)
            if image.shape[axis] >= ROW
        ]
    )
    x = torch.linspace(-1, 1, ROW, dtype=torch.float64)
    smooth, _ = torch.linalg.qr(torch.stack([x**k for k in range(4)], dim=1))
    rows = rows - rows.mean(1, keepdim=True)
    size = rows.norm(dim=1)
    rest = (rows - rows @ smooth @ smooth.T).norm(dim=1)
    rough = rows[(size > LEAST_CONTRAST) & (rest > 0.4 * size)]
    rough = rough[:: max(1, len(rough) // MOST_ROWS)]
    return functional.normalize(rough, dim=1).float()


def _copied(rows: Tensor, numbers: Tensor) -> int:
    """How many of the rows stand among the numbers, whatever was added to them or they times.

    Args:
        rows: (n, ROW), see `_rough_rows`.
        numbers: flat.
    """
    found = torch.zeros(len(rows), dtype=torch.bool)
    runs = numbers.unfold(0, ROW, 1) if len(numbers) >= ROW else rows[:0]
    for part in torch.split(runs, 2048):  # its product with the rows fits into a cache
        part = functional.normalize(part - part.mean(1, keepdim=True), dim=1, eps=1e-18)
        part = part.nan_to_num()  # one NaN would hide what stands far from it
        found |= (part @ rows.T).abs().amax(0) > ALIKE if len(part) else False
    return int(found.sum())


def no_test_case_is_read(harness: StrategyHarness) -> None:
    """The ledger shows what went through the catalog; a file opened beside it would be in none."""
    tests = harness.plan.catalog.test_cases
    for step, source, case in run_of(harness).file_access.unrecorded_reads:
        if (source, case) in tests:
            raise Broken(
                "a test case was opened past the catalog",
                where=f"step {step}: {source} case {case}",
                expected="the examination alone opens test cases",
                next_step="use the volume a hook is given, and nothing beside it",
            )


def past_data_is_read_through_the_catalog(harness: StrategyHarness) -> None:
    """A method that reads old images beside the ledger beats those that keep to the rules."""
    course, tests = run_of(harness), harness.plan.catalog.test_cases
    for step, source, case in course.file_access.unrecorded_reads:
        own = course.plan.catalog.source(step).name, course.plan.catalog.splits[step - 1].train
        if (source != own[0] or case not in own[1]) and (source, case) not in tests:
            raise Broken(
                "a file of another step was opened past the catalog",
                where=f"step {step}: {source} case {case}",
                expected="this step's training cases only",
                next_step="ask for past cases through extra_cases, and declare them",
            )


def memory_can_be_saved(harness: StrategyHarness) -> None:
    """Memory is all that a resumed run has: tensors, numbers, text, and lists and dicts of them."""
    for number in (1, 2, 3):
        memory = harness.memory_after(number)
        path = harness.folder / "memory" / f"{number}.pt"
        try:
            checkpoint.save(path, {"memory": memory})
        except TypeError as err:
            raise Broken(
                "memory holds something a checkpoint cannot hold",
                where=f"after step {number}: {err}",
                expected="tensors, numbers, text, lists and dicts",
            ) from err
        if not same(checkpoint.load(path)["memory"], memory):
            raise Broken("memory comes back from a checkpoint as something else", where=str(path))


def saved_and_loaded_it_scores_the_same(harness: StrategyHarness) -> None:
    """What is scored must be what is saved, or no later step and no reader can have it."""
    for number in (1, 2, 3):
        state = harness.end(number)
        path = harness.folder / "saved" / f"{number}.pt"
        checkpoint.save(path, {"model": state.model.state_dict(), "memory": state.memory})
        try:
            content = checkpoint.load(path)
        except StoreError as err:
            raise Broken("a checkpoint cannot be read again", where=err.what) from err
        loaded = state.copy()
        loaded.model = harness.blank(number)
        loaded.model.load_state_dict(content["model"])
        loaded.memory = content["memory"]
        one, two = _scores(harness, state), _scores(harness, loaded)
        if not same([repr(r) for r in one[0]], [repr(r) for r in two[0]]) or not same(
            one[1], two[1]
        ):
            raise Broken(
                "a model that was saved and loaded is scored differently",
                where=f"after step {number}",
                expected="equal bits: all that counts stands in the state dict or in memory",
                next_step="register what the model needs as parameters or buffers",
            )


def _scores(harness: StrategyHarness, state: StepState) -> tuple[list[Score], Tensor]:
    """Every score on the step's test case, and the probabilities behind them."""
    number, catalog = state.lesson.number, harness.plan.catalog
    model = state.strategy.serve(state.model, copy.deepcopy(state.memory))
    server = harness.predictor(state, model, state.lesson.structures)
    volume = catalog.open(number, catalog.splits[number - 1].test[0], "test")
    context = ScoreContext(
        benchmark=harness.plan.benchmark,
        strategy=harness.plan.strategy_name,  # as the run's rows have it, to be compared with them
        seed=0,
        step=number,
    )
    rows = score_case(server.predict(volume), state.lesson.structures, volume, context)
    slabs = [p for _, _, p in server.probabilities(volume)]
    return rows, torch.cat(slabs, dim=1)


def the_same_seed_gives_the_same_numbers(harness: StrategyHarness) -> None:
    """Taught twice, the second time broken off and resumed: equal losses, scores and weights."""
    run = run_of(harness)
    steps = (1, 2, 3)
    taught = [_losses(e) for n in steps for e in harness.events[n] if e["event"] == "update"]
    for a, b in zip(taught, run.updates, strict=False):
        if a != b:
            raise Broken(
                "two runs of one seed have different losses",
                where=f"step {a[0]}, phase {a[1]}, iteration {a[2]}",
                expected=json.dumps(a[3]),
                got=json.dumps(b[3]),
                next_step="something random is not seeded: dropout, numpy, the order of a set",
            )
    scores = run_folder.read_scores(run.plan.folder / "scores.csv")
    for number in steps:
        state, saved = harness.end(number), run.checkpoint(number)
        ends = [{"model": dict(state.model.state_dict()), "memory": state.memory},
                {"model": dict(saved["model"]), "memory": saved["memory"]}]  # fmt: skip
        if not same(*ends):
            what = first_difference(ends[0]["model"], ends[1]["model"])
            raise Broken(
                "two runs of one seed end with different weights or memory",
                where=f"step {number}: {what}",
            )
        rows, _ = _scores(harness, state)
        examined = {(r.step, r.eval_set, r.case) for r in rows}
        again = [r for r in scores if (r.step, r.eval_set, r.case) in examined]
        if sorted(map(repr, rows)) != sorted(map(repr, again)):  # NaN equals itself as text
            raise Broken(
                "two runs of one seed have different scores",
                where=f"step {number}, scores.csv",
            )
