"""Provenance: where the numbers of a report come from, and what each strategy took of the past.

Everything here is read from `run.json`; what a run did not record is said
to be missing, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import clbench
from clbench.report.past_images import past_card
from clbench.report.scores import StrategyScores
from clbench.report.significance.analysis import Analysis
from clbench.report.tuning import tuned_card
from clbench.store.record import RunRecord

MISSING = "missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What one strategy took of earlier steps."""

    label: str
    """Strategy."""
    rows: tuple[tuple[str, str], ...]
    """Fact, value."""


def _all(values: Iterable[object]) -> str:
    """Distinct values, or `missing`."""
    texts = dict.fromkeys(
        str(v) if not isinstance(v, dict | list) else json.dumps(v, sort_keys=True)
        for v in values
        if v not in (None, "", {}, [])
    )
    return ", ".join(texts) if texts else MISSING


def provenance(a: Analysis) -> list[tuple[str, str]]:
    """Fact, value; in the order of the box."""
    e, p = a.dice, a.protocol
    records = [r for m in e.strategies for r in m.records]
    families = {c.endpoint.name: c.m for c in a.comparisons}
    sets = [
        f"{s}: {len(ids)} patients"
        + (f" ({e.scans[s]} scans, averaged by patient)" if e.scans[s] > len(ids) else "")
        for s, ids in e.patients.items()
    ]
    splits = {k: v for r in records for k, v in r.split_sha256.items()}
    return [
        ("benchmark", f"{e.bench} v{e.version}"),
        ("data", ("PHANTOM, not patients" if e.phantom else "patients")),
        ("data fingerprint", _all(r.data_fingerprint for r in records)),
        ("split checksums", ", ".join(f"{k} {v}" for k, v in splits.items()) or MISSING),
        ("test patients", "; ".join(sets)),
        ("structures", f"{len(e.learned_at)} in {e.last} step(s)"),
        ("seeds", "; ".join(f"{m.label} {', '.join(map(str, m.seeds))}" for m in e.strategies)),
        (
            "runs left out, unfinished",
            str(sum((*(m.unfinished for m in e.strategies), *e.never_finished.values()))),
        ),
        ("profile", _all(r.identity.profile.get("name") for r in records)),
        ("scoring", f"{e.scoring}, {e.metric}"),
        (
            "metric implementation",
            _all(r.metrics for r in records)
            if any(r.metrics for r in records)
            else f"clbench {_all(r.versions.get('clbench') for r in records)}, "
            f"numerics {_all(r.identity.numerics for r in records)}",
        ),
        ("reference", e.reference.label),
        ("alpha", f"{p.alpha:g}, two-sided"),
        ("equivalence margin", f"±{p.margin:g} Dice"),
        (
            "family sizes",
            ", ".join(f"{k} m = {v}" for k, v in families.items())
            + f"; structures m = {max((r.m for r in a.classes), default=0)}",
        ),
        ("sign patterns", f"all of them up to 20 patients, else {p.draws}, seed {p.seed}"),
        ("correction over a family", p.adjusted_by),
        ("ranking resamples", f"{p.rank_resamples}, seed {p.seed}"),
        ("training code (git)", _all(r.git for r in records)),
        ("clbench of the runs", _all(r.versions.get("clbench") for r in records)),
        ("clbench of this report", clbench.__version__),
        ("torch", _all(r.versions.get("torch") for r in records)),
        ("hardware", _all(r.device for r in records)),
        *_backbone_weights(records),
        ("warnings of the runs", _warnings(e.strategies)),
        ("went on elsewhere", _elsewhere(records)),
    ]  # fmt: skip


