"""Benchmarks and splits as TOML files: read, checked field by field, and made into spec types."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from clbench.errors import SpecError
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import need_inner
from clbench.spec.splits import FORMAT, PARTS, Split
from clbench.spec.taxonomy import Structure, declare
from clbench.spec.validation import from_toml

MAX_RANGE = 100_000
"""Cases a range may stand for: a typing error must not fill the memory."""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file, with the line of a syntax error in the message."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError("file not found", where=path, next_step="check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as err:
        raise SpecError(f"not a valid TOML file: {err}", where=path) from err
    except OSError as err:
        raise SpecError(
            "not a file that can be read", where=path, expected="a TOML file", got=err.strerror
        ) from err


def expand_ids(ids: list[Any], where: object) -> tuple[str, ...]:
    """Case ids as text, composed; `"61..80"` stands for all whole numbers from 61 to 80.

    `"0061..0080"` keeps the zeros in front. No id may have this form, and `"61-80"` is an id
    (patient and visit, in many hospitals), never a range.

    Raises:
        SpecError: a range runs backwards, or stands for more than `MAX_RANGE` cases; a number with
            a point, which would lose its zeros (1.10 is 1.1), or what is no id at all.
    """
    expanded: list[str] = []
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise SpecError(
                "a case id is neither text nor a whole number",
                where=where,
                expected='ids in quotes, such as "1.10", or whole numbers',
                got=f"{item!r} ({type(item).__name__})",
                next_step="write the id in quotes, as the case's file is named",
            )
        text = unicodedata.normalize("NFC", str(item))
        low, dots, high = text.partition("..")
        if dots and low.isdecimal() and high.isdecimal():
            short = max(len(low), len(high)) <= 9
            if short and int(low) > int(high):
                raise SpecError("a range of cases runs backwards", where=where, got=text)
            if not short or int(high) - int(low) >= MAX_RANGE:
                raise SpecError(
                    "a range of cases is too long",
                    where=where,
                    expected=f"at most {MAX_RANGE} cases",
                    got=text,
                )
            width = len(low) if low.startswith("0") else 0
            expanded += [f"{i:0{width}d}" for i in range(int(low), int(high) + 1)]
        else:
            expanded.append(text)
    return tuple(expanded)


def load_split(path: Path) -> Split:
    """Read a split file: `train`, `validation`, `test` (ids or ranges) or `draw`, and `origin`."""
    try:
        raw = _split(read_toml(path), path.name, path)
        return from_toml(Split, raw, raised=SpecError, where=path)
    except SpecError as err:
        err.next_step = f"{err.next_step}; {FORMAT}" if err.next_step else FORMAT
        raise


def load_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file.

    A split is a path relative to the file, which may not leave its folder, or stands in the file.
    Structures of `[[structure]]` tables are declared to the taxonomy.
    """
    raw = read_toml(path)
    declared = []
    for item in _tables(raw, "structure"):
        item.setdefault("prompt", str(item.get("name")).replace("_", " "))
        where = f"{path}, structure {item.get('name', '?')!r}"
        declared.append(from_toml(Structure, item, raised=SpecError, where=where))
    declare(declared, path)
    for source in _tables(raw, "source"):
        where = f"{path}, source {source.get('name', '?')!r}"
        for part in _tables(source, "partial"):
            _expand(part, "cases", where)
        for key in ("labels", "sides"):
            _one_key_per_value(source.get(key), key, where)
    for table, called in (("step", "name"), ("external", "source")):
        for part in _tables(raw, table):
            name = f"{table} {part.get(called, '?')!r}"
            for key in {"split", "phantom_split"} & {*part}:
                if isinstance(part[key], str):
                    part[key] = load_split(_below(path, part[key]))
                elif isinstance(part[key], dict):
                    part[key] = _split(part[key], name, f"{path}, {name}")
    if "order" in raw:
        raise SpecError(
            "a course lists its steps in their order",
            where=path,
            expected="no `order`",
            got=raw["order"],
            next_step="name it with --order when the course is run, or as `orders` in a study file",
        )
    return from_toml(Benchmark, raw, raised=SpecError, where=path)


