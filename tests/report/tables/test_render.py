"""Tables in type: five formats, joined headers, shared cells, marks that need no color."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clbench.report.significance.analysis import Analysis
from clbench.report.tables.render import (
    EMPTY,
    FORMATS,
    Table,
    html_fragment,
    markdown_cell,
    number,
    render,
    signed,
)

WIDE = Table(
    title="A & B", columns=("k", "a_b", "c", "d"), rows=(("x|y", "1.0", "2.0 ± 0.1", EMPTY),),
    notes=("100 %",), block=2,
)  # fmt: skip
SHARED = Table(
    title="Dice", columns=("method", "Step 1", "Step 2", "Step 1", "Step 2", "verdict"),
    over=("", "Spleen", "Spleen", "Liver", "Liver", ""),
    rows=(
        ("LwF", "0.9 p", "0.1 p", "0.8 p", "0.2 p", "worse"),
        ("ILT", "", "0.3 p", "", "N/A", ""),
        ("PLOP", "", EMPTY, "", "0.5 p", ""),
        ("Ours", "0.7 p", "0.4 p", "0.6 p", "0.6 p", ""),
    ),
    keys=1, block=2, tail=1, spans={(0, 1): 3, (0, 3): 3},
    marks={(0, 1): frozenset({"best"}), (3, 1): frozenset({"second"}),
           (3, 2): frozenset({"best", "proven"}), (3, 4): frozenset({"best", "untestable"})},
    rules=frozenset({3}), notes=("p: printed",),
)  # fmt: skip


def test_wide_tables_come_in_blocks() -> None:
    text = render(WIDE, "terminal")
    heads = [line for line in text.splitlines() if line.startswith("k")]
    assert [h.split() for h in heads] == [["k", "a_b", "c"], ["k", "d"]]


def test_a_tail_column_joins_the_last_block_only() -> None:
    heads = [x for x in render(SHARED, "terminal").splitlines() if x.startswith("method")]
    assert [h.split() for h in heads] == [
        ["method", "Step", "1", "Step", "2"], ["method", "Step", "1", "Step", "2", "verdict"]
    ]  # fmt: skip


def test_a_shared_cell_stands_once_on_its_middle_row() -> None:
    for format_ in ("terminal", "md"):
        text = render(SHARED, format_)
        assert text.count("0.9 p") == 1
        (line,) = [x for x in text.splitlines() if "0.9 p" in x]
        assert "ILT" in line
        assert "0.3 p" in line  # the row's own cells are unharmed


def test_marks_need_no_color() -> None:
    text = render(SHARED, "terminal")
    for mark in ("0.9 p¹", "0.7 p²", "0.4 p¹*", "0.6 p¹†"):
        assert mark in text
    md = render(SHARED, "md")
    for mark in ("**0.9 p**", "<ins>0.7 p</ins>", "**0.4 p**\\*", "**0.6 p**†"):
        assert mark in md
    page = render(SHARED, "html")
    for mark in ("<strong>0.9 p</strong>", "<u>0.7 p</u>", "<sup>*</sup>", "<sup>†</sup>",
                 'class="proven"', "#fde0e0", "rowspan=\"3\"", 'class="absent"'):  # fmt: skip
        assert mark in page
    tex = render(SHARED, "tex")
    for mark in (r"\multirow{3}{*}{\textbf{0.9 p}}", r"\underline{0.7 p}", r"\cellcolor{red!12}",
                 r"$^{\dagger}$", r"\multicolumn{2}{c}{Spleen}", r"\cmidrule(lr){2-3}",
                 r"\textcolor{gray}{N/A}"):  # fmt: skip
        assert mark in tex


def test_headers_line_up_with_their_columns() -> None:
    lines = render(SHARED, "terminal").splitlines()
    at = next(i for i, x in enumerate(lines) if x.startswith("method"))
    over, columns = lines[at - 1], lines[at]
    assert columns.index("Step 1") < over.index("Spleen") < len(columns)


def test_markdown_and_latex_are_escaped() -> None:
    md = render(WIDE, "md")
    assert "| x\\|y | 1.0 | 2.0 ± 0.1 |" in md
    tex = render(WIDE, "tex")
    assert r"\caption{A \& B}" in tex
    assert r"a\_b" in tex
    assert r"2.0 $\pm$ 0.1" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 2
    assert "100 \\%" in tex


def test_a_label_of_any_text_stays_in_its_cell() -> None:
    label = "reg (a|b <i>x</i>, l1\nl2, &amp;, p < 0.1)"
    odd = Table(title=label, columns=("method", label), rows=((label, "0.5"),), notes=(label,),
                marks={(0, 1): frozenset({"second"})})  # fmt: skip
    safe = "reg (a\\|b &lt;i>x&lt;/i>, l1 l2, &amp;amp;, p < 0.1)"
    lines = render(odd, "md").splitlines()
    assert lines == [
        f"**{safe}**", "", f"| method | {safe} |", "|---|---:|", f"| {safe} | <ins>0.5</ins> |",
        "", safe,
    ]  # fmt: skip
    assert markdown_cell("a `b|c <d>` <e>") == "a `b\\|c <d>` &lt;e>"
    row = next(x for x in render(odd, "terminal").splitlines() if x.endswith("0.5²"))
    assert row.startswith(label.replace("\n", " "))


def test_latex_has_one_minus() -> None:
    cells = ("-0.011 to +0.028", "[-0.1, −.5]", "1e-4", "12-14", "-")
    tex = render(Table(title="", columns=("m", *cells), rows=(("x -1", *cells),)), "tex")
    assert r"x -1 & $-$0.011 to +0.028 & {[}$-$0.1, $-$.5{]} & 1e-4 & 12-14 & - \\" in tex


def test_html_is_escaped_and_balanced() -> None:
    class Check(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("br", "meta"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    for table in (WIDE, SHARED):
        check = Check()
        check.feed(render(table, "html"))
        assert not check.open
    assert "A &amp; B" in html_fragment(WIDE)


def test_every_html_row_covers_every_column() -> None:
    text = html_fragment(SHARED)
    body = text.split("<tbody>")[1].split("</tbody>")[0].split("<tr")[1:]
    assert [row.count("<td") for row in body] == [3, 2, 2, 3]  # two rows lie under a shared cell


def test_csv_is_read_back() -> None:
    assert list(csv.reader(io.StringIO(render(WIDE, "csv")))) == [
        list(WIDE.columns),
        list(WIDE.rows[0]),
    ]


def test_latex_rows_have_as_many_cells_as_the_table_has_columns() -> None:
    for table in (WIDE, SHARED):
        width = 0
        for line in render(table, "tex").splitlines():
            if line.startswith(r"\begin{tabular}"):
                width = len(line.rsplit("{", 1)[1].rstrip("}"))
            elif line.endswith(r" \\"):
                cells = line.replace(r"\&", "").split("&")
                joined = sum(int(c.split("{")[1][0]) - 1 for c in cells if r"\multicolumn" in c)
                assert len(cells) + joined == width, line


LATEX = shutil.which("pdflatex")
PAGE = (
    r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}"
    r"\usepackage{booktabs,multirow,graphicx}\usepackage[table]{xcolor}\begin{document}%s"
    r"\end{document}"
)


@pytest.mark.skipif(LATEX is None, reason="no LaTeX here; the structure is tested above")
def test_latex_compiles(tmp_path: Path) -> None:
    from clbench.report.paper.table import paper_table

    body = "\n".join(
        render(t, "tex")
        for t in (
            WIDE,
            SHARED,
            paper_table(10, Analysis(results=Path("none"), bench="tumor_ext"), source="printed"),
            paper_table(11, Analysis(results=Path("none"), bench="body_ext"), source="printed"),
        )
    )
    (tmp_path / "page.tex").write_text(PAGE % body, encoding="utf-8")
    done = subprocess.run(
        [str(LATEX), "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_numbers() -> None:
    assert number(0.12345) == "0.123"
    assert signed(0.0124) == "+0.012"
    assert signed(-0.0124) == "−0.012"
    assert number(float("nan")) == signed(float("nan")) == EMPTY
    assert set(FORMATS) == {"terminal", "md", "csv", "tex", "html"}
