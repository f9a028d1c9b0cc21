"""Resuming a stopped step: the checkpoint between two updates, when it is saved, how it is loaded.

Crops are numbered and the random state of every update is a function of its number, so
model, optimizer, memory and the place in the step are all there is. Two files are kept, the newest
and the one before it; a damaged one is passed over.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clbench.errors import StoreError, TrainingError
from clbench.store import checkpoint
from clbench.strategy.contract import Group, Memory, Phase, PhaseResult
from clbench.training.ranks import Ranks

FORMAT = 1
"""Of `TrainingState.to_checkpoint`; raised when its content changes. 0.1.0 wrote format 1."""
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """Between two updates: all that the next one depends on, but model and memory."""

    phase: Phase
    """The phase that is being taught."""
    history: tuple[PhaseResult, ...]
    """The phases before it."""
    updates: int
    """Its updates that are done."""
    measured: tuple[float, ...]
    """Its validations so far."""
    groups: Sequence[Group]
    """What it trains, as the strategy said at its start."""
    optimizer: Mapping[str, Any]
    """State of the optimizer."""
    scaler: Mapping[str, Any]
    """State of the gradient scaler; empty where there is none."""


@dataclass(kw_only=True)
class TrainingState:
    """The part of a step's state that training changes, and that a checkpoint within it holds."""

    model: nn.Module
    """Grown for the step."""
    memory: Memory
    """What the strategy remembers."""
    position: TrainingPosition | None = None
    """After the last update saved, or restored; None: at the start of the step."""

    def to_checkpoint(self) -> dict[str, Any]:
        """Tensors and primitives, of format `FORMAT`.

        Raises:
            TrainingError: something is trained that is not in the model.
        """
        here = self.position
        assert here is not None  # noqa: S101  # saved between two updates; tells the type checker
        names = {p: name for name, p in self.model.named_parameters()}
        try:
            groups = [([names[p] for p in g.parameters], g.lr) for g in here.groups]
        except KeyError:
            raise TrainingError(
                "the strategy trains a parameter that is not in its model",
                where=f"phase {here.phase.name}",
                expected="parameters of the model alone: no checkpoint would hold another one",
            ) from None
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "memory": self.memory,
            "phase": dataclasses.asdict(here.phase),
            "history": [dataclasses.asdict(h) for h in here.history],
            "updates": here.updates,
            "measured": here.measured,
            "groups": groups,
            "optimizer": here.optimizer,
            "scaler": here.scaler,
        }

    def load_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Bring model and memory back in place, and set the position."""
        self.model.load_state_dict(content["model"])
        self.memory.clear()
        self.memory.update(content["memory"])
        named = dict(self.model.named_parameters())
        self.position = TrainingPosition(
            phase=Phase(**content["phase"]),
            history=tuple(
                PhaseResult(phase=Phase(**h["phase"]), validation=tuple(h["validation"]))
                for h in content["history"]
            ),
            updates=content["updates"],
            measured=tuple(content["measured"]),
            groups=[
                Group(parameters=[named[n] for n in names], lr=lr)
                for names, lr in content["groups"]
            ],
            optimizer=content["optimizer"],
            scaler=content["scaler"],
        )


class StepCheckpointer:
    """Saves the place in a step, and brings a stopped attempt back to it.

    Args:
        path: the step's final checkpoint; places lie in `resume/` beside it.
        every_s: seconds between two savings; 0 saves after every update.
        facts: what the runner wants back, primitives only; asked for at every saving.
        ranks: the processes that teach the step; the first one saves.
        watch: is told where an attempt goes on, and of damaged files.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_s: float,
        facts: Callable[[], Mapping[str, Any]] = dict,
        ranks: Ranks | None = None,
        watch: Watch = lambda event: None,
    ) -> None:
        self.path = path.parent / "resume" / path.name
        self.previous = self.path.with_suffix(".previous.pt")
        self.every_s, self.facts, self.watch = every_s, facts, watch
        self.ranks = ranks or Ranks()
        self._saved_at = time.monotonic()
        self._found = self._read()

    def _read(self) -> dict[str, Any] | None:
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                content = checkpoint.load(path)
            except StoreError as err:
                self.watch({"event": "passed over", "what": f"passed over: {err}"})
                continue
            if content.get("format") == FORMAT:
                return content
            self.watch(
                {
                    "event": "passed over",
                    "what": f"of another clbench (format {content.get('format')}, this one reads "
                    f"format {FORMAT}), passed over: {path}",
                }
            )
        return None

    @property
    def found(self) -> Mapping[str, Any] | None:
        """The facts of the attempt that can go on, or None."""
        return None if self._found is None else self._found["facts"]

    def forget(self, why: str) -> None:
        """Do not go on from what was found."""
        self._found = None
        self.watch({"event": "passed over", "what": f"the step starts anew: {why}"})

    def restore(self, state: TrainingState) -> None:
        """Bring `state` back to the place of a stopped attempt, where there is one."""
        if self._found is None:
            return
        content, self._found = self._found, None  # as large as the model, and needed once
        state.load_checkpoint(content)
        assert state.position is not None  # noqa: S101  # just set; tells the type checker
        self.watch(
            {
                "event": "going on",
                "phase": state.position.phase.name,
                "updates": state.position.updates,
            }
        )

    def due(self) -> bool:
        """Whether it is time to save, or to stop; asked for after every update, so it is cheap."""
        return self.ranks.asked() is not None or time.monotonic() - self._saved_at >= self.every_s

    def offer(self, state: TrainingState) -> None:
        """Save the state if it is time to, or if a stop was asked for; then stop if it was.

        Raises:
            Stopped: it was; everything is saved.
            TrainingError: something is trained that is not in the model.
        """
        if not self.due():
            return
        if self.ranks.first:
            content = {**state.to_checkpoint(), "facts": dict(self.facts())}
            checkpoint.save(self.path, content, previous=self.previous)
        self._saved_at = time.monotonic()
        here = state.position
        assert here is not None  # noqa: S101  # saved; tells the type checker
        self.ranks.check(f"phase {here.phase.name}, after update {here.updates}")

    def close(self) -> None:
        """The step is taught: remove what was kept."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
