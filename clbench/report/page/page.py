"""The report on disk: tables as CSV and LaTeX, Markdown, a checklist, one page without network.

The page is `page.html.j2` filled in; styles, scripts, figures and the CSV
files are inside it.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from clbench.errors import ClbenchError
from clbench.evaluation.explained import FIGURES as EXPLAIN_FOLDER
from clbench.report.page.calibration import calibration_table
from clbench.report.page.checklist import checklist, markdown
from clbench.report.page.limits import limits
from clbench.report.page.matrix import COST, OWN, SYMBOLS, Matrix, matrix_of
from clbench.report.page.provenance import cards, provenance
from clbench.report.scores import Run
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import Tested
from clbench.report.significance.sentences import own_sentence, sentence
from clbench.report.significance.tables import all_tables
from clbench.report.tables.render import EMPTY, Table, markdown_cell, render, superscript
from clbench.report.template import filled
from clbench.store import files as store_files

EXPLAINED: Mapping[str, tuple[str, str]] = {
    "lost_dice": (
        "Where the lost Dice went",
        "causes of the lost Dice, what its voxels are called instead, and head or body",
    ),
    "before_after": (
        "Before and after",
        "before and after, the median and worst case: the slice where most structures lost voxels",
    ),
}
"""Figure of `clbench explain` → title, and what it shows."""
FIRST = ("plane", "forgetting", "external")
"""Figures that stand right below the matrix."""


class Spoken(NamedTuple):
    """One verdict on the page."""

    word: str
    """Of the verdict set, or `hole`."""
    text: str
    """The sentence."""
    cautions: tuple[str, ...]
    """What a reader must know."""
    label: str
    """What the badge says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `make_report` leaves."""

    files: tuple[Path, ...]
    """The page first."""
    lines: tuple[str, ...]
    """What to print: the matrix, what it says, and where the page is."""


def make_report(study: Analysis, out: Path) -> Report:
    """Read the runs, test, write; what `clbench report` does.

    Args:
        study: the runs, the reference and the protocol.
        out: folder to write to.

    Raises:
        StoreError: see `clbench.report.study.Study.dice` and `write_report`.
        UnknownName: no finished run of the reference.
    """
    protocol = study.protocol
    _ = study.dice  # runs that cannot be compared are refused before any drawing
    extra, absent = other_tables(study)
    pictures, undrawn = figures_of(study)
    explained, unexplained = explained_figures(study)
    options = {
        "bench": study.bench,
        "ref": study.reference,
        "results": study.results,
        "scoring": study.scoring,
        "margin": f"{protocol.margin:g}",
        "alpha": f"{protocol.alpha:g}",
        "correction": protocol.correction,
    }
    typed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = shlex.join(["clbench", "report", *typed])
    matrix = matrix_of(study)
    files = write_report(
        study,
        out,
        matrix=matrix,
        command=command,
        extra=extra,
        pictures=[*pictures, *explained],
        absent=[*absent, *undrawn, *unexplained],
    )
    lines = (render(matrix.table(), "terminal"), "", *matrix.summary, f"Report: {files[0]}")
    return Report(files=tuple(files), lines=lines)


def write_report(
    a: Analysis,
    out: Path,
    *,
    matrix: Matrix,
    command: str,
    extra: Mapping[str, Table] | None = None,
    pictures: Sequence[Mapping[str, str]] = (),
    absent: Sequence[str] = (),
) -> list[Path]:
    """Write the report.

    Args:
        a: the analysis.
        out: folder to write to; files of the same names are replaced.
        matrix: what it answers with.
        command: how it was called.
        extra: further tables for the page: file stem → table.
        pictures: figures for the page, in order, see `figures_of`.
        absent: figures and tables that could not be made, in words.

    Returns:
        The files, the page first.

    Raises:
        StoreError: the folder cannot be written.
    """
    store_files.make_folder(out)
    tables = {
        "matrix": matrix.table(),
        **all_tables(a),
        **(extra or {}),
        "calibration": calibration_table(),
    }
    files = []
    for stem, table in tables.items():
        for format_ in ("csv", "tex"):
            path = out / f"{stem}.{format_}"
            store_files.write_bytes(path, render(table, format_).encode() + b"\n")
            files.append(path)
    spoken = _spoken(a)
    texts = {
        "report.md": _markdown(a, matrix, spoken, tables, absent, command),
        "checklist.md": markdown(a),
        "index.html": _html(a, matrix, spoken, tables, pictures, absent, command),
    }
    for name, text in texts.items():
        store_files.write_bytes(out / name, text.encode())
    return [out / "index.html", out / "report.md", out / "checklist.md", *files]


def common_cautions(a: Analysis) -> list[str]:
    """What holds for every verdict that has a number; said once, not under each."""
    with_numbers = [c.cautions for c in a.comparisons if not c.hole]
    if len(with_numbers) < 2:
        return []
    return [w for w in with_numbers[0] if all(w in others for others in with_numbers)]


def _spoken(a: Analysis) -> dict[str, list[Spoken]]:
    """Heading → verdicts."""
    common = common_cautions(a)

    def spoken(x: Tested, text: str) -> Spoken:
        word = {"forgets": "worse", "gains": "better", "keeps": "equivalent"}.get(x.word, x.word)
        return Spoken(word, text, tuple(c for c in x.cautions if c not in common), x.word)

    verdicts: dict[str, list[Spoken]] = {}
    for c in a.comparisons:
        verdicts.setdefault(c.endpoint.title, []).append(spoken(c, sentence(c, a.protocol)))
    for name, other in a.external.items():
        verdicts[f"After the last step, external test on {name}"] = [
            spoken(c, sentence(c, a.protocol)) for c in other.at_the_end
        ]
    if a.own:
        verdicts["Does it forget?"] = [spoken(o, own_sentence(o, a.protocol)) for o in a.own]
    return verdicts


def _markdown(
    a: Analysis,
    matrix: Matrix,
    spoken: Mapping[str, Sequence[Spoken]],
    tables: Mapping[str, Table],
    absent: Sequence[str],
    command: str,
) -> str:
    cell = markdown_cell
    lines = [f"# {cell(a.dice.title())}: report", "", render(tables["matrix"], "md"), ""]
    lines += [*(f"- {cell(text)}" for text in matrix.summary), "", f"`{command}`", ""]
    lines += ["## Provenance", "", "| fact | value |", "|---|---|"]
    lines += [f"| {cell(fact)} | {cell(value)} |" for fact, value in provenance(a)]
    lines += ["", "## Verdicts"]
    lines += ["", *(f"For each of them: {w}.  " for w in common_cautions(a))]
    for heading, verdicts in spoken.items():
        lines += ["", f"### {heading}", ""]
        for v in verdicts:
            lines += [f"- {cell(v.text)}", *(f"  - {cell(c)}" for c in v.cautions)]
    lines += ["", "## Tables"]
    for stem, table in tables.items():
        if stem != "matrix":  # it stands at the top
            lines += ["", render(table, "md")]
    lines += ["", "## What each strategy took of the past"]
    for card in cards(a):
        facts = (f"- {cell(k)}: {cell(v)}" for k, v in card.rows)
        lines += ["", f"### {cell(card.label)}", "", *facts]
    lines += ["", "## What this cannot show", ""]
    lines += [f"- {cell(text)}" for text in [*limits(a), *absent]]
    return "\n".join(lines) + "\n"


def _html(
    a: Analysis,
    matrix: Matrix,
    spoken: Mapping[str, Sequence[Spoken]],
    tables: Mapping[str, Table],
    pictures: Sequence[Mapping[str, str]],
    absent: Sequence[str],
    command: str,
) -> str:
    return fill(
        "page.html.j2",
        title=f"{a.dice.title()}: {a.dice.reference.label} against the others",
        phantom=a.dice.phantom,
        matrix=matrix,
        own=OWN,
        cost=COST,
        first=[p for p in pictures if p["name"] in FIRST],
        command=command,
        provenance=provenance(a),
        spoken=spoken,
        cautions=common_cautions(a),
        tables={
            stem: (table, base64.b64encode(render(table, "csv").encode()).decode())
            for stem, table in tables.items()
            if stem != "matrix"
        },
        matrix_csv=base64.b64encode(render(tables["matrix"], "csv").encode()).decode(),
        empty=EMPTY,
        symbols=SYMBOLS,
        pictures=[p for p in pictures if p["name"] not in FIRST],
        cards=cards(a),
        checklist=checklist(a),
        limits=[*limits(a), *absent],
    )


def fill(template: str, **values: object) -> str:
    """A page from a template of this folder, with the style that all pages share.

    Args:
        template: name of the file.
        values: what it shows.
    """
    filters = {"words": _words, "whole": _whole, "superscript": superscript}
    return filled("clbench.report.page", template, filters, **values)


def _whole(table: Table) -> list[list[str]]:
    """Rows that each say everything: a cell over several rows is repeated, since rows move."""
    rows = [list(row) for row in table.rows]
    for (i, j), n in table.spans.items():
        for row in rows[i + 1 : i + n]:
            row[j] = rows[i][j]
    return rows


def _words(text: str) -> Markup:
    """Escaped text with `code` and **bold**."""
    safe = str(escape(text))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe))  # noqa: S704  # escaped


def other_tables(study: Analysis) -> tuple[dict[str, Table], list[str]]:
    """The tables beside the tests, and what could not be made, with the reason."""
    from clbench.report.paper import bsp
    from clbench.report.paper.detection import TUMORS
    from clbench.report.paper.printed import BENCH
    from clbench.report.tables import make_table
    from clbench.report.tables.lost_dice import explained_runs

    names = {n: n for n in ("summary", "learning", "continual", "distances", "cost")}
    if explained_runs(study):
        names["lost_dice"] = "lost_dice"
    if set(study.dice.learned_at) & {f"{t}_tumor" for t in TUMORS}:
        names["detection"] = "6"
    names |= {f"table{n}": str(n) for n, own in BENCH.items() if own == study.bench}
    names |= {f"bsp_{n}": f"bsp_{n}" for n in bsp.WHAT if study.bench == bsp.COURSE}
    if study.dice.external:
        names["external"] = "external"
    if any(step.again for step in study.dice.record.course.steps):
        names["domains"] = "domains"
    asked = [(stem, name, study) for stem, name in names.items()]
    asked += [(f"learning_{on}", "learning", other) for on, other in study.external.items()]
    tables: dict[str, Table] = {}
    absent: list[str] = []
    for stem, name, of in asked:
        source = "measured" if name == "6" else "both"
        try:
            tables[stem] = make_table(name, of, source=source)
        except ClbenchError as err:  # a hole of one table must not take the report down
            absent.append(f"The table `{stem}`: {err.brief}.")
        except Exception as err:  # nor a fault of ours; the page says so
            absent.append(f"The table `{stem}`: {type(err).__name__}: {err}.")
    return tables, absent


def figures_of(study: Analysis) -> tuple[list[dict[str, str]], list[str]]:
    """Every figure that the runs allow, and what could not be drawn, with the reason.

    Returns:
        `name`, `title`, `caption` and `uri` of each: an <img> of an SVG runs no script and keeps
        its ids to itself; and a sentence for each that is missing.
    """
    from clbench.report.figures import FIGURES, due, gallery

    drawn, missing = gallery(study)
    shows = {
        key: FIGURES[name][1] + ("" if of is study else of.dice.heading.partition(",")[2])
        for key, name, of in due(study)
    }
    pictures = [
        {
            "name": name, "title": name.replace("-", " ").capitalize(), "caption": shows[name],
            "uri": f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}",
        }
        for name, content in drawn.items()
    ]  # fmt: skip
    return pictures, [f"The figure `{name}`: {why}." for name, why in missing.items()]


def explained_figures(study: Analysis) -> tuple[list[dict[str, str]], list[str]]:
    """The figures of `clbench explain`, of each strategy's first seed that was explained.

    Returns:
        As `figures_of`: pictures, and a sentence for each that is not beside its run.
    """
    from clbench.report.tables.lost_dice import explained_runs

    pictures, absent = [], []
    first: dict[str, Run] = {}
    for label, run in explained_runs(study):
        first.setdefault(label, run)
    for number, (label, run) in enumerate(first.items()):
        of = f"{label}, seed {run.record.seed}"
        for stem, (title, caption) in EXPLAINED.items():
            path = run.folder / EXPLAIN_FOLDER / f"{stem}.png"
            try:
                content = base64.b64encode(path.read_bytes()).decode()
            except OSError:
                absent.append(
                    f"The figure `{stem}` of {of}: not in `{EXPLAIN_FOLDER}/` of the run; "
                    f"`clbench explain {shlex.quote(str(run.folder))}` draws it."
                )
                continue
            pictures.append(
                {
                    "name": f"{stem.replace('_', '-')}-{number}",
                    "title": f"{title}: {of}",
                    "caption": caption,
                    "uri": f"data:image/png;base64,{content}",
                }
            )
    return pictures, absent
