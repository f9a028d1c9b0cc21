"""Rules, findings and their report: the part of the kit that strategies and benchmarks share.

A rule is a function of one argument that returns where the rule holds and raises where
it does not; its name and the first line of its docstring are what a reader sees.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from clbench.errors import ClbenchError, unknown_name

S = TypeVar("S")
Status = Literal["pass", "FAIL", "warn", "exempt", "waits"]


class Broken(ClbenchError):  # noqa: N818  # reads as what it is
    """A rule that does not hold."""


class Limit(ClbenchError):  # noqa: N818  # reads as what it is
    """Raised by a rule where the subject is right, but not under every setting: a warning."""


class Exempt(Exception):  # noqa: N818  # reads as what it is
    """Raised by a rule that finds nothing to look at; its text says why."""


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[S]):
    """One thing that must be true."""

    check: Callable[[S], None]
    """Returns, or raises `Broken`, `Limit`, `Exempt` or whatever the plugin raises."""
    needs: tuple[Callable[[S], None], ...] = ()
    """Rules without which this one would only repeat the same complaint."""

    @property
    def name(self) -> str:
        """The function's name, in words."""
        return self.check.__name__.replace("_", " ")

    @property
    def why(self) -> str:
        """One line: what goes wrong without it."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one rule."""

    rule: str
    """Its name."""
    why: str
    """Its reason."""
    status: Status
    """`warn`: holds, but not under every setting; `exempt`: nothing to look at; `waits`: a rule it
    needs does not hold."""
    remark: str = ""
    """Why it is exempt or waits."""
    error: ClbenchError | None = None
    """What is wrong, with expected, got and next step."""

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield f"  {self.status:<6}  {self.rule}: {self.why}"
        if self.remark:
            yield f"            {self.remark}"
        if self.error is not None:
            yield from (f"          {line}" for line in str(self.error).splitlines())


@dataclass(kw_only=True)
class Report:
    """Every rule, in order."""

    title: str
    """What was checked."""
    facts: tuple[str, ...] = ()
    """What it says of itself, line by line."""
    findings: list[Finding] = field(default_factory=list)
    """One per rule."""
    wall_s: float = 0.0
    """How long it took."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rules that do not hold."""
        return tuple(f.rule for f in self.findings if f.status == "FAIL")

    @property
    def warned(self) -> tuple[str, ...]:
        """Names of the rules that hold under some settings alone."""
        return tuple(f.rule for f in self.findings if f.status == "warn")

    @property
    def ok(self) -> bool:
        """True where every rule holds that has something to look at."""
        return not self.failed

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield self.title
        yield from (f"  {fact}" for fact in self.facts)
        for finding in self.findings:
            yield from finding.lines()
        count = {s: sum(f.status == s for f in self.findings) for s in ("pass", "FAIL", "warn")}
        rest = len(self.findings) - sum(count.values())
        warned = f"{count['warn']} warn, " if count["warn"] else ""
        yield (
            f"{len(self.findings)} rules in {self.wall_s:.1f} s: {count['pass']} pass, "
            f"{count['FAIL']} FAIL, {warned}{rest} not looked at"
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())


def judge(subject: S, rules: Sequence[Rule[S]], report: Report, only: Sequence[str] = ()) -> Report:
    """Try every rule on a subject and enter what came of it.

    Args:
        subject: what the rules look at.
        rules: in an order in which each stands behind those it needs.
        report: where the findings go.
        only: names of rules; the others are left out, unless one of these needs them.

    Raises:
        UnknownName: `only` names a rule that does not exist.
    """
    known = {rule.name: rule for rule in rules}
    wanted: set[str] = set()
    for name in only:
        if name not in known:
            raise unknown_name("rule", name, known)
        _add_needed(known, name, wanted)
    start = time.monotonic()
    held: dict[str, bool] = {}
    for rule in rules:
        if only and rule.name not in wanted:
            continue
        absent = [
            n for n in (f.__name__.replace("_", " ") for f in rule.needs) if not held.get(n, True)
        ]
        status, remark, error = (
            ("waits", f"needs: {', '.join(absent)}", None) if absent else _outcome(subject, rule)
        )
        held[rule.name] = status in ("pass", "warn", "exempt")
        report.findings.append(
            Finding(rule=rule.name, why=rule.why, status=status, remark=remark, error=error)
        )
    report.wall_s = time.monotonic() - start
    return report


def _add_needed(known: dict[str, Rule[S]], name: str, wanted: set[str]) -> None:
    wanted.add(name)
    for needed in known[name].needs:
        _add_needed(known, needed.__name__.replace("_", " "), wanted)


def _outcome(subject: S, rule: Rule[S]) -> tuple[Status, str, ClbenchError | None]:
    """Status, remark and error of one rule."""
    try:
        rule.check(subject)
    except Exempt as reason:
        return "exempt", str(reason), None
    except Limit as err:
        return "warn", "", err
    except ClbenchError as err:
        return "FAIL", "", err
    except Exception as err:  # the plugin's own: any kind
        last = traceback.extract_tb(err.__traceback__)[-1]
        told = Broken(
            f"{type(err).__name__}: {err}",
            where=f"{last.filename}, line {last.lineno}, in {last.name}",
            expected="no exception",
            next_step="mend it there; the rule is tried again with the next check",
        )
        return "FAIL", "", told
    return "pass", "", None
