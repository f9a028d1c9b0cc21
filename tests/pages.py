"""Writes the blocks of the README pages anew: `python tests/pages.py README.md */README.md`.

A block reads `<!-- $ clbench table summary … -->`, the output, `<!-- end -->`; so no number in a
page is typed by hand, and a test can tell a stale one. Where the command is `clbench figure`, the
output is a link to the picture it has written. `$ tests/pages.py fuzz`, `torture`, `ratios` and
`growth` are what `tests/perf/fuzz_readers.py`, `make torture`, the scripts of `tests/perf/` with
`--record` and `tests/perf/growth.py` wrote to `results/calibration/`; `lowest` is what
`tests/perf/lowest.py` wrote to `results/settling/`; `gap` is made from runs and
pseudo labels there; `precision` compares `results/bf16` with `results/reference`. Commands run in the current folder, and their
paths are relative to it.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from locations import ROOT
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import ClbenchError
from clbench.report.figures import FIGURES
from clbench.report.tables.render import Table, render

BLOCK = re.compile(
    r"(<!-- \$ (?P<program>clbench|tests/pages\.py) (?P<command>[^\n]*?) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
TORTURE_PHASES = {
    "train": "training",
    "prune": "pruning and recovery",
    "pseudo": "pseudo-labelling",
    "examine": "examining",
    "write": "writing a file",
    "start": "between them",
}


def rewrite(text: str) -> str:
    """A Markdown text with every block's content replaced by what its command prints now.

    Raises:
        ClbenchError: a command fails; names it.
    """

    def fresh(block: re.Match[str]) -> str:
        if block["program"] == "clbench":
            output = printed(shlex.split(block["command"]))
        else:
            output = render(COUNTS[block["command"]](), "md").strip()
        return f"{block[1]}\n{output}\n\n{block[4]}"

    return BLOCK.sub(fresh, text)


def printed(arguments: Sequence[str]) -> str:
    """What a clbench command prints; of a figure the Markdown that shows its PNG."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code != 0:
        raise ClbenchError("a command of a page fails", where=arguments, got=result.exception)
    output = result.stdout.strip()
    if arguments[0] != "figure":
        return output
    (png,) = [path for path in output.splitlines() if path.endswith(".png")]
    return f"![{FIGURES[arguments[1]][1]}]({png})"


