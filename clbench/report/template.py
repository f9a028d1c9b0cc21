"""Texts and pages that are filled from a Jinja template beside the code that fills it."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined


def filled(package: str, template: str, **values: Any) -> str:
    """A template with its values; a value that is missing is an error.

    Args:
        package: the package that holds the template.
        template: its file, `NAME.html.j2` or `NAME.md.j2`; in HTML, values are escaped.
        values: by their names in the template.
    """
    environment = Environment(
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = resources.files(package).joinpath(template).read_text("utf-8")
    return environment.from_string(text).render(**values)
