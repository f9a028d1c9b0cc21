"""Run folders made of numbers alone: `run.json` and `scores.csv`, no training; for reports and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clbench.store import run_folder
from clbench.store.run_folder import Score

ORGANS = ("spleen", "right_kidney", "liver", "pancreas")
STEPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("organs", "btcv", ORGANS),
    ("liver tumor", "lits", ("liver_tumor",)),
)
THREE_STEPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("organs", "jhh_organ", ORGANS),
    ("gastro", "jhh_gastro", ("duodenum", "colon")),
    ("cardiac", "jhh_cardiac", ("aorta", "postcava")),
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a made-up strategy scores."""

    step1: float = 0.0
    """Added to every Dice after step 1; not 0 means: a first step of its own."""
    kept: float = 0.0
    """Added to old structures at every later step."""
    new: float = 0.0
    """Added to new structures."""
    own_step1: bool = False
    """Has a first step of its own."""
    noise: float = 0.02
    """Standard deviation of what only this strategy, patient and structure have."""
    seed_sd: float = 0.0
    """Standard deviation of what a whole training run has."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training runs."""
    drop: Sequence[tuple[int, str]] = ()
    """(step, "source/case") whose rows are missing in the first seed."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Fields of run.json to replace."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its identity to replace."""


def make_runs(
    results: Path,
    methods: Mapping[str, Method],
    *,
    bench: str = "tumor_ext",
    steps: Sequence[tuple[str, str, tuple[str, ...]]] = STEPS,
    patients: Mapping[str, int] | None = None,
    data: int = 0,
    scorings: Sequence[str] = ("strict", "paper"),
    phantom: bool = True,
    scans: int = 1,
) -> list[Path]:
    """Write the runs of `methods` below `results`; equal arguments give equal bytes.

    Patients have easy and hard anatomy that all strategies share. The last patient of the first
    source is not annotated for the last structure of step 1, the last patient of the last source
    has no structure of the last step (`both_empty`), and its first patient is missed by all.
    With several `scans` the cases are called 100_0, 100_1, …, and the records name the patients.
    """
    sources = list(dict.fromkeys(source for _, source, _ in steps))
    count = {source: (patients or {}).get(source, 12) for source in sources}
    cases = {
        s: [
            str(100 * (i + 1) + k) + (f"_{n}" if scans > 1 else "")
            for k in range(count[s])
            for n in range(scans)
        ]
        for i, s in enumerate(sources)
    }
    learned = {c: i for i, (_, _, names) in enumerate(steps, 1) for c in names}
    source_of = {c: steps[i - 1][1] for c, i in learned.items()}
    easy = {
        (s, c, name): v
        for s in sources
        for c in cases[s]
        for name, v in zip(
            learned,
            0.8 + np.random.default_rng([data, int(c.split("_")[0])]).normal(0, 0.05, len(learned)),
            strict=True,
        )
    }
    folders = []
    for index, (name, method) in enumerate(methods.items()):
        own = method.own_step1 or method.step1 != 0
        for seed in method.seeds:
            rng = np.random.default_rng([data, seed, index])
            first = rng if own else np.random.default_rng([data, seed, 10**6])
            run_effect = rng.normal(0, method.seed_sd) if method.seed_sd else 0.0
            rows = []
            for step in range(1, len(steps) + 1):
                for s in sources:
                    for k, case in enumerate(cases[s]):
                        if seed == method.seeds[0] and (step, f"{s}/{case}") in method.drop:
                            continue
                        for c, at in learned.items():
                            if at > step:
                                continue
                            draw = (first if step == 1 else rng).normal(0, method.noise)
                            shift = method.step1 if step == 1 else run_effect + (
                                method.new if at == step else method.kept
                            )  # fmt: skip
                            status, truth, value = "ok", 900, easy[s, case, c] + shift + draw
                            value = float(np.clip(value, 0.001, 0.999))
                            last = k // scans == count[s] - 1
                            if source_of[c] != s or (
                                s == sources[0] and last and c == steps[0][2][-1]
                            ):
                                status, truth, value = "not_annotated", None, math.nan
                            elif s == sources[-1] and at == len(steps) and last:
                                status, truth, value = "both_empty", 0, math.nan
                            elif s == sources[-1] and at == len(steps) and k < scans:
                                status, value = "fn_only", 0.0
                            rows += [
                                Score(
                                    bench=bench, bench_version=1, strategy=name, seed=seed, step=step,
                                    eval_set=s, case=case, structure=c, learned_at=at, scoring=scoring,
                                    metric="dice", value=value, gt_vox=truth,
                                    pred_vox=None if truth is None else 0 if status != "ok" else 880,
                                    status=status,
                                )
                                for scoring in scorings
                            ]  # fmt: skip
            folders.append(
                _write(results, name, method, seed, own, bench, steps, cases, rows, phantom)
            )
    return folders


