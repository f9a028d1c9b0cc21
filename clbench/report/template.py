"""Texts and pages that are filled from a Jinja template beside the code that fills it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def filled(
    package: str,
    template: str,
    filters: Mapping[str, Any] = {},
    **values: Any,
) -> str:
    """A template with its values; a value that is missing is an error.

    Args:
        package: the package that holds the template, and those that it includes.
        template: its file, `NAME.html.j2` or `NAME.md.j2`; in HTML, values are escaped.
        filters: further ones that it calls, by name.
        values: by their names in the template.
    """
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)
