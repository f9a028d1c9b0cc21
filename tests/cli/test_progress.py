"""Progress: bars continue where a run stopped, time left at any pace, lines in a file."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from clbench.cli.progress import LINE_S, Progress


class Clock:
    """Seconds that pass only when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def made(*, terminal: bool) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    return Progress(console, clock), clock, out


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "lesson": SimpleNamespace(number=number), "of": 2}


def update(of: int = 10) -> dict[str, Any]:
    return {"event": "update", "phase": "train", "of": of, "loss": 0.5}


def test_a_bar_continues_where_the_step_was_stopped() -> None:
    progress, clock, _ = made(terminal=True)
    with progress:
        progress.watch(step(1))
        progress.watch({"event": "going on", "phase": "train", "updates": 6})
        for _ in range(2):
            clock.now_s += 300
            progress.watch(update())
    (task,) = progress.bars.tasks
    assert (task.completed, task.total) == (8, 10)
    assert "0:10:00 left" in task.fields["note"]  # two updates of five minutes, those of today


def test_time_left_is_known_after_two_updates_however_long_they_take() -> None:
    progress, clock, _ = made(terminal=True)
    with progress:
        progress.watch(step(1))
        progress.watch(update())
        assert "left" not in progress.bars.tasks[0].fields["note"]
        clock.now_s += 3600
        progress.watch(update())
    assert "8:00:00 left" in progress.bars.tasks[0].fields["note"]


def test_a_file_gets_a_line_now_and_then_and_the_last_one() -> None:
    progress, clock, out = made(terminal=False)
    with progress:
        progress.watch(step(2))
        for _ in range(100):
            progress.watch(update(of=100))
            clock.now_s += LINE_S / 10
    lines = [line for line in out.getvalue().splitlines() if "train" in line]
    assert lines[0] == "step 2/2: train 1/100, loss 0.500"
    assert lines[1] == "step 2/2: train 11/100, loss 0.500, 0:08:54 left"
    assert lines[-1] == "step 2/2: train 100/100, loss 0.500"
    assert len(lines) == 11


def test_cases_opened_and_examined_are_counted() -> None:
    progress, clock, out = made(terminal=False)
    with progress:
        progress.watch(step(1))
        for kind, name in (
            ("prepared", "preprocess"),
            ("opened", "open cases"),
            ("exam", "examine"),
        ):
            for done in (1, 2, 3):
                progress.watch({"event": kind, "done": done, "of": 3, "case": "a"})
                clock.now_s += LINE_S
            assert f"step 1/2: {name} 2/3, case a, 0:01:00 left" in out.getvalue()


def test_the_run_folder_and_the_log_of_each_step_are_named(tmp_path: Path) -> None:
    progress, _, out = made(terminal=False)
    one, cases = (
        SimpleNamespace(name="a", source="x", given=None),
        SimpleNamespace(train=(), test=()),
    )
    plan = SimpleNamespace(
        benchmark=SimpleNamespace(name="b", version=1, steps=(one, one), external_tests=()),
        catalog=SimpleNamespace(splits=(cases, cases), external_splits=()),
        strategy_name="s",
        weights=None,
        device="cpu",
        profile=SimpleNamespace(name="smoke"),
        settings=SimpleNamespace(seed=0),
        folder=tmp_path / "own",
        step_folder=lambda number: tmp_path / "_shared" / str(number),
    )
    progress.watch({"event": "plan", "plan": plan})
    progress.watch(step(1))
    progress.watch(step(2))
    lines = out.getvalue().splitlines()
    assert f"run folder: {tmp_path / 'own'}" in lines
    assert f"step 1/2: log {tmp_path / '_shared' / '1' / 'events.jsonl'}" in lines
    assert f"step 2/2: log {tmp_path / '_shared' / '2' / 'events.jsonl'}" in lines