def rows_of(name: str, folder: str = "calibration") -> list[dict[str, str]]:
    """A file of counts in `results/calibration/` or another folder of results."""
    with (ROOT / "results" / folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fuzz_table() -> Table:
    """One row per property: inputs tried, read and refused."""
    counts = {
        r["property"]: [int(r[column]) for column in ("tried", "read", "refused")]
        for r in rows_of("fuzz.csv")
    }
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    return Table(
        title="Files the readers were tried on",
        columns=("what is odd about them", "tried", "read", "refused"),
        rows=tuple((what, *(f"{n:,}" for n in row)) for what, row in counts.items()),
        notes=(
            (
                "Read: the right volume in RAS, every label in its place; refused: an error that "
                "names the file and the next step. There was no third answer."
            ),
        ),
    )


def torture_table() -> Table:
    """One row per phase: the kills that landed in it."""
    values = {(r["of"], r["name"]): r["value"] for r in rows_of("torture.csv")}
    kills = {what: int(values["phase", name]) for name, what in TORTURE_PHASES.items()}
    methods = sum(of == "strategy" and int(v) > 0 for (of, _), v in values.items())
    return Table(
        title="Runs of the tiny course killed (SIGKILL) at random moments, and gone on",
        columns=("killed while", "times"),
        rows=(*((what, str(n)) for what, n in kills.items()), ("all", str(sum(kills.values())))),
        notes=(
            (
                f"{values['all', 'runs']} runs of {methods} methods; ended otherwise than the "
                f"undisturbed run: {values['all', 'different']}; files found half-written: "
                f"{values['all', 'half_written']}."
            ),
            (
                f"torch {values['host', 'torch']} on {values['host', 'device']}, "
                f"{values['host', 'threads']} thread(s), seed {values['all', 'seed']}."
            ),
        ),
    )


def ratios_table() -> Table:
    """The newest measurement of every ratio."""
    newest = {(r["script"], r["what"], r["threads"]): r for r in rows_of("ratios.csv")}
    return Table(
        title="Ratios, newest measurement of each",
        columns=("what", "ratio", "goal", "by", "CPU", "threads", "load", "date"),
        rows=tuple(
            (
                *(r[column] for column in ("what", "ratio", "goal")),
                f"`{r['script']}`",
                *(r[column] for column in ("cpu", "threads", "load", "date")),
            )
            for r in newest.values()
        ),
        notes=tuple(sorted({f"torch {r['torch']}" for r in newest.values()})),
    )


def growth_table() -> Table:
    """Every point of `tests/perf/growth.py`."""
    return Table(
        title="Growth of time and memory with the work",
        columns=("what grows", "to", "work", "time", "memory"),
        rows=tuple(
            (r["kind"], r["value"], *(f"{float(r[c]):.2f}" for c in GROWTH_RATIOS))
            for r in rows_of("growth.csv")
        ),
        notes=("Each as a ratio to the first of its kind; voxels: of a crop's side.",),
    )


def lowest_table() -> Table:
    """Per prior: how often a structure of step 1 stayed unlearned."""
    rows = rows_of("lowest.csv", "settling")
    of: dict[float, list[dict[str, str]]] = {}
    for r in rows:
        of.setdefault(float(r["prior"]), []).append(r)
    columns = ("prior", "seeds", "with a structure below 0.10", "lowest", "mean")
    table = []
    for prior, runs in sorted(of.items(), reverse=True):
        least = min(runs, key=lambda r: float(r["lowest"]))
        seeds = [int(r["seed"]) for r in runs]
        means = [float(r["mean"]) for r in runs]
        table.append(
            (
                f"{prior:g}",
                f"{min(seeds)} to {max(seeds)}, {len(seeds)} runs",
                str(sum(float(r["lowest"]) < 0.10 for r in runs)),
                f"{float(least['lowest']):.3f} ({least['structure']}, seed {least['seed']})",
                f"{sum(means) / len(means):.3f}",
            )
        )
    return Table(
        title="tumor_ext v1 on the PHANTOM, not patients: step 1 of finetune, by its start",
        columns=columns,
        rows=tuple(table),
        notes=("Dice (strict scoring) of the four validation cases, means over structures.",),
    )


def precision_table() -> Table:
    """Training in mixed precision beside training without, by the reference runs of `universal`."""
    sys.path.insert(0, str(ROOT / "tests" / "perf"))
    from precision import CASE, SCORING, compare, dice_of

    folders = {amp: ROOT / "results" / name for amp, name in PRECISION.items()}
    found = compare([*folders.values()], *PRECISION_OF, margin=PRECISION_MARGIN)
    rows = []
    for (amp, folder), mean in zip(folders.items(), found["means"], strict=True):
        scores = dice_of(folder, *PRECISION_OF)
        last = scores[scores.step == scores.step.max()]
        seeds = last.groupby(["seed", *CASE]).value.mean().groupby("seed").mean()
        first = scores[scores.step == 1].groupby(["seed", "structure"]).value.mean()
        seed, structure = first.idxmin()
        rows.append(
            (
                amp, str(len(seeds)), f"{mean:.4f}", f"{seeds.std():.4f}",
                f"{first.min():.3f} ({structure}, seed {seed})",
            )
        )  # fmt: skip
    alike = "equivalent" if found["equivalent"] else "not shown to be equivalent"
    return Table(
        title=f"{' on the PHANTOM, not patients: '.join(PRECISION_OF)}, quick, by train.amp",
        columns=(
            "train.amp", "runs", "Dice after the last step, mean over cases", "sd over seeds",
            "lowest structure after step 1",
        ),
        rows=tuple(rows),
        notes=(
            (
                f"Difference {found['difference']:+.4f} over {found['cases']} test cases, "
                f"{alike} within {found['margin']:g}: p = {found['p']:.2g} (two one-sided paired "
                f"t-tests over cases, {SCORING} scoring, for these training runs)."
            ),
        ),
    )  # fmt: skip


def gap_table() -> Table:
    """What the model of step 1 loses on the second source, where settings were settled."""
    from clbench.diagnosis.pseudo_label_quality import _on_own_cases
    from clbench.store.record import RunRecord
    from clbench.store.run_folder import find_runs

    folder = ROOT / "results" / "settling"
    rows = []
    for run in find_runs(folder):
        record = RunRecord.read(run)
        if record.strategy != "finetune":
            continue
        own = dict(_on_own_cases(run, record, 1))
        new: dict[str, list[float]] = {}
        for row in rows_of(f"pseudo_labels_seed{record.seed}.csv", "settling"):
            if row["dice"]:
                new.setdefault(row["structure"], []).append(float(row["dice"]))
        drops = {name: own[name] - sum(new[name]) / len(new[name]) for name in own}
        most, least = max(drops, key=drops.__getitem__), min(drops, key=drops.__getitem__)
        rest = [drop for name, drop in drops.items() if name != most]
        rows.append(
            (
                str(record.seed), f"{sum(own.values()) / len(own):.3f}",
                f"{sum(drops.values()) / len(drops):.3f}", f"{drops[most]:.3f} ({most})",
                f"{sum(rest) / len(rest):.3f}", f"{drops[least]:.3f} ({least})",
            )
        )  # fmt: skip
    return Table(
        title="tumor_ext v1 on the PHANTOM, not patients: step 1 of finetune on the second source",
        columns=(
            "seed", "Dice on its own source", "mean drop", "largest drop", "mean of the others",
            "smallest drop",
        ),
        rows=tuple(sorted(rows)),
        notes=(
            (
                "Dice (strict scoring), means over the 13 structures; own: four validation cases; "
                "second source: 16 training cases."
            ),
        ),
    )  # fmt: skip


def plan_table() -> Table:
    """Forecasts of `clbench plan` beside measured runs."""
    rows = rows_of("plan.csv")
    return Table(
        title="tumor_ext on the PHANTOM, quick: time of a run, forecast and measured",
        columns=(
            "strategy", "runs", "forecast, s", "measured, s", "error", "forecast, GiB",
            "measured, GiB", "error", "trial, s", "load",
        ),
        rows=tuple(
            (
                r["strategy"], r["runs"], r["forecast_s"], r["measured_s"],
                f"{float(r['error']):+.0%}", r["forecast_gib"], r["measured_gib"],
                f"{float(r['memory_error']):+.0%}", r["trial_s"], r["load"],
            )
            for r in rows
        ),
        notes=(
            (
                "One thread. Measured: seconds of the reference runs, two at a time, and the highest "
                "resident memory of any of their steps; load: of the machine during the trial."
            ),
        ),
    )  # fmt: skip


def demo_table() -> Table:
    """`make demo` in fresh clones."""
    return Table(
        title="make demo in a fresh clone",
        columns=("date", "processor", "cores", "installation, s", "course, s", "all, min", "load"),
        rows=tuple(
            (
                r["date"], r["cpu"], r["cores"], r["install_s"], r["course_s"],
                f"{(float(r['install_s']) + float(r['course_s'])) / 60:.1f}", r["load"],
            )
            for r in rows_of("demo.csv")
        ),
        notes=("Goals: the course in 4 minutes, all of it in 6, on two quiet cores.",),
    )  # fmt: skip


def kills_table() -> Table:
    """Clusters whose parts were killed."""
    return Table(
        title="Studies worked off on clusters whose parts were killed",
        columns=(
            "date", "on", "what was done to it", "runs", "finished", "starts",
            "scores as undisturbed", "most processes at work on a run", "left",
        ),
        rows=tuple(
            (
                r["date"], r["on"], r["disturbed"], r["runs"], r["finished"], r["starts"],
                {"True": "to the bit", "False": "no"}[r["equal_bits"]], r["most_at_once"],
                r["left_processes"],
            )
            for r in rows_of("cluster_kills.csv")
        ),
    )  # fmt: skip


def examination_table() -> Table:
    """Share of a reference run's time that is examination."""
    rows = []
    for bench in ("tumor_ext", "body_ext"):
        shares = []
        for path in sorted((ROOT / "results" / "reference" / bench).glob("*/*/run.json")):
            cost = json.loads(path.read_text(encoding="utf-8"))["cost"].values()
            examine = sum(step.get("examine_s", 0.0) for step in cost)
            taught = [step.get("train", {}) for step in cost]
            rest = sum(t.get("train_s", 0.0) + t.get("prepare_s", 0.0) for t in taught)
            shares.append((examine / (examine + rest), path.parents[1].name))
        least, most = min(shares), max(shares)
        rows.append(
            (
                bench, str(len(shares)), f"{statistics.median(s for s, _ in shares):.1%}",
                f"{least[0]:.1%} ({least[1]})", f"{most[0]:.1%} ({most[1]})",
                f"{sum(s > 0.10 for s, _ in shares)}",
            )
        )  # fmt: skip
    return Table(
        title="Reference runs: share of training, preparing and examining that is examination",
        columns=("course", "runs", "median", "least", "most", "runs above 10 %"),
        rows=tuple(rows),
    )


PRECISION = {"off": "reference", "bf16": "bf16"}
"""`train.amp` → folder of results."""
PRECISION_OF = ("tumor_ext", "universal")
PRECISION_MARGIN = 0.01
"""Dice; declared before looking."""
GROWTH_RATIOS = ("work_ratio", "time_ratio", "memory_ratio")
COUNTS: Mapping[str, Callable[[], Table]] = {
    "fuzz": fuzz_table,
    "torture": torture_table,
    "ratios": ratios_table,
    "growth": growth_table,
    "lowest": lowest_table,
    "precision": precision_table,
    "gap": gap_table,
    "plan": plan_table,
    "demo": demo_table,
    "kills": kills_table,
    "examination": examination_table,
}

if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(rewrite(page.read_text(encoding="utf-8")), encoding="utf-8")
