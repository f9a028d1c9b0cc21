"""Blocks of a Markdown file that name the command they come from, written anew by running it.

A block reads `<!-- $ clbench table summary … -->`, the output, `<!-- end -->`. So no number in a
README is typed by hand, and a test can tell a stale one.
"""

from __future__ import annotations

import re
import shlex

import typer
from typer.testing import CliRunner

from clbench.errors import ClbenchError

_BLOCK = re.compile(r"(<!-- \$ clbench (?P<words>[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewrite(text: str, app: typer.Typer) -> str:
    """`text` with every block's content replaced by what its command prints now.

    Raises:
        ClbenchError: a command fails; names it.
    """

    def fresh(match: re.Match[str]) -> str:
        result = CliRunner().invoke(app, shlex.split(match["words"]))
        if result.exit_code != 0:
            raise ClbenchError(
                "a command of the README fails", where=match["words"], got=result.exception
            )
        return f"{match[1]}\n{result.stdout.strip()}\n\n{match[3]}"

    return _BLOCK.sub(fresh, text)
