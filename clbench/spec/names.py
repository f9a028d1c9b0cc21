"""Names that become folders and files: what they may hold, so that none leads out of its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from clbench.errors import SpecError

LONGEST = 120
"""Bytes of a name: a writer adds endings to it, and file systems end at 255."""

RANGE = re.compile(r"\d+\.\.\d+")
"""A range of case ids, such as 1..3; no case may be called like one."""


ORDERED = re.compile(r"(?P<bench>.+)\.order(?P<order>\d+(?:-\d+)*)")
"""A course with its steps in another order, such as `body_ext.order3-1-2`."""


def split_order(bench: str) -> tuple[str, tuple[int, ...]]:
    """A course as it is listed, and the order of its steps; empty = as listed.

    Example:
        >>> from clbench.spec.names import split_order
        >>> split_order("body_ext.order3-1-2"), split_order("body_ext")
        (('body_ext', (3, 1, 2)), ('body_ext', ()))
    """
    ordered = ORDERED.fullmatch(bench)
    if ordered is None:
        return bench, ()
    return ordered["bench"], tuple(map(int, ordered["order"].split("-")))


def ordered_name(bench: str, order: Sequence[int]) -> str:
    """The name of a course with its listed steps taught in an order; its own as listed.

    Args:
        bench: name, or path of the course file.
        order: 1-based numbers of the listed steps.

    Example:
        >>> from clbench.spec.names import ordered_name
        >>> ordered_name("body_ext", [3, 1, 2]), ordered_name("body_ext", [1, 2, 3])
        ('body_ext.order3-1-2', 'body_ext')
    """
    if list(order) == list(range(1, len(order) + 1)):
        return bench
    return f"{bench}.order{'-'.join(map(str, order))}"


def need_name(name: object, where: object) -> None:
    """Refuse a name that cannot be a folder's on every system, or stand before `=` in an option.

    Names of benchmarks, sources, strategies, output files.

    Raises:
        SpecError: anything but letters, digits and `_ . + -`, the first a letter or digit.
    """
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name)
        or len(name) > LONGEST
    ):
        raise SpecError(
            "a name may hold letters, digits and _ . + - only",
            where=where,
            expected=f"a letter or digit first, {LONGEST} characters at most",
            got=repr(name),
            next_step="rename it: it becomes the name of a folder",
        )


def need_case(case: object, where: object) -> None:
    """Refuse a case id, or the stem of a mask, that is no plain part of a file's name.

    What data sets use stays allowed: spaces, dots, brackets, letters of any script.

    Raises:
        SpecError: empty, too long, a slash or backslash, an invisible character, a dot or space at
            the start, a space at the end, or the form of a range (`1..3`).
    """
    if isinstance(case, str) and RANGE.fullmatch(case):
        raise SpecError(
            "a case id has the form of a range",
            where=where,
            expected="a name without two dots between numbers",
            got=repr(case),
            next_step="rename the case's files",
        )
    if (
        not isinstance(case, str)
        or not case
        or len(case.encode(errors="replace")) > LONGEST
        or not case.isprintable()
        or set(case) & set("/\\")
        or case[0] in ". "
        or case[-1] == " "
    ):
        raise SpecError(
            "a case id is no plain part of a file's name",
            where=where,
            expected=f"1 to {LONGEST} visible characters without slash or backslash, no dot or "
            "space at the start",
            got=repr(case),
            next_step="name cases as their files are named, without folder and ending",
        )


def need_inner(path: object, where: object) -> None:
    """Refuse a path of a configuration file that leaves the folder it is relative to.

    Raises:
        SpecError: absolute, with `..`, a backslash, a drive or an invisible character.
    """
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    if (
        not isinstance(path, str)
        or not parts
        or path.startswith(("/", "~"))
        or ".." in parts
        or not path.isprintable()
        or set(path) & set("\\:")
    ):
        raise SpecError(
            "a path leads outside its folder",
            where=where,
            expected="a relative path without .., backslash or drive",
            got=repr(path),
            next_step="move the file below the folder of the file that names it",
        )
