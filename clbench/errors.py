"""Errors that help: each says what went wrong, where, what was expected and found, what to do.

Every deliberate failure of clbench is a `ClbenchError`; the command line
prints it without a traceback and exits with status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClbenchError(Exception):
    """A failure the user can act on.

    Args:
        what: one sentence that names the problem.
        where: the file, field or command the problem lies in.
        expected: what would have been right.
        got: what was found instead.
        next_step: what to do now.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.next_step = next_step

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip from a data-loader worker to the main process."""
        return _rebuild, (type(self), self.what, self.fields())

    def fields(self) -> dict[str, object]:
        """The four labelled parts, absent ones left out; values as text."""
        names = ("where", "expected", "got", "next_step")
        return {n: str(value) for n in names if (value := getattr(self, n)) is not None}

    @property
    def brief(self) -> str:
        """One line: the problem, and what to do."""
        todo = f" ({self.next_step})" if self.next_step else ""
        return " ".join(f"{self.what}{todo}".split())

    def __str__(self) -> str:
        lines = [self.what]
        lines += [
            f"  {name.replace('_', ' ') + ':':<10} {value}" for name, value in self.fields().items()
        ]
        return "\n".join(lines)


def _rebuild(kind: type[ClbenchError], what: str, fields: dict[str, str]) -> ClbenchError:
    return kind(what, **fields)


class SpecError(ClbenchError):
    """A benchmark, step, source or preprocessing that contradicts itself."""


class SettingError(ClbenchError):
    """A profile or `--set` field that does not exist or has the wrong type or range."""


class UnknownName(ClbenchError):  # noqa: N818  # reads as what it is
    """A benchmark, strategy, backbone, encoding, profile or layout nobody has registered."""


class DataError(ClbenchError):
    """A folder, image, label or split that cannot be used as it is."""


class StoreError(ClbenchError):
    """A results folder, run record or score table that cannot be read or written."""


class TrainingError(ClbenchError):
    """Training that must not go on: a loss that is not finite, a broken promise of a strategy."""


class DivergedError(TrainingError):
    """Training whose loss or gradient is not finite any more, or explodes."""


class AvalancheError(ClbenchError):
    """Avalanche or a plugin of its cannot be used here, or not as asked."""


class CostError(ClbenchError):
    """Operations that cannot be counted."""


def first_line(err: BaseException) -> str:
    """What another library's exception says, in one line; its type where it says nothing."""
    return next(iter(str(err).splitlines()), "") or type(err).__name__


def closest(name: str, known: Iterable[str]) -> str | None:
    """The registered name most like `name`, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The next step after a name nobody knows: the one most like it; None where none is."""
    guess = closest(name, known)
    return f"did you mean {guess!r}?" if guess else None


_LISTED = dict.fromkeys(
    ("benchmark", "strategy", "backbone", "encoding", "profile"), "see `clbench list`"
) | {"finished run of a strategy": "name one of these as the reference, with --ref"}


def unknown_name(kind: str, name: str, known: Iterable[str], where: object = None) -> UnknownName:
    """The error for a name nobody knows: did-you-mean first, then the whole list.

    Args:
        kind: what was looked for, such as `strategy`.
        name: the name given.
        known: the names there are.
        where: the file or option that holds the name.
    """
    names = sorted(known)
    return UnknownName(
        f"there is no {kind} called {name!r}",
        where=where,
        expected=f"one of: {', '.join(names)}" if names else f"a {kind}; none is installed",
        got=name,
        next_step=did_you_mean(name, names) or _LISTED.get(kind),
    )
