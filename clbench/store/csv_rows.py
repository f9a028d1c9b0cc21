"""Rows of a dataclass as CSV: equal rows give equal bytes, and a damaged line is named."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from clbench.errors import StoreError

Row = TypeVar("Row")
_READ: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    int | None: lambda cell: int(cell) if cell else None,
}
"""Type of a field → its value from the text of a cell."""


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
    kind: type[Row],
    *,
    what: str,
    next_step: str,
    allowed: Mapping[str, Collection[str]] = {},
) -> list[Row]:
    """What `rows_bytes` wrote; the row at place i stands in line i + 2.

    Args:
        path: the file.
        kind: dataclass of a row; its fields are the columns, their types say how cells are read.
        what: the file in words, for errors.
        next_step: where it is missing, what brings it.
        allowed: column → the values it may have; a column that is not named may have any.

    Raises:
        StoreError: missing, no text, other columns, or a line that is none; names the line.
    """
    types = get_type_hints(kind)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise StoreError(
            f"{what} cannot be read",
            where=path,
            got=err.strerror if isinstance(err, OSError) else err,
            next_step=next_step if isinstance(err, OSError) else "run again with --fresh",
        ) from err
    if not lines or lines[0] != list(types):
        raise StoreError(
            f"other columns in {what}",
            where=path,
            expected=", ".join(types),
            got=", ".join(lines[0]) if lines else "an empty file",
            next_step="run again with --fresh",
        )
    rows = []
    for number, cells in enumerate(lines[1:], 2):
        try:
            texts = dict(zip(types, cells, strict=True))
            if wrong := [texts[name] for name in allowed if texts[name] not in allowed[name]]:
                raise ValueError(", ".join(map(repr, wrong)))
            rows.append(kind(**{name: _READ[types[name]](text) for name, text in texts.items()}))
        except ValueError as err:
            raise StoreError(
                f"a line of {what} cannot be read",
                where=f"{path}, line {number}",
                got=f"{','.join(cells)} ({err})",
                next_step="run again with --fresh",
            ) from err
    return rows
