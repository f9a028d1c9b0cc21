"""The command line's applications, and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import clbench
from clbench.errors import SettingError, StoreError, unknown_name

if TYPE_CHECKING:
    from clbench.report.tables.render import Table
    from clbench.spec.splits import Split


app = typer.Typer(
    name="clbench",
    help="Continual-learning benchmarks for 3-D medical segmentation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"clbench {clbench.__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Continual-learning benchmarks for 3-D medical segmentation."""


data_app = typer.Typer(help="Look at data folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")
check_app = typer.Typer(
    help="Is a strategy or a benchmark honest? Rule by rule; status 1 where one fails.",
    no_args_is_help=True,
)
app.add_typer(check_app, name="check")
phantom_app = typer.Typer(
    help="Look at runs on the phantom, where the truth of every organ is known.",
    no_args_is_help=True,
)
app.add_typer(phantom_app, name="phantom")

RESULTS = Path("results")


def existing(results: Path) -> Path:
    """A results folder somebody named must be there; the default one may still be missing."""
    if results != RESULTS and not results.is_dir():
        raise StoreError(
            "there is no such folder of results",
            where=results,
            next_step="name the --out of `clbench run`, as seen from this folder",
        )
    return results


def _known_scoring(scoring: str) -> str:
    one_of("--scoring", scoring, {"strict": 1, "paper": 1})
    return scoring


def _known_format(format_: str) -> str:
    from clbench.report.tables.render import FORMATS

    one_of("--format", format_, dict.fromkeys(FORMATS))
    return format_


Results = Annotated[Path, typer.Option(help="Folder of results.", callback=existing)]
Out = Annotated[Path, typer.Option(help="Where run folders go.")]
Bench = Annotated[str, typer.Option(help="Benchmark, or path of a TOML file.")]
Scoring = Annotated[str, typer.Option(help="strict or paper.", callback=_known_scoring)]
Format = Annotated[
    str,
    typer.Option("--format", help="terminal, md, csv, tex or html.", callback=_known_format),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="group.name=value, any number of times.")
]
ExpectHu = Annotated[
    list[str] | None, typer.Option("--set", help="data.expect_hu=false: images need not be HU.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Step = Annotated[
    int | None, typer.Option(help="1-based step after which the model is taken; default the last.")
]

# options of `clbench run` that other commands take
Data = Annotated[str | None, typer.Option(help="As in clbench run.")]
Splits = Annotated[list[str] | None, typer.Option("--split", help="As in clbench run.")]
Cache = Annotated[Path | None, typer.Option(help="As in clbench run.")]


def parse_order(text: str) -> list[int]:
    """`3,1,2` → [3, 1, 2]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingError(
            "an order is a list of numbers of steps",
            where="--order",
            expected="each step once, such as 3,1,2",
            got=text or "nothing",
            next_step="write the numbers of the steps, or leave --order out",
        )
    return list(map(int, parts))


def parse_seeds(text: str) -> list[int]:
    """`0-2,5` → [0, 1, 2, 5]."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise SettingError(
                "seeds are whole numbers or ranges",
                where="--seeds",
                expected="0-2 or 0,1,2",
                got=text or "nothing",
            )
        if dash and int(high) < int(low):
            raise SettingError(
                "a range of seeds runs backwards",
                where="--seeds",
                expected=f"{high}-{low}",
                got=part.strip(),
            )
        seeds += range(int(low), int(high or low) + 1)
    return list(dict.fromkeys(seeds))


def parse_splits(assignments: list[str]) -> dict[str, Split]:
    """`btcv=FILE.toml` or `btcv=NAME` (a split that comes with clbench) → source → split."""
    from importlib import resources

    from clbench.spec.splits import FORMAT
    from clbench.spec.toml import load_split

    splits = {}
    for assignment in assignments:
        source, equals, target = assignment.partition("=")
        if not equals:
            raise SettingError(
                "--split needs SOURCE=FILE.toml",
                where=f"--split {assignment}",
                expected="the name of a source or step of the benchmark, =, and a split file",
                got=assignment,
                next_step=FORMAT,
            )
        if target.endswith(".toml"):
            path = Path(target)
        else:
            home = resources.files("clbench.benchmarks.splits")
            shipped = [p.name[:-5] for p in home.iterdir() if p.name.endswith(".toml")]
            if target not in shipped and ("/" in target or Path(target).suffix):
                raise SettingError(
                    "a split file is called FILE.toml",
                    where=f"--split {assignment}",
                    got=target,
                    next_step=FORMAT,
                )
            if target not in shipped:
                raise unknown_name("split", target, shipped, f"--split {assignment}")
            path = Path(str(home / f"{target}.toml"))
        if source in splits:
            raise SettingError("two splits are given for one", where=f"--split {assignment}")
        splits[source] = load_split(path)
    return splits


def parse_expect_hu(assignments: list[str]) -> bool:
    """`data.expect_hu=false`, the one setting of a command that makes no run, → its value."""
    from clbench.spec.settings import DataSettings, change, split_overrides

    groups = split_overrides(assignments)
    others = [f"{g}.{n}" for g, values in groups.items() for n in values]
    if others not in ([], ["data.expect_hu"]):
        raise SettingError(
            "this command takes one setting only",
            where="--set",
            expected="data.expect_hu=false",
            got=", ".join(others),
        )
    return change(DataSettings(), groups.get("data", {}), "data").expect_hu


def one_of(option: str, value: str, choices: dict[str, Any]) -> Any:
    """The choice called `value`, or an error that lists them.

    Args:
        option: the option as typed, such as `--format`; named in the error.
        value: the word given for it.
        choices: word → what it stands for.
    """
    if value not in choices:
        raise SettingError("unknown value", where=option, expected=", ".join(choices), got=value)
    return choices[value]


def show(table: Table, format_: str = "terminal") -> None:
    """Print a table."""
    from clbench.report.tables.render import render

    typer.echo(render(table, format_))


def show_all(tables: Iterable[Table], format_: str = "terminal") -> None:
    """Print tables, a blank line after each."""
    for table in tables:
        show(table, format_)
        typer.echo("")