def _backbone_weights(records: Iterable[RunRecord]) -> Iterable[tuple[str, str]]:
    """What was set from files of weights, and on what these were trained; no row without a file."""
    said = []
    for record in records:
        if not (loaded := record.backbone_weights):
            continue
        parts = ", ".join(
            f"{p} {done} of {of}" for p, (done, of) in loaded.get("parts", {}).items()
        )
        text = f"{len(loaded['loaded'])} tensors set" + (f" ({parts})" if parts else "")
        trained_on = loaded.get("trained_on")
        text += f"; trained on: {trained_on}" if trained_on else "; training data not declared"
        if overlap := loaded.get("overlap"):
            text += f"; THAT NAMES DATA OF THIS COURSE: {', '.join(overlap)}"
        said.append(f"{record.strategy}: {text}")
    if said:
        yield "backbone weights", "; ".join(dict.fromkeys(said))


def _warnings(methods: Iterable[StrategyScores]) -> str:
    """What the watches of the runs remarked, and how many runs were not watched."""
    records = [(m.label, r) for m in methods for r in m.records]
    whose: dict[str, dict[str, list[int]]] = {}
    for label, r in records:
        for w in r.warnings or ():
            whose.setdefault(w["message"], {}).setdefault(label, []).append(r.seed)
    said = [
        "; ".join(f"{label}, seed {', '.join(map(str, seeds))}" for label, seeds in of.items())
        + f": {message}"
        for message, of in whose.items()
    ]
    if unwatched := sum(r.warnings is None for _, r in records):
        said.append(f"not recorded for {unwatched} of {len(records)} runs")
    return "; ".join(said) or "none"


def _elsewhere(records: Iterable[RunRecord]) -> str:
    """Runs that were stopped on one machine and went on on another, or on other threads."""
    return (
        "; ".join(
            f"{r.run_id}, step {m['step']}: "
            + ", ".join(f"{k} {then} → {now}" for k, (then, now) in sorted(m["differs"].items()))
            for r in records
            for m in r.resumed_elsewhere or ()
        )
        or "none"
    )


def cards(a: Analysis) -> list[Card]:
    """The past-data card of each strategy, from the ledgers of its runs."""
    return [Card(label=m.label, rows=tuple(_card(m))) for m in a.dice.strategies]


def _card(method: StrategyScores) -> Iterable[tuple[str, str]]:
    record = method.records[0]
    if record.past:
        yield "declares to need of the past", record.past
    predicted, bytes_ = 0, 0.0
    for r in method.records:
        for step, purposes in r.ledger.items():
            if int(step) > 1:
                predicted = max(predicted, len(set(purposes.get("pseudo", ()))))
        bytes_ = max(bytes_, sum(_cost(r, "pseudo_bytes")))
    yield "past images opened", "; ".join(dict.fromkeys(map(past_card, method.records)))
    yield "cases with predictions of the old model", str(predicted) if predicted else "none"
    yield "stored for that, MB", f"{bytes_ / 1e6:.1f}"
    yield "test cases opened in training", _test_cases(method)
    parameters = [int(x) for x in _cost(record, "parameters")]
    yield "parameters after each step", ", ".join(f"{x:,}" for x in parameters) or MISSING
    seconds = [sum(_cost(r, "train_s")) + sum(_cost(r, "prepare_s")) for r in method.records]
    yield "training, minutes per run", ", ".join(f"{x / 60:.1f}" for x in seconds)
    yield "settings", json.dumps(record.identity.strategy, sort_keys=True)
    yield "settings chosen", "; ".join(dict.fromkeys(map(tuned_card, method.records)))


def _cost(record: RunRecord, field: str) -> list[float]:
    return [
        float(step["train"][field])
        for _, step in sorted(record.cost.items(), key=lambda x: int(x[0]))
        if field in (step.get("train") or {})
    ]


def _test_cases(method: StrategyScores) -> str:
    opened = set()
    for r in method.records:
        tests = {*r.course.test_cases}
        for purposes in r.ledger.values():
            opened |= tests & {c for k, v in purposes.items() if k != "test" for c in v}
    return f"{len(opened)}: {', '.join(sorted(opened))}" if opened else "none (ledger)"
