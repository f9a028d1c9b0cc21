"""Benchmarks and splits as TOML files: read, checked field by field, and made into spec types."""

from __future__ import annotations

import tomllib
import unicodedata
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import SpecError, closest
from clbench.spec.benchmark import Benchmark, Partial, Preprocessing, Source, Step
from clbench.spec.names import need_inner
from clbench.spec.splits import PARTS, Draw, Split
from clbench.spec.taxonomy import Structure, declare, structure

T = TypeVar("T")
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
        SpecError: a range runs backwards, or stands for more than `MAX_RANGE` cases.
    """
    found: list[str] = []
    for item in ids:
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
            found += [f"{i:0{width}d}" for i in range(int(low), int(high) + 1)]
        else:
            found.append(text)
    return tuple(found)


_PLAIN: dict[str, tuple[type, str]] = {
    "str": (str, "text"), "int": (int, "a whole number"), "bool": (bool, "true or false"),
    "str | None": (str, "text"),
}  # fmt: skip
"""Field type as written in the spec → Python type, and the type in words."""


def _make(kind: type[T], values: dict[str, Any], where: object) -> T:
    known = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]  # dataclasses
    for key, value in values.items():
        if key not in known:
            guess = closest(key, known)
            raise SpecError(
                f"unknown field {key!r}",
                where=where,
                expected=f"one of {', '.join(known)}",
                next_step=f"did you mean {guess!r}?" if guess else None,
            )
        plain, words = _PLAIN.get(known[key], (object, ""))
        if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
            raise SpecError(f"{key} must be {words}", where=where, got=repr(value))
    needed = [
        f.name
        for f in fields(kind)  # type: ignore[arg-type]  # dataclasses
        if f.default is MISSING and f.default_factory is MISSING
    ]
    if lacking := [name for name in needed if name not in values]:
        raise SpecError(
            f"an incomplete {kind.__name__.lower()}: {', '.join(lacking)} missing",
            where=where,
            expected=f"at least {', '.join(needed)}",
            got=", ".join(values) or "nothing",
        )
    try:
        return kind(**values)
    except TypeError as err:
        raise SpecError(f"incomplete {kind.__name__}: {err}", where=where) from err


def _texts(raw: dict[str, Any], key: str, where: object) -> tuple[str, ...]:
    """A list of names."""
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise SpecError(f"{key} must be a list of names", where=where, got=repr(value))
    return tuple(value)


def _table(raw: dict[str, Any], key: str, where: object) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise SpecError(f"{key} must be a table", where=where, got=repr(value))
    return value


def _tables(raw: dict[str, Any], key: str, where: object) -> list[dict[str, Any]]:
    """The `[[key]]` tables, taken out of `raw`."""
    value = raw.pop(key, [])
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise SpecError(f"write [[{key}]], one table each", where=where, got=repr(value))
    return value


def _by_value(raw: dict[str, Any], key: str, where: object) -> dict[int, Any]:
    """A table with label values, which TOML keys hold as text."""
    table = _table(raw, key, where)
    if wrong := [k for k in table if not k.isdecimal()]:
        raise SpecError(f"a label value in {key} is not a whole number", where=where, got=wrong[0])
    return {int(k): v for k, v in table.items()}


def load_split(path: Path) -> Split:
    """Read a split file: `train`, `validation`, `test` (ids or ranges) or `draw`, and `origin`."""
    return _split(read_toml(path), path.name, path)


def _split(raw: dict[str, Any], name: str, where: object) -> Split:
    raw = dict(raw)
    for part in PARTS:
        if not isinstance(raw.get(part, []), list):
            raise SpecError(f"{part} must be a list of case ids", where=where, got=raw[part])
        raw[part] = expand_ids(raw.get(part, []), where)
    if "draw" in raw:
        draw = dict(_table(raw, "draw", where))
        draw["needs"] = _texts(draw, "needs", where)
        draw["without"] = expand_ids(draw.get("without", []), where)
        for needed in draw["needs"]:
            structure(needed, where)
        raw["draw"] = _make(Draw, draw, f"{where}, draw")
    return _make(Split, {"name": name, **raw}, where)


def _source(raw: dict[str, Any], where: str) -> Source:
    for key in ("labels", "sides"):
        raw[key] = _by_value(raw, key, where)
    raw["sides"] = {v: tuple(p) if isinstance(p, list) else (p,) for v, p in raw["sides"].items()}
    raw["masks"] = _table(raw, "masks", where)
    for name in (*raw["labels"].values(), *raw["masks"].values()):
        if not isinstance(name, str):
            raise SpecError("a label stands for one structure", where=where, got=repr(name),
                            next_step="for a pair under one value use `sides`")  # fmt: skip
    ignored = raw.get("ignored", [])
    if not isinstance(ignored, list) or not all(isinstance(v, int) for v in ignored):
        raise SpecError("ignored must be a list of label values", where=where, got=repr(ignored))
    raw["ignored"] = tuple(ignored)
    raw["partial"] = tuple(
        _make(
            Partial,
            {
                **p,
                "cases": expand_ids(p.get("cases", []), where),
                "annotates": _texts(p, "annotates", where),
            },
            where,
        )
        for p in _tables(raw, "partial", where)
    )
    return _make(Source, raw, where)


def load_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file.

    A split is a path relative to the file, which may not leave its folder, or stands in the file.
    Structures of `[[structure]]` tables are declared to the taxonomy.
    """
    raw = read_toml(path)
    folder = path.parent.resolve()

    def split(given: Any, where: str) -> Split:
        if isinstance(given, dict):
            return _split(given, where.rpartition(", ")[2], where)
        if not isinstance(given, str):
            raise SpecError("a split is a file or a table", where=where, got=repr(given))
        need_inner(given, f"{path}, split file")
        target = (folder / given).resolve()
        if not target.is_relative_to(folder):
            raise SpecError(
                "a split file lies outside the benchmark's folder",
                where=path,
                expected=f"a file below {folder}, not a link that leads out of it",
                got=f"{given} → {target}",
                next_step="copy the file there",
            )
        return load_split(target)

    declared = []
    for item in _tables(raw, "structure", path):
        name = str(item.get("name", "?"))
        words = {"prompt": name.replace("_", " "), **item, "aliases": _texts(item, "aliases", path)}
        declared.append(_make(Structure, words, f"{path}, structure {name!r}"))
    declare(declared, path)
    sources = [
        _source(item, f"{path}, source {item.get('name', '?')!r}")
        for item in _tables(raw, "source", path)
    ]
    steps = []
    for item in _tables(raw, "step", path):
        where = f"{path}, step {item.get('name', '?')!r}"
        for key in {"learns", "shows"} & {*item, "learns"}:
            item[key] = _texts(item, key, where)
        for key in ("split", "phantom_split"):
            if key in item:
                item[key] = split(item[key], where)
        steps.append(_make(Step, item, where))
    pre = {k: tuple(v) if isinstance(v, list) else v
           for k, v in _table(raw, "preprocessing", path).items()}  # fmt: skip
    groups = _table(raw, "groups", path)
    return _make(
        Benchmark,
        {
            **raw,
            "groups": {name: _texts(groups, name, f"{path}, groups") for name in groups},
            "sources": tuple(sources),
            "steps": tuple(steps),
            "preprocessing": _make(Preprocessing, pre, path),
            "declares": tuple(declared),
        },
        path,
    )
