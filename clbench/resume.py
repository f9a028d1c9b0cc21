"""Where a stopped step goes on: what is saved between two updates, when, and how it comes back.

Room: row 3. Crops are numbered and the random state of every update is a function of its number, so
model, optimizer, memory and the place in the step are all there is. Two files are kept, the newest
and the one before it; a damaged one is passed over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clbench import checkpoint, stop, store
from clbench.errors import StoreError, TrainingError
from clbench.strategy import Group, Memory, Phase, PhaseResult, derive_seed

FORMAT = 1
"""Raised when what a place holds changes."""
Watch = Callable[[dict[str, Any]], None]


def reseed(*parts: object) -> None:
    """Set torch's, numpy's and Python's global random states to a function of the parts.

    So dropout and anything else that draws from them repeats, wherever the step was stopped.
    """
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # a plugin may draw from it


@dataclass(frozen=True, kw_only=True)
class Place:
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


class Keeper:
    """Saves the place in a step, and brings a stopped attempt back to it.

    Args:
        path: the step's final checkpoint; places lie in `resume/` beside it.
        every_s: seconds between two savings; 0 saves after every update.
        facts: what the runner wants back, primitives only; asked for at every saving.
        watch: is told where an attempt goes on, and of damaged files.
    """

    def __init__(
        self,
        path: Path,
        *,
        every_s: float,
        facts: Callable[[], Mapping[str, Any]] = dict,
        watch: Watch = lambda event: None,
    ) -> None:
        self.path = path.parent / "resume" / path.name
        self.previous = self.path.with_suffix(".previous.pt")
        self.every_s, self.facts, self.watch = every_s, facts, watch
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
            self.watch({"event": "passed over", "what": f"of another clbench, passed over: {path}"})
        return None

    @property
    def found(self) -> Mapping[str, Any] | None:
        """The facts of the attempt that can go on, or None."""
        return None if self._found is None else self._found["facts"]

    def forget(self, why: str) -> None:
        """Do not go on from what was found."""
        self._found = None
        self.watch({"event": "passed over", "what": f"the step starts anew: {why}"})

    def restore(self, model: nn.Module, memory: Memory) -> Place | None:
        """Bring `model` and `memory` back in place; None where there is nothing to go on from."""
        if self._found is None:
            return None
        content, self._found = self._found, None  # as large as the model, and needed once
        model.load_state_dict(content["model"])
        memory.clear()
        memory.update(content["memory"])
        named = dict(model.named_parameters())
        place = Place(
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
        self.watch({"event": "going on", "phase": place.phase.name, "updates": place.updates})
        return place

    def offer(self, model: nn.Module, memory: Memory, here: Place) -> None:
        """Save the place if it is time to, or if that was asked for; then stop if that was.

        Raises:
            Stopped: it was; everything is saved.
            TrainingError: something is trained that is not in the model.
        """
        if stop.asked() is None and time.monotonic() - self._saved_at < self.every_s:
            return
        names = {p: name for name, p in model.named_parameters()}
        try:
            groups = [([names[p] for p in g.parameters], g.lr) for g in here.groups]
        except KeyError:
            raise TrainingError(
                "the strategy trains a parameter that is not in its model",
                where=f"phase {here.phase.name}",
                expected="parameters of the model alone: no checkpoint would hold another one",
            ) from None
        content = {
            "format": FORMAT,
            "facts": dict(self.facts()),
            "model": model.state_dict(),
            "memory": memory,
            "phase": dataclasses.asdict(here.phase),
            "history": [dataclasses.asdict(h) for h in here.history],
            "updates": here.updates,
            "measured": here.measured,
            "groups": groups,
            "optimizer": here.optimizer,
            "scaler": here.scaler,
        }
        checkpoint.save(self.path, content, previous=self.previous)
        self._saved_at = time.monotonic()
        stop.check(f"phase {here.phase.name}, after update {here.updates}")

    def close(self) -> None:
        """The step is taught: remove what was kept."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


@dataclass(frozen=True)
class Exam:
    """An examined case."""

    rows: Sequence[store.Score]
    seconds: float
    """All of it."""
    predict_s: float
    """Of them, inference."""
    here: bool = True
    """Examined on the same processor, with the same versions and thread count: equal bits."""


class Exams:
    """The finished cases of an examination, kept until the scores of the step are written.

    Args:
        folder: where; of this step, and this step alone.
        mark: the model that is examined; cases that another one answered are not taken.
        host: see `host`; cases examined elsewhere are taken, and say so.
    """

    def __init__(self, folder: Path, mark: str, host: Mapping[str, Any]) -> None:
        self.folder, self.mark, self.host = folder, mark, dict(host)

    def get(self, name: str) -> Exam | None:
        """A finished case; None where it is to be examined."""
        path = self.folder / f"{name}.json"
        try:
            content = store.read_json(path)
            if content["model"] != self.mark or content["sha256"] != _sealed(content["rows"]):
                return None
            return Exam(
                [store.Score(**row) for row in content["rows"]],
                float(content["seconds"]),
                float(content["predict_s"]),
                content.get("host") == self.host,
            )
        except (StoreError, KeyError, TypeError, ValueError):
            return None

    def put(self, name: str, exam: Exam) -> None:
        """Keep a finished case."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [dataclasses.asdict(row) for row in exam.rows]
        content = {
            "model": self.mark,
            "host": self.host,
            "seconds": exam.seconds,
            "predict_s": exam.predict_s,
            "rows": kept,
            "sha256": _sealed(kept),
        }
        store.write_json(self.folder / f"{name}.json", content)

    def close(self) -> None:
        """The scores are written: remove what was kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sealed(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------ where it runs


def deterministic() -> None:
    """Let CUDA use operators that repeat to the bit, for the rest of the process.

    Where torch has none for an operator it warns, names it, and goes on. On the CPU the operators
    used here repeat anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def host(device: torch.device) -> dict[str, str | int]:
    """What equal bits depend on besides the settings."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fact → [then, now], of the facts of `host` that differ."""
    return {k: [then.get(k), now.get(k)] for k in now if then.get(k) != now.get(k)}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """This many CPU threads in the block; None: as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
