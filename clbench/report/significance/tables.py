"""Tables of the tests: what `clbench.report.significance.analysis` found, one row per test.

Every table carries its CSV with full precision (`Table.long`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import HOLE
from clbench.report.significance.exploratory import ROPE
from clbench.report.significance.sentences import end_text, p_text, soonest, span_text
from clbench.report.study import Protocol
from clbench.report.tables.render import EMPTY, Table, long_table, number
from clbench.statistics.max_t import SEEDS_TO_GENERALIZE, FamilyComparison
from clbench.statistics.sample_size import MOST
from clbench.statistics.verdicts import THESE_RUNS, smallest_sample


def _long(columns: str, rows: Iterable[Sequence[object]]) -> Table:
    return long_table(columns, rows, nan="nan")


def signed(value: float, digits: int = 3) -> str:
    """A difference as text."""
    return EMPTY if math.isnan(value) else f"{value:+.{digits}f}"


def _p(alpha: float, *values: float) -> tuple[str, ...]:
    """P-values as text."""
    return tuple(p_text(p, alpha, sign=False) or EMPTY for p in values)


def span(low: float, high: float, margin: float) -> str:
    """An interval as text, each end on its side of 0 and the margins.

    Args:
        low: lower end; nan = none.
        high: upper end.
        margin: of equivalence.
    """
    if math.isnan(low) or math.isnan(high):
        return EMPTY
    return f"{end_text(low, margin)} to {end_text(high, margin)}"


def confirmatory_table(a: Analysis) -> Table:
    """T4 of the report: one row per endpoint and other strategy."""
    rows: list[tuple[str, ...]] = []
    long: list[tuple[object, ...]] = []
    for c in a.comparisons:
        r, w = c.result, c.seed_wins
        rows.append(
            (
                c.endpoint.title, c.b, number(c.mean_a), number(c.mean_b),
                *_shown(r, a.protocol, own=False),
                EMPTY if w is None else f"{w.estimate:.2f} ({w.low:.2f} to {w.high:.2f})",
                number(math.nan if r is None or r.beyond_detectable else r.detectable),
                _needed(r, own=False),
                " + ".join(f"{k} {name}" for name, k in c.patients.items()) or EMPTY,
                str(len(c.seeds)), _verdict(r),
            )
        )  # fmt: skip
        long.append(
            (
                c.endpoint.name, c.a, c.b, c.hole, c.mean_a, c.mean_b, *_exact(r), c.m,
                *((None,) * 3 if w is None else (w.estimate, w.low, w.high)), c.with_empty,
                c.with_empty_p, c.n,
                ";".join(f"{name}={k}" for name, k in c.patients.items()), c.classes,
                c.seeds, c.first_shared, *_words(r), "; ".join(c.cautions),
            )
        )  # fmt: skip
    ref, p = a.dice.reference.label, a.protocol
    sizes = {(c.m, c.flipped) for c in a.comparisons}
    return Table(
        title=f"{a.dice.title()}: {ref} against each other strategy (confirmatory)",
        columns=(
            "endpoint", "other", ref, "other's", "difference", f"{p.percent} interval",
            "over new runs", "p", "p equivalent", f"P({ref} ahead) over seeds", "detectable",
            "patients to decide", "patients", "seeds", "verdict",
        ),
        rows=tuple(rows),
        notes=(
            family_note(p, sizes, "comparisons"),
            (f"p: two-sided, adjusted over the family, alpha {p.alpha:g}. Each endpoint is a "
            "family of its own: a false claim somewhere in the three has up to 3 alpha. p "
            f"equivalent: of a difference of {p.margin:g} Dice or more in either direction, the "
            "margin declared before."),
            (f"Interval: simultaneous over the family, matched to the tests: 0 and ±{p.margin:g} "
            "are outside exactly where they are refuted. Over new runs: of the row alone, over "
            "patients and training runs; `for these training runs` falls only where the same at "
            f"the family's level agrees, from {SEEDS_TO_GENERALIZE} seeds on."),
            ("Detectable: smallest difference found with power 0.8. Patients to decide: for a "
            "difference (d) or equivalence (e), if difference and spread stay as seen."),
            (f"Class-macro means over {_denominators(a)} structures; a structure counts on the "
            "test cases of the source that taught it. Kept: the difference is a difference in "
            "differences, patient by patient."),
        ),
        keys=2,
        long=_long("endpoint a b hole mean_a mean_b difference " + _EXACT + " m wins wins_low "
            "wins_high "
            "with_empty with_empty_p n patients classes seeds first_shared verdict "
            "detail scope detail_scope cautions",
            long,
        ),
    )  # fmt: skip


def family_note(protocol: Protocol, sizes: set[tuple[int, int]], what: str) -> str:
    """How a family is tested and what its p-values promise.

    Args:
        protocol: level, correction.
        sizes: (members, flipped patients) of each family under one heading.
        what: what its members are called.
    """
    m = " or ".join(str(m) for m in sorted({m for m, _ in sizes})) or "0"
    n = " or ".join(str(n) for n in sorted({n for _, n in sizes})) or "0"
    how = {
        "max-t": f"Step-down max-T over {m} {what}, joint sign flips of {n} patients",
        "holm": f"Holm over {m} {what}, sign flips of {n} patients",
    }[protocol.correction]
    alpha = f"{100 * protocol.alpha:.6g} %"
    return (
        f"{how}. The chance of any false difference is at most {alpha}, likewise of any false "
        "claim about the margin, if each patient's difference could as well have had the other "
        f"sign; approximately otherwise. {THESE_RUNS[:1].upper()}{THESE_RUNS[1:]}."
    )


def _shown(r: FamilyComparison | None, protocol: Protocol, *, own: bool) -> tuple[str, ...]:
    """Difference, interval, over new runs, p of a difference, p of equivalence (or of a loss)."""
    if r is None:
        return (EMPTY,) * 5
    return (
        signed(r.mean.estimate), span_text(r, protocol.margin) or EMPTY,
        span(*r.new_runs, protocol.margin),
        *_p(protocol.alpha, r.p, r.p_low if own else r.p_equivalent),
    )  # fmt: skip


def _needed(r: FamilyComparison | None, *, own: bool) -> str:
    """Patients that would decide, the smaller number: `34 (e)`."""
    if r is None or r.needed is None:
        return EMPTY
    n, letter = soonest(r.needed, change=own)
    return f"> {MOST:,}" if math.isinf(n) else f"{n:.0f} ({letter})"


def _verdict(r: FamilyComparison | None) -> str:
    if r is None:
        return HOLE
    v = r.verdict
    detail = " ".join(x for x in (v.detail, v.detail_scope) if x)
    return ", ".join(x for x in (v.word, detail, v.scope) if x)


_EXACT = (
    "low low_open high high_open standard_error df p_unadjusted p p_low p_high level scope_low "
    "scope_high new_runs_low new_runs_high detectable level_left needed_difference "
    "needed_equivalence needed_not_worse"
)


def _exact(r: FamilyComparison | None) -> tuple[object, ...]:
    """The numbers behind a row, the difference first."""
    if r is None:
        return (math.nan, *(None,) * len(_EXACT.split()))
    needed: tuple[float | None, ...] = (None,) * 3
    if r.needed is not None:
        needed = (r.needed.difference, r.needed.equivalence, r.needed.not_worse)
    return (
        r.mean.estimate, r.low, r.low_open, r.high, r.high_open, r.mean.standard_error, r.mean.df,
        r.p_unadjusted, r.p, r.p_low, r.p_high, r.level, r.mean.estimate - r.over_runs,
        r.mean.estimate + r.over_runs, *r.new_runs, r.detectable, r.level_left, *needed,
    )  # fmt: skip


def _words(r: FamilyComparison | None) -> tuple[str, ...]:
    if r is None:
        return HOLE, "", "", ""
    v = r.verdict
    return v.word, v.detail, v.scope, v.detail_scope


def _denominators(a: Analysis) -> str:
    counts = dict.fromkeys((c.endpoint.name, c.classes) for c in a.comparisons if c.classes)
    return ", ".join(f"{k} ({name})" for name, k in counts) or "no"


def own_table(a: Analysis) -> Table:
    """Forgetting of each strategy by itself."""
    rows, long = [], []
    for o in a.own:
        r = o.result
        rows.append(
            (
                o.method, *_shown(r, a.protocol, own=True), _needed(r, own=True),
                " + ".join(f"{k} {name}" for name, k in o.patients.items()) or EMPTY,
                str(len(o.seeds)) if o.seeds else EMPTY, _verdict(r),
            )
        )  # fmt: skip
        long.append((o.method, o.hole, *_exact(r), o.m, o.n, o.seeds, *_words(r),
                     "; ".join(o.cautions)))  # fmt: skip
    p = a.protocol
    return Table(
        title=f"{a.dice.title()}: does it forget?",
        columns=("strategy", "change", f"{p.percent} interval", "over new runs",
                 "p of a change", f"p of a loss below {p.margin:g}", "patients to decide",
                 "patients", "seeds", "verdict"),
        rows=tuple(rows),
        notes=(
            ("Change: Dice after the last step minus Dice after the own step, old structures, "
               "class macro (backward transfer as of Lopez-Paz and Ranzato)."),
            family_note(p, {(o.m, o.flipped) for o in a.own}, "strategies"),
            ("A large p of a change is no proof of keeping; that needs the second p. Patients to "
             "decide: for a change (d) or that it keeps (k)."),
        ),
        long=_long("method hole change " + _EXACT + " m n seeds verdict detail scope detail_scope "
                   "cautions", long),
    )  # fmt: skip


def class_table(a: Analysis) -> Table:
    """Exploratory: structure by step by pair."""
    rows, long = [], []
    alpha, equal = a.protocol.alpha, a.protocol.margin
    for r in a.classes:
        h, t = r.pseudomedian, r.test
        word = HOLE if r.hole else "" if r.verdict is None else r.verdict.word
        name = r.structure
        if r.eval_set != a.dice.home(r.structure):
            name += f" (in {r.eval_set})"
        rows.append(
            (
                str(r.step), name, r.b, number(r.mean_a), number(r.mean_b), signed(h.estimate),
                span(h.low, h.high, equal), signed(r.rank_biserial, 2),
                *_p(alpha, t.p, r.p_bh, r.p_holm),
                str(r.n) if r.n else EMPTY, str(t.n_nonzero) if t.n else EMPTY,
                f"{r.missed[0]} / {r.missed[1]}", word,
            )
        )  # fmt: skip
        long.append(
            (
                r.step, r.eval_set, r.structure, r.a, r.b, r.hole, r.shared, r.mean_a, r.mean_b,
                h.estimate, h.low, h.high, h.coverage, t.statistic, t.p, t.method, t.n_nonzero,
                t.smallest_p, r.rank_biserial, r.p_bh, r.p_holm, r.m, r.n, r.n_seeds, *r.missed,
                word,
            )
        )  # fmt: skip
    m = max((r.m for r in a.classes), default=0)
    return Table(
        title=f"{a.dice.title()}: every structure (exploratory)",
        columns=("step", "structure", "other", a.dice.reference.label, "other's",
                 "pseudomedian", f"{a.protocol.percent} interval", "rank-biserial", "p", "p (BH)",
                 "p (Holm)", "n", "differ", "missed", "verdict"),
        rows=tuple(rows),
        notes=(
            (f"Wilcoxon signed-rank, exact permutation null with ties and zeros, on seed averages; "
            f"m = {m}. Verdict by Benjamini-Hochberg, alpha {a.protocol.alpha:g}; below "
            f"{smallest_sample(a.protocol.alpha)} patients nothing is testable."),
            (f"Pseudomedian: Hodges-Lehmann with its exact interval; none exists below "
            f"{smallest_sample(a.protocol.alpha)} patients at {a.protocol.percent}. Missed: cases "
                "times seeds in which nothing was found, reference / other."),
        ),
        keys=3,
        long=_long("step eval_set structure a b hole shared mean_a mean_b pseudomedian "
                   "low high coverage w_plus p method n_nonzero smallest_p rank_biserial p_bh "
                   "p_holm m n n_seeds missed_a missed_b verdict", long),
    )  # fmt: skip


def set_table(a: Analysis) -> Table:
    """Exploratory: three tests of one difference, per eval set."""
    rows, long = [], []
    alpha, equal = a.protocol.alpha, a.protocol.margin
    for r in a.sets:
        p = [t.p for t in r.tests]
        mean, h, b = r.mean, r.pseudomedian, r.posterior
        margin = (r.tost.p, r.tost.p_above_low) if r.tost else (math.nan, math.nan)
        posterior = (b.p_a, b.p_rope, b.p_b) if b else ()
        rows.append(
            (
                r.eval_set, r.b, signed(mean.estimate), span(mean.low, mean.high, equal),
                signed(h.estimate), signed(r.dz, 2), *_p(alpha, *p, margin[0]),
                " / ".join(f"{x:.2f}" for x in posterior) or EMPTY,
                number(r.detectable), str(r.n) if r.n else EMPTY, r.hole or r.disagreement or EMPTY,
            )
        )  # fmt: skip
        long.append(
            (
                r.eval_set, r.a, r.b, r.hole, mean.estimate, mean.low, mean.high, h.estimate, h.low,
                h.high, r.dz, r.rank_biserial, *p, *margin, *(posterior or (None,) * 3),
                r.detectable, r.n, r.n_seeds, r.disagreement,
            )
        )  # fmt: skip
    return Table(
        title=f"{a.dice.title()}: every eval set, macro score per patient (exploratory)",
        columns=("eval set", "other", "mean", f"{a.protocol.percent} t interval", "pseudomedian",
                 "dz", "p Wilcoxon", "p t", "p sign", f"p within ±{a.protocol.margin:g}",
                 "P ahead / equal / behind", "detectable", "n", "disagreement"),
        rows=tuple(rows),
        notes=(
            ("After the last step; one number per patient: the mean over the structures it has, "
            "seeds averaged. Uncorrected; a sensitivity analysis of the first table."),
            f"P ahead / equal / behind: Bayesian signed-rank; equal is ±{ROPE:g}.",
        ),
        keys=2,
        long=_long("eval_set a b hole mean low high pseudomedian hl_low hl_high dz "
                   "rank_biserial p_wilcoxon p_t p_sign p_tost p_not_worse p_ahead p_equal "
                   "p_behind detectable n n_seeds disagreement", long),
    )  # fmt: skip


def ranking_table(a: Analysis) -> Table:
    """Average ranks, bars and stability of the ranking."""
    rows, notes = [], []
    alpha = a.protocol.alpha
    long: list[tuple[object, ...]] = []
    for r in a.rankings:
        f = r.friedman
        if f is not None:
            notes.append(
                f"{r.eval_set}: Friedman chi2 {f.chi2:.2f} (tie-corrected), "
                f"p {p_text(f.p, alpha)}, Kendall W {f.kendall_w:.2f}, n = {r.n}."
            )
        if r.pairs is None:
            notes.append(f"{r.eval_set}: nothing to rank.")
            continue
        bars = [" = ".join(c) for c in r.pairs.cliques]
        notes.append(
            f"{r.eval_set}: no difference shown between {'; '.join(bars) or 'no neighbors'} "
            f"({a.protocol.ranked_by}, m = {r.pairs.m})."
            if r.pairs.m
            else f"{r.eval_set}: too few patients to test any pair."
        )
        for name, rank in zip(r.pairs.names, r.pairs.average_ranks, strict=True):
            rows.append((r.eval_set, name, f"{rank:.2f}", EMPTY, EMPTY))
            long.append((r.eval_set, name, float(rank), r.n, None, None, None))
    s = a.stable.stability
    if s is not None:
        for i, name in enumerate(s.names):
            shares = " ".join(f"{x:.2f}" for x in s.rank_share[i])
            rows.append(
                ("all, class macro", name, f"{s.full_ranks[i]:g}", f"{s.p_first[i]:.2f}", shares)
            )
            long.append(
                ("", name, float(s.full_ranks[i]), s.n, float(s.p_first[i]),
                 " ".join(repr(float(x)) for x in s.rank_share[i]), s.kendall_tau)
            )  # fmt: skip
        notes.append(
            f"Stability: {s.draws} resamples of patients and {s.n_seeds} seed(s); mean Kendall tau "
            f"with the full ranking {s.kendall_tau:.2f}."
        )
    notes += [f"left out: {w}" for w in a.stable.left_out]
    return Table(
        title=f"{a.dice.title()}: rankings after the last step (exploratory)",
        columns=("patients of", "strategy", "rank (mean)", "P(first)", "P(each rank)"),
        rows=tuple(rows),
        notes=tuple(notes),
        keys=2,
        long=_long("eval_set method rank n p_first rank_shares kendall_tau", long),
    )


def all_tables(a: Analysis) -> dict[str, Table]:
    """File stem → table, in the order of the report."""
    tables = {"confirmatory": confirmatory_table(a)}
    if a.own:
        tables["forgetting"] = own_table(a)
    return tables | {
        "structures": class_table(a),
        "eval_sets": set_table(a),
        "ranking": ranking_table(a),
    }