def _write(
    results: Path,
    name: str,
    method: Method,
    seed: int,
    own: bool,
    bench: str,
    steps: Sequence[tuple[str, str, tuple[str, ...]]],
    cases: Mapping[str, list[str]],
    rows: list[Score],
    phantom: bool,
) -> Path:
    identity = {
        "bench": bench, "bench_version": 1, "numerics": 1, "data_fingerprint": "synthetic-1",
        "splits": [{"name": f"{s}.toml", "draw": None, "test": c} for s, c in cases.items()],
        "profile": {"name": "smoke", "examine": {"postprocess": False}}, "seed": seed, "vectors": "v",
        "weights": None, "strategy": {"class": name.title()}, **method.identity,
    }  # fmt: skip
    named = [[f"{s}/{c}" for c in cases[s]] for _, s, _ in steps]
    train = [[f"{s}/{i}{k}" for k in range(3)] for i, (_, s, _) in enumerate(steps, 1)]
    learned = [c for _, _, names in steps for c in names]
    record = {
        "schema": run_folder.SCHEMA, "status": "finished", "steps_done": len(steps), "patients": not phantom,
        "strategy": name, "run_id": run_folder.run_id(identity), "identity": identity,
        "metrics": {"dice": {"version": 1}},
        "data_fingerprint": "synthetic-1", "text_encoding": {"encoding": "minilm"},
        "course": {
            "steps": [{"name": n, "source": s, "learns": list(c)} for n, s, c in steps],
            "groups": {"Organ Mean": list(steps[0][2]), "Mean": learned},
            "train": train, "test": named,
            "patient_of": {
                f"{s}/{c}": c.split("_")[0] for s, ids in cases.items() for c in ids if "_" in c
            },
        },
        "shared_step1": f"{name if own else 'common'}-{seed}",
        "split_sha256": {f"{s}.toml": "0123456789abcdef" for s in cases},
        "versions": {"clbench": "0.1.0", "python": "3.11", "torch": "2.13.0"}, "git": "abc1234",
        "device": "cpu", "threads": 1, "command": ["clbench", "run", "--strategy", name],
        "ledger": {str(i): {"train": t, "test": [c for n in named for c in n]} for i, t in enumerate(train, 1)},
        "cost": {
            str(i): {"examine_s": 1.0, "train": {
                "train_s": 60.0, "prepare_s": 0.0, "parameters": 1000 * i, "trainable_parameters": 900,
                "peak_rss_bytes": 10**8, "pseudo_bytes": 0, "shared": i == 1}}
            for i in range(1, len(steps) + 1)
        },
        **method.record,
    }  # fmt: skip
    folder = results / bench / name / str(record["run_id"])
    folder.mkdir(parents=True)
    run_folder.write_record(folder, record)
    run_folder.write_scores(folder / "scores.csv", rows)
    return folder


def add_external(
    results: Path,
    source: str,
    annotates: Sequence[str],
    shifts: Mapping[str, float],
    cases: int = 8,
) -> None:
    """Give every run below `results` an external test set, after all its steps.

    Args:
        results: of `make_runs`.
        source: name of the external test set.
        annotates: structures of the course that it annotates.
        shifts: strategy → what is added to its every Dice there.
        cases: patients.
    """
    names = [str(9000 + k) for k in range(cases)]
    easy = np.random.default_rng(5).normal(0.7, 0.04, cases)
    for folder in run_folder.find_runs(results):
        record = run_folder.read_record(folder)
        rows = run_folder.read_scores(folder / "scores.csv")
        rng = np.random.default_rng([record["identity"]["seed"], len(record["strategy"])])
        like = {(r.step, r.structure, r.scoring): r for r in rows if r.metric == "dice"}
        for r in like.values():
            there = r.structure in annotates
            rows += [
                replace(
                    r,
                    eval_set=source,
                    case=case,
                    value=easy[k] + shifts[r.strategy] + rng.normal(0, 0.01) if there else math.nan,
                    gt_vox=900 if there else None,
                    pred_vox=880 if there else None,
                    status="ok" if there else "not_annotated",
                )
                for k, case in enumerate(names)
            ]
        test = {"source": source, "annotates": list(annotates)}
        test["test"] = [f"{source}/{case}" for case in names]
        record["course"].setdefault("external_tests", []).append(test)
        run_folder.write_record(folder, record)
        run_folder.write_scores(folder / "scores.csv", rows)
