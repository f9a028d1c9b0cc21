"""Validation: types that check their fields (pydantic), and its errors in clbench's words.

The types of settings, course files and the paper's plan are dataclasses made by `checked`: types,
choices and bounds stand beside each field, and `dataclasses.replace` and `asdict` work on them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, is_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Predicate as Predicate
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.json_schema import GenerateJsonSchema

from clbench.errors import ClbenchError, closest, did_you_mean

T = TypeVar("T")
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)
Names = Annotated[
    tuple[str, ...],
    Predicate(lambda names: len(set(names)) == len(names)),
    Field(description="a list of names, each once"),
]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, Field))
def checked(raised: type[ClbenchError]) -> Callable[[type[T]], type[T]]:
    """Make a frozen, keyword-only dataclass that checks its fields.

    Args:
        raised: the error of a field that is unknown, missing, or of a wrong type or range.
    """

    def decorate(plain: type[T]) -> type[T]:
        kind = dataclass(frozen=True, kw_only=True, slots=True, config=CONFIG)(plain)
        init = kind.__init__

        @functools.wraps(init)
        def __init__(self: Any, **values: Any) -> None:  # noqa: N807  # takes its place
            try:
                init(self, **values)
            except ValidationError as err:
                name = values.get("name")
                where = kind.__name__.lower() + (f" {name!r}" if name is not None else "")
                raise from_validation_error(
                    err, TypeAdapter(kind), values, raised=raised, where=where
                ) from None

        kind.__init__ = __init__  # type: ignore[method-assign]
        return kind  # type: ignore[return-value]  # the class itself, checked now

    return decorate


def from_toml(
    kind: type[T], values: Mapping[str, Any], *, raised: type[ClbenchError], where: object
) -> T:
    """A `checked` type out of a TOML table: lists become tuples, nothing else changes its type.

    Args:
        kind: the type.
        values: the table.
        raised: the error of a field that is unknown, missing, or of a wrong type or range.
        where: the file.
    """
    checks = TypeAdapter(kind)
    try:
        # strict JSON: a list stands for a tuple and a key for a number; "1" and true for neither
        return checks.validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as err:
        raise from_validation_error(err, checks, values, raised=raised, where=where) from None


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def from_validation_error(
    error: ValidationError,
    checks: TypeAdapter[Any],
    values: Any,
    *,
    raised: type[ClbenchError],
    where: object,
    prefix: str = "",
) -> ClbenchError:
    """What pydantic found, as an error of clbench: a misspelt name first, else the first problem.

    Args:
        error: pydantic's.
        checks: of the type that was to be made.
        values: what it was to be made of.
        raised: the error to return.
        where: the file or option the values come from.
        prefix: stands before the name of a field, as `train.`
    """
    problems = sorted(error.errors(), key=lambda e: e["type"] not in _UNKNOWN)
    first, loc = problems[0], problems[0]["loc"]
    absent = first["type"] == "missing" and isinstance(loc[-1], str)
    named = absent or first["type"] in _UNKNOWN
    schema = checks.json_schema(schema_generator=_Schema)
    defs = schema.get("$defs", {})

    name, spot, given = "", schema, values
    for part in loc[:-1] if named else loc:
        spot = _resolved(spot, defs)
        if part in spot.get("properties", {}):
            name, spot = str(part), spot["properties"][part]
        elif isinstance(part, int) and "$ref" in spot.get("items", {}):
            item = given[part]
            called = item.get("name", part + 1) if isinstance(item, Mapping) else part + 1
            spot, where = spot["items"], f"{where}, {name} {called!r}"
        else:
            break
        given = given.get(part) if isinstance(given, Mapping) else given[part]

    if not named:
        requirement = _words(spot, defs, name)
        return raised(
            f"{prefix}{name} must be {requirement}",
            where=where,
            got=repr(given),
            next_step=did_you_mean(str(given), spot.get("enum", [])),
        )
    holder = _resolved(spot, defs)
    known = [f"{prefix}{n}" for n in holder.get("properties", {})]
    if absent:
        lacking = [
            str(e["loc"][-1])
            for e in problems
            if e["type"] == "missing" and e["loc"][:-1] == loc[:-1]
        ]
        return raised(
            f"an incomplete {name or _in_words(holder['title'])}: {', '.join(lacking)} missing",
            where=where,
            expected=f"at least {', '.join(holder['required'])}",
            got=", ".join(given) or "nothing",
        )
    key = f"{prefix}{loc[-1]}"
    guess = closest(key, known)
    return raised(
        f"unknown field {key!r}",
        where=where,
        expected=f"one of {', '.join(known)}",
        got=key,
        next_step=f"did you mean {guess if prefix else repr(guess)}?" if guess else None,
    )


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "none",
    "object": "a table",
}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


class _Schema(GenerateJsonSchema):
    """Leaves open what JSON cannot hold: a strategy's field may be of any type."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    options = [o for o in schema.get("anyOf", [schema]) if o.get("type") != "null"]
    return defs[options[0]["$ref"].rpartition("/")[2]] if "$ref" in options[0] else options[0]  # type: ignore[no-any-return]


def _words(schema: dict[str, Any], defs: dict[str, Any], name: str) -> str:
    """A field's JSON schema in words; its own description stands for them."""
    if "description" in schema:
        return str(schema["description"])
    if "anyOf" in schema:
        return " or ".join(_words(option, defs, name) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return "one of " + ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        items = [_words(item, defs, name) for item in schema["prefixItems"]]
        return f"{len(items)} values ({', '.join(items)})"
    if "$ref" in schema.get("items", {}):
        return f"tables: write [[{name}]], one table each"
    if "items" in schema:
        return f"a list, each {_words(schema['items'], defs, name)}"
    bounds = [f"{word} {schema[key]:g}" for key, word in _BOUNDS.items() if key in schema]
    kind = _TYPES.get("object" if "$ref" in schema else schema.get("type", ""), "another value")
    return " ".join([kind, " and ".join(bounds)]).strip()


def _in_words(title: str) -> str:
    """`TunedFile` → `tuned file`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", title).lower()
