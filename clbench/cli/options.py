"""The command line's applications, and options that several commands share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

import clbench
from clbench.errors import SettingError, StoreError, unknown_name

if TYPE_CHECKING:
    from clbench.report.tables.render import Table
    from clbench.spec.splits import Split


class Command(TyperCommand):
    """A command that refuses a word which it would not use: an empty one, or an option's second.

    Of an option that takes one value, the parser keeps the last one and drops those before it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            SettingError: one of them would be passed over.
        """
        args = [_at_home(word) for word in args]
        if not ctx.resilient_parsing:
            _refuse_empty(ctx, args)
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(given).items():
                if times > 1 and not (option.multiple or getattr(option, "is_flag", False)):
                    _refuse_repeated(ctx, option, args)
        return super().parse_args(ctx, args)


class Commands(typer.Typer):
    """Commands, each a `Command`."""

    def command(self, name: str | None = None, **more: Any) -> Callable[..., Any]:
        """Register a function as a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **more})


def _at_home(word: str) -> str:
    """A word with the home folder in the place of `~`, which bash leaves in `--out=~/runs`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value != "~" and not value.startswith("~/"):
        return word
    try:
        return f"{option}{equals}{Path(value).expanduser()}"
    except RuntimeError as err:
        raise SettingError(
            "it is not known where the home folder is", where=word, next_step="export HOME=…"
        ) from err


def _refuse_empty(ctx: Any, words: Sequence[str]) -> None:
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if word and not (option.startswith("--") and equals and not value):
            continue
        before = words[i - 1] if i and words[i - 1].startswith("--") else ""
        raise SettingError(
            "an empty word is given",
            where=f"`{ctx.command_path}`",
            expected="a value" if word or before else "a word",
            got=f"{option or before} ''".strip(),
            next_step="a variable of the shell that is not set leaves an empty word: set it, or "
            + (f"leave {option or before} out" if word or before else "leave the word out"),
        )


def _refuse_repeated(ctx: Any, option: Any, words: Sequence[str]) -> None:
    values = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in option.opts:
            values.append(value if equals else after)
    name = option.opts[0]
    raise SettingError(
        f"{name} is given {len(values)} times, and takes one value",
        where=f"`{ctx.command_path}`",
        expected=f"{name} once: {option.help}",
        got=", ".join(values),
        next_step=f"keep one {name}; the others would be dropped",
    )


def typed(ctx: typer.Context, names: Iterable[str]) -> list[tuple[str, str]]:
    """Those of the options that stand on the command line, each with what was typed for it.

    Args:
        ctx: of the command.
        names: of parameters of the command's function.
    """
    options = {option.name: option.opts[0] for option in ctx.command.params}
    given = []
    for name in names:
        value = ctx.params.get(name)
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            flag = isinstance(value, bool)
            given.append((options[name], options[name] if flag else f"{options[name]} {said}"))
    return given


def refuse_beside(
    ctx: typer.Context, names: Iterable[str], mode: str, *, acts: str, next_step: str = ""
) -> None:
    """Refuse options that would be passed over in this mode of a command.

    Args:
        ctx: of the command.
        names: of parameters of the command's function.
        mode: what makes them idle, such as `--on local`.
        acts: with what they act.
        next_step: ends the error; empty: leave the option out.

    Raises:
        SettingError: one of them was typed.
    """
    for option, said in typed(ctx, names):
        raise SettingError(
            f"{option} does nothing with {mode}",
            where=f"`{ctx.command_path}`",
            expected=f"{option} with {acts}" if acts else f"no {option}",
            got=f"{said} with {mode}",
            next_step=next_step or f"leave {option} out",
        )


app = Commands(
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


data_app = Commands(help="Look at data folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")
check_app = Commands(
    help="Is a strategy or a benchmark honest? Rule by rule; status 1 where one fails.",
    no_args_is_help=True,
)
app.add_typer(check_app, name="check")
phantom_app = Commands(
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


def course_name(bench: str, results: Path) -> str:
    """The name under which results of a course lie, of which there may be none yet.

    Args:
        bench: as typed.
        results: folder of results; a course in it need not be installed here.

    Raises:
        UnknownName: neither a course nor in the results.
        SpecError: the course's file is not there, or is none.
    """
    from clbench.spec import registry
    from clbench.spec.names import split_order

    name = registry.name_of(bench)
    known = registry.entries("benchmark")
    if split_order(name)[0] not in known and bench == name and not (results / name).is_dir():
        raise unknown_name("benchmark", name, known, "--bench")
    return name


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

    splits: dict[str, Split] = {}
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
            path = Path(target).expanduser()
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
            raise SettingError(
                "two splits are given for one",
                where=f"--split {assignment}",
                expected=f"one split of {source}",
                got=f"{splits[source].name} and {target}",
                next_step="keep one of the two; steps of one source may be named one by one",
            )
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
