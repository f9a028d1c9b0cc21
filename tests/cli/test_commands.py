"""Every command that an error or the doctor tells a user to type: in backticks, quoted, and parsed.

The commands are collected from the source. A word in capitals stands for what the user fills in.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from locations import ROOT
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import SettingError

GROUP: Any = typer.main.get_command(app)
COMMANDS = "|".join(GROUP.commands)
MENTION = re.compile(rf"(`?)(clbench (?:{COMMANDS})\b[^`\n]*)(`?)")
FILLED = "a folder/it's here"
"""What an inserted value may look like: a shell must be told where it ends."""
QUOTING = ("quote", "join", "again", "shell_words")
"""Calls whose value is quoted for a shell."""


def strings() -> Iterator[tuple[str, ast.JoinedStr | ast.Constant]]:
    """Place and node of every string of the package that is no docstring and no help text."""
    for path in sorted((ROOT / "clbench").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "clbench " not in text:
            continue
        left: list[ast.AST] = [ast.parse(text)]
        while left:
            node = left.pop()
            if isinstance(node, ast.JoinedStr | ast.Constant):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node
            elif not (
                (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
                or (isinstance(node, ast.keyword) and node.arg == "help")
            ):
                left += ast.iter_child_nodes(node)


def text_of(node: ast.JoinedStr | ast.Constant) -> str:
    """A string as it is printed; a value that is quoted for the shell is one, another one is not."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = []
    for piece in node.values:
        if isinstance(piece, ast.Constant):
            parts.append(str(piece.value))
            continue
        assert isinstance(piece, ast.FormattedValue)
        call = piece.value
        name = call.func if isinstance(call, ast.Call) else None
        called = getattr(name, "attr", getattr(name, "id", ""))
        parts.append(shlex.quote(FILLED) if called in QUOTING else FILLED)
    return "".join(parts)


NAMES = {f"clbench {name}" for name in GROUP.commands} | {
    f"clbench {name} {inner}"
    for name, group in GROUP.commands.items()
    for inner in getattr(group, "commands", ())
}
"""A command named alone is no command line."""
PRINTED = {
    ("clbench/report/paper/detection.py", "clbench score RUN adds the rows to a finished run"),
    ("clbench/report/tables/costs.py", "clbench cost RUN counts them without training"),
    ("clbench/data/checks/course_splits.py", "clbench phantom"),  # the origin of a split
}
"""Text of tables and records, where backticks would be printed."""
FENCED = ("clbench/deployment/publish/card.py",)
"""Files whose commands stand in blocks of code, one a line."""
MENTIONS = [
    (place, *match) for place, node in strings() for match in MENTION.findall(text_of(node))
]


def parse(command: str) -> None:
    """Parse a command line as the program does, and run nothing."""
    words = shlex.split(command)[1:]
    group, context = GROUP, GROUP.make_context("clbench", [], resilient_parsing=True)
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(
            name, list(words), parent=context, resilient_parsing=hasattr(group, "commands")
        )


OTHERS = {"--nproc-per-node", "--num-gpus", "--head", "--me", "--dirty", "--always"}
"""Options of torchrun, Ray, SLURM and git."""


def options_of(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    own = {word for option in command.params for word in option.opts}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_every_option_that_a_message_names_is_there() -> None:
    named = {
        (place, word)
        for place, node in strings()
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of(node))
    }
    assert len(named) > 100
    known = options_of(GROUP) | OTHERS
    assert [(place, word) for place, word in named if word not in known] == []


def test_commands_are_found_in_the_source() -> None:
    assert len(MENTIONS) > 15


@pytest.mark.parametrize(("place", "opened", "command", "closed"), MENTIONS, ids=str)
def test_a_command_works_when_pasted(place: str, opened: str, command: str, closed: str) -> None:
    if (place.partition(":")[0], command) in PRINTED:
        command = " ".join(command.split()[:3])
    elif place.partition(":")[0] not in FENCED:
        assert opened, f"{place}: put it in backticks, so that its end is seen: {command}"
        assert closed, f"{place}: its backtick is not closed in one string: {command}"
    if command not in NAMES:
        parse(command)


def test_lines_that_an_encoding_lacks_end_no_command() -> None:
    """A file of a terminal in Latin-1 has no rule under a table's head."""
    words = [sys.executable, "-m", "clbench", "table", "10", "--source", "printed"]
    more = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, env={**os.environ, **more}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Spleen" in done.stdout


def test_an_option_that_a_table_does_not_take_is_refused_with_its_default_too() -> None:
    for words in (["6", "--ref", "universal"], ["6", "--metric", "dice"]):
        done = CliRunner().invoke(app, ["table", *words])
        assert isinstance(done.exception, SettingError), words
