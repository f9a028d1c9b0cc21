"""Access control for past data: a strategy is given what it declares to need, and no more.

`Catalog.open` refuses images; here is the rest. `nothing`: no old weights, no old
model to ask, no memory. `weights` and `predictions`: no image. `cases`: images of earlier steps,
but what was let go once never comes back. `images`: all of them. At every level, a case's file that
is read past the catalog, and so past the ledger, stops the run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clbench.data.catalog import Catalog, case_being_read
from clbench.errors import TrainingError
from clbench.strategy.contract import Lesson, Memory, Strategy


def refuse_undeclared(strategy: Strategy, lesson: Lesson, memory: Memory) -> None:
    """Hold a strategy that declares `nothing` to it, before a step after the first is taught.

    Args:
        strategy: what teaches.
        lesson: the step.
        memory: emptied, where nothing of the past is declared.

    Raises:
        TrainingError: it would be handed the old model.
    """
    if lesson.number == 1 or strategy.declaration.past != "nothing":
        return
    asked = []
    if strategy.declaration.starts_from == "previous":
        asked.append("the old weights (starts_from = 'previous')")
    if strategy.takes_teacher(lesson):
        asked.append("the old model's output (takes_teacher)")
    if strategy.prepares(lesson):
        asked.append("the old model's predictions (prepares)")
    if asked:
        raise TrainingError(
            "a strategy asks for the past without declaring it",
            where=f"step {lesson.number}, {type(strategy).__name__}",
            expected="past = 'weights' or 'predictions', declared: 'nothing'",
            got=", ".join(asked),
            next_step="declare it in the strategy, or start from scratch without the old model",
        )
    memory.clear()


def refuse_lost_cases(
    catalog: Catalog,
    lesson: Lesson,
    extra: Iterable[tuple[int, str]],
    ledger: Mapping[str, Any],
) -> None:
    """Hold a strategy that declares `cases` to a store: it may drop a case, but not fetch it again.

    Args:
        catalog: the course's data, with what the strategy declares.
        lesson: the step.
        extra: (step, case) asked for beside the step's own.
        ledger: of the run: step → purpose → "source/case".

    Raises:
        TrainingError: a case that was not among those of the step before.
    """
    if catalog.past != "cases":
        return
    stored = set(ledger.get(str(lesson.number - 1), {}).get("train", ()))
    for step, case in extra:
        name = f"{catalog.source(step).name}/{case}"
        if step < lesson.number - 1 and name not in stored:
            raise TrainingError(
                "a strategy opened a case of an earlier step that it had not stored",
                where=f"step {lesson.number}, {name} of step {step}",
                expected=f"a case it was still taught from in step {lesson.number - 1}, for "
                "past = 'cases' is declared",
                next_step="keep the list of stored cases in memory and only shorten it, or "
                "declare past = 'images'",
            )


@contextmanager
def refuse_unrecorded_reads(monitor: FileAccessMonitor) -> Iterator[None]:
    """Stop when a file of a case is read past the catalog, unless the step is taught with it.

    In teaching and in examining: what a hook reads there of a test case would be its answer.

    Only the files of images, labels and opened cached volumes are known. Heard is what Python opens
    in this process, and programs, links and renames that are told a file's path. Not heard are
    loader processes that were not forked, what a program does by itself or with a whole folder,
    files that are opened relative to an open folder (`dir_fd`), and libraries in C that open files
    on their own (`torch.from_file`).

    Args:
        monitor: records the reads.

    Raises:
        TrainingError: in whatever reads the file, and once more at the end.
    """
    catalog = monitor.catalog
    split, source = catalog.splits[catalog.step - 1], catalog.source(catalog.step).name

    def refuse() -> None:
        for step, name, case in monitor.unrecorded_reads:
            if step == catalog.step and not (name == source and case in split.train):
                raise TrainingError(
                    "a file of another step, or of a test case, was read past the catalog",
                    where=f"step {catalog.step}, {name} case {case}",
                    expected="this step's training cases only; others through extra_cases",
                    next_step="use the volume a hook is given, and declare what you need of the "
                    "past",
                )

    def hear(path: str) -> None:
        monitor(path)
        refuse()

    with listening_to_opens(hear):
        try:
            yield
        except Exception:
            refuse()  # the next reader may have taken the refusal for damage of its own file
            raise
    refuse()


# --------------------------------------------------------------------------------------------------
# Which files are opened while something goes on, and whether the catalog opened them.
# Python tells of every file it opens (audit events), so a hook that reads past the
# catalog is heard as well.


_LISTENERS: list[Callable[[str], None]] = []
_HOOKED: list[bool] = []


_OTHER_WAYS: dict[str, Callable[..., Iterable[Any]]] = {
    "os.link": lambda src, dst, *more: [src],
    "os.rename": lambda src, dst, *more: [src],
    "subprocess.Popen": lambda program, words, folder, *more: _words(words, folder),
    "os.posix_spawn": lambda program, words, *more: _words(words),
    "os.exec": lambda program, words, *more: _words(words),
    "os.system": lambda command: _words([command]),
}
"""Audit event → what may be a file: under a second name, or by a program, it is read unheard."""
_BETWEEN = re.compile(r"""[\s'"<>|;&()=,`]+""")
"""What may stand between the words of a command, and around a path in it."""


def _words(arguments: Any, folder: Any = None) -> Iterator[str]:
    """The arguments of a program, and the words within each, for one may be a shell's command.

    Args:
        arguments: of the program, its name first.
        folder: where it runs; None: where this process does.
    """
    for argument in [arguments] if isinstance(arguments, str | bytes) else arguments:
        if not isinstance(argument, str | bytes | os.PathLike):
            continue
        text = os.fsdecode(argument)
        words = {text, *_BETWEEN.split(text)}
        with contextlib.suppress(ValueError):  # quotes that do not close
            words.update(shlex.split(text))
        for word in sorted(words - {""}):
            yield str(Path(os.fsdecode(folder), word)) if folder else word


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _LISTENERS:
        return
    if event == "open":
        named: Iterable[Any] = args[:1]
    elif event in _OTHER_WAYS:
        named = _OTHER_WAYS[event](*args)
    else:
        return
    for path in named:
        if isinstance(path, str | bytes | os.PathLike):
            for listener in tuple(_LISTENERS):
                listener(os.fsdecode(path))


@contextmanager
def listening_to_opens(listener: Callable[[str], None]) -> Iterator[None]:
    """Call `listener` with the path of every file that Python opens inside.

    The audit hook itself stays for the life of the process (Python offers no way back); with no
    listener it does nothing.
    """
    if not _HOOKED:
        sys.addaudithook(_hear)
        _HOOKED.append(True)
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


class FileAccessMonitor:
    """Records which files of cases are opened by anything but the catalog and the examination.

    A file is known by whatever path it is opened: a relative one, one through symbolic links, or a
    hard link.

    Args:
        catalog: the course's data; says which files belong to which case.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.cases: dict[str, tuple[str, str]] = {
            _real(path): (source, case)
            for source, files in catalog.files.items()
            for case, of_case in files.items()
            for path in of_case.files
        }
        self._numbers: dict[tuple[int, int], str] | None = None  # (device, inode) → path
        self.unrecorded_reads: list[tuple[int, str, str]] = []
        """(step, source, case) read past the catalog."""

    def __call__(self, path: str) -> None:
        """One file was opened: by the catalog, by the examination, or by a hook."""
        if (read := case_being_read()) is not None:
            if path.endswith(".npy"):  # the case as the cache holds it
                step, case = read
                if (real := _real(path)) not in self.cases:
                    self.cases[real] = self.catalog.source(step).name, case
                    self._numbers = None
        elif (known := self.cases.get(_real(path)) or self._of_a_hard_link(path)) is not None:
            self.unrecorded_reads.append((self.catalog.step, *known))

    def _of_a_hard_link(self, path: str) -> tuple[str, str] | None:
        """(source, case) of the file that a path is a second name of."""
        status = _status(path)
        if status is None or status.st_nlink < 2 or not stat.S_ISREG(status.st_mode):
            return None
        if self._numbers is None:  # made late: most runs open no file of two names
            found = ((_status(name), name) for name in self.cases)
            self._numbers = {(s.st_dev, s.st_ino): name for s, name in found if s is not None}
        name = self._numbers.get((status.st_dev, status.st_ino))
        now = None if name is None else _status(name)
        if name is None or now is None or not os.path.samestat(now, status):
            return None  # the number was given to another file since
        return self.cases[name]


def _status(path: str) -> os.stat_result | None:
    """Of the file behind links. Opens no file, so no listener hears of it."""
    try:
        return os.stat(path)  # noqa: PTH116  # for every file that is opened: no object more
    except (OSError, ValueError):
        return None


def _real(path: str | os.PathLike[str]) -> str:
    """The path without links and relative parts. Opens no file, so no listener hears of it."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a lost working folder, a null byte: opening it fails as well
        return os.fspath(path)
