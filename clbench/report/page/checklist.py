"""Checklist: what a reviewer will ask, each answered from the runs or marked as missing.

Questions after Metrics Reloaded (Maier-Hein, Reinke et al., Nature Methods
2024), CLAIM (Mongan et al., Radiology: AI 2020) and the habits of the field.
"""

from __future__ import annotations

from clbench.report.past_images import past_card
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.endpoints import tested_patients
from clbench.report.tables.render import markdown_cell
from clbench.report.tuning import tuned_equally
from clbench.statistics.max_t import SEEDS_TO_GENERALIZE
from clbench.store.record import RunRecord

MISSING = "**missing**"
_EMPTY_MASKS = (
    "excluded where the truth is empty, 0 where a structure was missed, every row has a status; "
    "sensitivity with empty truths scored 1 or 0 in confirmatory.csv"
)


def checklist(a: Analysis) -> list[tuple[str, str]]:
    """Question, answer."""
    e, p = a.dice, a.protocol
    names = {m.strategy for m in e.strategies}
    records = [r for m in e.strategies for r in m.records]
    leaks = sorted(
        {
            case
            for r in records
            for case in r.course.test_cases
            if any(case in train for train in r.course.train)
        }
    )
    seeds = {m.label: len(m.seeds) for m in e.strategies}
    gits = {r.git for r in records}
    devices = {_hardware(r) for r in records}
    holes = e.holes()
    return [
        ("Unit of analysis, and n?", f"patient; test cases: {tested_patients(e)}"),
        ("Are training and test patients disjoint?",
         f"**no**: {', '.join(leaks)}" if leaks
         else "yes, by the names of the cases in the recorded splits"),
        ("Past images opened, per strategy?",
         "; ".join(f"{m.label}: {', '.join(dict.fromkeys(map(past_card, m.records)))}"
                   for m in e.strategies)),
        ("Same cases for all strategies?", "yes: other splits or fingerprints are refused"),
        ("Test named, paired, two-sided, corrected?",
         f"sign flips paired by patient, two-sided, {p.adjusted_by}, alpha {p.alpha:g}"),
        ("Endpoints fixed in advance?", "yes, in code (`clbench.report.significance.endpoints`)"),
        ("Intervals, not p alone?", f"yes: {p.percent}, simultaneous and matched to the tests"),
        ("Effect sizes?", "Dice difference, rank-biserial, dz"),
        ("Equivalence rather than a large p?", f"yes: margin ±{p.margin:g} Dice, declared before"),
        ("Smallest detectable effect?", "yes, per comparison"),
        ("Seeds?", (f"{min(seeds.values())} of every strategy" if len({*seeds.values()}) == 1
                    else "; ".join(f"{k} {v}" for k, v in seeds.items()))
         + ("" if min(seeds.values()) >= SEEDS_TO_GENERALIZE
            else f" (fewer than {SEEDS_TO_GENERALIZE}: verdicts limited to these runs)")),
        ("Reference trained on all data (joint training)?", "yes" if "joint" in names else MISSING),
        ("Lower bound (fine-tuning)?", "yes" if "finetune" in names else MISSING),
        ("Boundary metric beside overlap?", _metrics(a)),
        ("Empty masks?", _EMPTY_MASKS),
        ("Tumor-free cases?", "scored by status; specificity needs the detection table"),
        ("Missing scores?", "; ".join(holes) or "none"),
        ("Baselines tuned equally, without test data?",
         tuned_equally({m.label: m.records for m in e.strategies})
         or MISSING + " (no run was made with `--tuned`)"),
        ("Same hardware for times?", "yes: " + devices.pop() if len(devices) == 1
         else f"**no**: {', '.join(sorted(devices))}"),
        ("External data?", ", ".join(e.external) or MISSING),
        ("Code version?", ", ".join(sorted(map(str, gits))) if None not in gits else MISSING),
        ("Per-case scores kept?", "yes: scores.csv of every run"),
        ("Inter-rater variability?", MISSING),
        ("Patient characteristics, ethics?", "not applicable: phantom" if e.phantom else MISSING),
    ]  # fmt: skip


def _hardware(record: RunRecord) -> str:
    """Device, processor and threads that a run was made with."""
    host = record.host or {}
    return ", ".join(
        [record.device]
        + [str(host[fact]) for fact in ("cpu", "vectors") if fact in host]
        + [f"{record.threads} thread(s)"]
    )


def _metrics(a: Analysis) -> str:
    scored = a.dice.metrics - {"dice", "dice_ceiling"}
    return "scored: " + ", ".join(sorted(scored)) if scored else MISSING


def markdown(a: Analysis) -> str:
    """The checklist as a Markdown file."""
    rows = "\n".join(
        f"| {markdown_cell(q)} | {markdown_cell(answer)} |" for q, answer in checklist(a)
    )
    return (
        f"# Checklist: {markdown_cell(a.dice.title())}\n\n"
        f"| question | answer |\n|---|---|\n{rows}\n\n"
        "Questions after Metrics Reloaded (2024) and CLAIM (2020).\n"
    )