def benchmark_text(benchmark: Benchmark) -> str:
    """A benchmark as the text of a file that `load_benchmark` reads back as an equal one.

    Splits stand in the file; what is left at its default is left out.
    """
    lines = []
    tables = {
        "sources": "source",
        "steps": "step",
        "external_tests": "external",
        "declares": "structure",
    }
    for f in fields(benchmark):
        value = getattr(benchmark, f.name)
        # the steps stand in the order in which they are taught: a listed order of its own
        written = f.name not in tables and f.name != "order"
        if written and not _is_default(f, value):
            lines.append(f"{f.name} = {inline(value)}")
    for name, table in tables.items():
        for item in getattr(benchmark, name):
            lines += ["", f"[[{table}]]"]
            lines += [f"{key} = {inline(value)}" for key, value in _said(item).items()]
    return "\n".join(lines) + "\n"


def _said(item: Any) -> dict[str, Any]:
    """The fields of a part of a benchmark that a file must name."""
    values = ((f, getattr(item, f.name)) for f in fields(item))
    return {f.name: value for f, value in values if not _is_default(f, value)}


def _is_default(f: Field[Any], value: Any) -> bool:
    """Whether a field has its default, which a file need not name; a required one has none.

    Compared as it is written: 1 and 1.0 are equal, but a course holds one or the other.
    """
    if f.default_factory is not MISSING:
        return repr(value) == repr(f.default_factory())
    return f.default is not MISSING and repr(value) == repr(f.default)


def inline(value: Any) -> str:
    """A value in TOML, on one line."""
    if is_dataclass(value) and not isinstance(value, type):
        value = _said(value)
    if isinstance(value, Mapping):
        pairs = (f"{_basic(str(key))} = {inline(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return _basic(value) if isinstance(value, str) else json.dumps(value)


def _basic(text: str) -> str:
    """A basic string of TOML: JSON's, in which only DEL must be written otherwise."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def benchmark_files(path: Path) -> dict[str, bytes]:
    """The content of a benchmark file and of the split files it names, by relative path.

    Written into another folder, they are the same benchmark.

    Raises:
        SpecError: one cannot be read.
    """
    raw = read_toml(path)
    with_cases = [*_tables(raw, "step"), *_tables(raw, "external")]
    named = [s[key] for s in with_cases for key in ("split", "phantom_split") if key in s]
    splits = {name: _below(path, name) for name in named if isinstance(name, str)}
    try:
        return {name: file.read_bytes() for name, file in {path.name: path, **splits}.items()}
    except OSError as err:
        raise SpecError("a benchmark file cannot be read", where=path, got=err.strerror) from err


def _tables(raw: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The `[[key]]` tables; whatever else stands there is refused with the whole file."""
    value = raw.get(key)
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _one_key_per_value(table: object, field: str, where: object) -> None:
    """Refuse keys such as `1` and `01`: they are one label value, and one entry would vanish.

    So would one of `1` and `+1`, ` 1` or `1.0`: a key is written in plain digits.
    """
    first: dict[int, str] = {}
    for key in table if isinstance(table, dict) else ():
        if not re.fullmatch("-?[0-9]+", key):
            raise SpecError(
                f"{field} must be a table, a whole number = "
                + ("one structure" if field == "labels" else "the left and the right structure"),
                where=where,
                expected="label values in plain digits, such as 12",
                got=repr(key),
                next_step="write the number alone",
            )
        if first.setdefault(int(key), key) != key:
            raise SpecError(
                f"two keys of {field} are one label value",
                where=where,
                expected="each label value once",
                got=f"{first[int(key)]} and {key}",
                next_step="remove one of the two",
            )


def _expand(table: dict[str, Any], key: str, where: object) -> None:
    if isinstance(table.get(key), list):
        table[key] = expand_ids(table[key], where)


def _split(raw: dict[str, Any], name: str, where: object) -> dict[str, Any]:
    for part in PARTS:
        _expand(raw, part, where)
    if isinstance(raw.get("draw"), dict):
        for key in ("without", "among"):
            _expand(raw["draw"], key, where)
    return {"name": name, **raw}


def _below(path: Path, given: str) -> Path:
    """The split file that a benchmark file names."""
    need_inner(given, f"{path}, split file")
    folder = path.parent.resolve()
    target = (folder / given).resolve()
    if not target.is_relative_to(folder):
        raise SpecError(
            "a split file lies outside the benchmark's folder",
            where=path,
            expected=f"a file below {folder}, not a link that leads out of it",
            got=f"{given} → {target}",
            next_step="copy the file there",
        )
    return target
