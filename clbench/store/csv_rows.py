"""Rows of a dataclass as CSV: equal rows give equal bytes, and a damaged line is named."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import StoreError

Row = TypeVar("Row")


def rows_bytes(columns: Sequence[str], rows: Iterable[Any]) -> bytes:
    """A header and a line per row, in the order given; floats by `repr`, None as nothing.

    Args:
        columns: attributes of a row.
        rows: the rows.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (getattr(row, name) for name in columns)
        writer.writerow(
            "" if c is None else repr(float(c)) if isinstance(c, float) else c for c in cells
        )
    return out.getvalue().encode()


def read_rows(
    path: Path,
    columns: Sequence[str],
    parse: Callable[[dict[str, str]], Row],
    *,
    what: str,
    next_step: str,
) -> list[Row]:
    """What `rows_bytes` wrote; the row at place i stands in line i + 2.

    Args:
        path: the file.
        columns: those it must have.
        parse: a line by column → row; raises ValueError where it is none.
        what: the file in words, for errors.
        next_step: where it is missing, what brings it.

    Raises:
        StoreError: missing, other columns, or a line that is none; names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except OSError as err:
        raise StoreError(
            f"{what} cannot be read", where=path, got=err.strerror, next_step=next_step
        ) from err
    if not lines or tuple(lines[0]) != tuple(columns):
        raise StoreError(
            f"other columns in {what}",
            where=path,
            expected=", ".join(columns),
            got=", ".join(lines[0]) if lines else "an empty file",
            next_step="run again with --fresh",
        )
    rows = []
    for number, cells in enumerate(lines[1:], 2):
        try:
            rows.append(parse(dict(zip(columns, cells, strict=True))))
        except ValueError as err:
            raise StoreError(
                f"a line of {what} cannot be read",
                where=f"{path}, line {number}",
                got=f"{','.join(cells)} ({err})",
                next_step="run again with --fresh",
            ) from err
    return rows
