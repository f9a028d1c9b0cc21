"""Steps are shared as far as two courses agree, and by nobody who would teach them otherwise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from clbench import signals
from clbench.data.cache import VolumeCache
from clbench.errors import SettingError, StoreError
from clbench.run import identity
from clbench.run.course import Course, Watch, run_plan
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.spec import taxonomy
from clbench.spec.benchmark import Benchmark
from clbench.spec.splits import Split
from clbench.store import checkpoint, files, run_folder
from clbench.store.record import RunRecord
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Strategy
from clbench.testing.fixtures import OVERRIDES, same, tiny_course
from clbench.testing.harness import tiny_kit

ONEHOT = "text.encoding=onehot"


def course(steps: int = 2, **more: Any) -> Benchmark:
    """The tiny course; its first step shows what it learns, whatever later steps learn."""
    whole = tiny_course()
    first, second, third = whole.steps
    first = replace(first, shows=first.learns)
    assert second.phantom_split is not None
    tests = ("2003", "2004", "2005")
    second = replace(second, phantom_split=replace(second.phantom_split, test=tests))
    return replace(whole, steps=(first, second, third)[:steps], groups={}, **more)


@dataclass
class Runs:
    """Runs of tiny courses in one folder of results."""

    out: Path
    cache: Path

    def plan(
        self,
        benchmark: Benchmark,
        *words: str,
        strategy: Strategy | None = None,
        **more: Any,
    ) -> Plan:
        changed = {word.partition("=")[0]: word for word in (*OVERRIDES, ONEHOT, *words)}
        settings = RunSettings(
            bench=benchmark.name, strategy="finetune", profile="smoke", out=self.out,
            overrides=tuple(changed.values()), cache=self.cache, device="cpu", **more,
        )  # fmt: skip
        plan = resolve(settings, benchmark=benchmark, strategy=strategy or Finetune()).open()
        tiny_kit(plan)
        return plan

    def run(self, plan: Plan) -> tuple[Path, list[int]]:
        """The run folder, and the steps that were taught for it."""
        taught: list[int] = []

        def watch(event: Mapping[str, Any]) -> None:
            if event["event"] == "update" and event["step"] not in taught:
                taught.append(event["step"])

        return run_plan(plan, watch), taught


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("shared"), cache_root)


@pytest.fixture(scope="module")
def base(runs: Runs) -> Path:
    """The run whose steps the others share."""
    folder, taught = runs.run(runs.plan(course()))
    assert taught == [1, 2]
    return folder


def ids(plan: Plan) -> list[str]:
    return [plan.step_folder(i + 1).name for i in range(len(plan.benchmark.steps))]


def taught_elsewhere(plan: Plan) -> None:
    """Let the shared step 2 have started from other bits, as on another machine."""
    note = plan.step_folder(2) / "step2.json"
    content = files.read_json(note)
    files.write_json(note, {**content, "origin": {**content["origin"], "before": "0" * 16}})


def test_another_order_of_later_steps_shares_those_before_it(runs: Runs) -> None:
    whole = course(3)
    first, second, third = whole.steps
    here = ids(runs.plan(whole))
    there = ids(runs.plan(replace(whole, steps=(first, third, second))))
    assert here[0] == there[0]
    assert not set(here[1:]) & set(there[1:])
    assert here[:2] == ids(runs.plan(course(2)))


def changed_split(benchmark: Benchmark, step: int, **parts: tuple[str, ...]) -> Benchmark:
    """The course with a phantom split of its own in a step."""
    own = {"train": ("5", "6"), "validation": ("7",), "test": ("8",), **parts}
    split = Split(name="own", **own)
    steps = list(benchmark.steps)
    steps[step - 1] = replace(steps[step - 1], phantom_split=split)
    return replace(benchmark, steps=tuple(steps))


def test_a_longer_course_teaches_its_own_step_alone_and_scores_the_same(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    """A course of another name, one step longer, with one more test case."""
    plan = runs.plan(course(3, name="longer", version=7), "phantom.test=2")
    folder, taught = runs.run(plan)
    assert taught == [3]
    apart = Runs(tmp_path, cache_root)
    alone, taught = apart.run(apart.plan(course(3, name="longer", version=7), "phantom.test=2"))
    assert taught == [1, 2, 3]
    assert folder.name == alone.name
    assert (folder / "scores.csv").read_bytes() == (alone / "scores.csv").read_bytes()
    assert (folder / "events.jsonl").read_bytes() == (alone / "events.jsonl").read_bytes()
    for number in (1, 2, 3):
        ours, theirs = (checkpoint.load(f / f"step{number}.pt") for f in (folder, alone))
        assert same(ours["model"], theirs["model"])
    record = RunRecord.read(folder)
    origins = record.step_origins or {}
    own, of_base = run_folder.find_runs(runs.out, bench="longer"), f"kit/finetune/{base.name}"
    assert own == [folder]
    assert [origins[k]["run"] for k in "123"] == [
        of_base,
        of_base,
        f"longer/finetune/{folder.name}",
    ]
    assert [origins[k]["identity"] for k in "123"] == ids(plan)
    assert record.cost["2"]["train"]["shared"] is True
    assert record.cost["3"]["train"]["shared"] is False
    assert record.ledger["2"]["train"] == ["second/2000", "second/2001"]
    # the same file, under a second name
    assert (folder / "step2.pt").samefile(base / "step2.pt")


def test_what_a_step_is_taught_with_and_what_it_is_examined_with(runs: Runs) -> None:
    """Which change leaves which steps shared; nothing is taught."""
    here = ids(runs.plan(course()))
    examined: list[Plan] = [
        runs.plan(course(), "phantom.test=2"),
        runs.plan(course(), "examine.postprocess=true"),
        runs.plan(replace(course(), version=9, title="x", groups={"all": ("liver",)})),
        runs.plan(course(), "data.expect_hu=false"),
    ]
    for plan in examined:
        assert ids(plan) == here
    assert len({plan.folder for plan in examined}) == 4  # other runs, but the last one
    of_course = changed_split(course(), 2)
    later: list[Plan] = [
        runs.plan(of_course),
        runs.plan(course(), strategy=Finetune(unlabelled="ignore")),
    ]
    assert ids(runs.plan(changed_split(course(), 2, test=("9",)))) == ids(later[0])
    later += [
        runs.plan(changed_split(course(), 2, train=("5", "9"))),
        runs.plan(changed_split(course(), 2, validation=("9",))),
        runs.plan(course(), "examine.trace_every=1"),
    ]
    firsts, seconds = zip(*map(ids, later), strict=True)
    assert set(firsts[:1] + firsts[2:]) == {here[0]}
    assert len({here[1], *seconds}) == 1 + len(later)
    both: list[Plan] = [
        runs.plan(course(), seed=1),
        runs.plan(course(), "train.lr=2e-3"),
        runs.plan(course(), "data.spacing_mm=21,21,21"),
        runs.plan(course(), "text.encoding=minilm"),
        runs.plan(changed_split(course(), 1)),
        runs.plan(replace(course(), steps=tiny_course().steps[:2])),  # it shows other structures
    ]
    ours = [step for plan in both for step in ids(plan)]
    assert len({*here, *ours}) == 2 + len(ours)


def test_code_from_elsewhere_is_part_of_what_a_step_depends_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = "from clbench.strategies.finetune import Finetune\nclass Mine(Finetune): pass\n"
    found = []
    for text in (source, source + "# edited\n"):
        (tmp_path / "my_strategy.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(__import__("sys").modules, "my_strategy", raising=False)
        module = __import__("my_strategy")
        found.append(ids(runs.plan(course(), strategy=module.Mine())))
    assert found[0][1] != found[1][1]


def test_a_shared_step_that_was_deleted_is_taught_again_from_what_the_run_has(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    """And a step that started from another model is not taken."""
    copy = Runs(tmp_path, cache_root)
    shutil.copytree(runs.out / "_shared", tmp_path / "_shared")
    plan = copy.plan(course(), "phantom.test=2")
    shutil.rmtree(plan.step_folder(2))
    folder, taught = copy.run(plan)
    assert taught == [2]
    assert same(*(checkpoint.load(f / "step2.pt")["model"] for f in (folder, base)))
    taught_elsewhere(plan)
    _, taught = copy.run(copy.plan(course(), "phantom.test=3"))
    assert taught == [2]


def test_a_step_that_the_run_has_goes_with_the_one_before_it(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    """A run that lost step 1 has it again; taught to other bits, it is none that step 2 follows."""
    copy = Runs(tmp_path, cache_root)
    plan = copy.plan(course())
    shutil.copytree(base, plan.folder)
    shutil.copytree(runs.plan(course()).step_folder(1), plan.step_folder(1))
    record = RunRecord.read(plan.folder)
    record.status = "unfinished"
    record.write(plan.folder)
    (plan.folder / "step1.pt").unlink()
    folder, taught = copy.run(copy.plan(course()))
    assert taught == []
    assert (folder / "events.jsonl").read_bytes() == (base / "events.jsonl").read_bytes()
    record.write(folder)
    (folder / "step1.pt").unlink()
    state = checkpoint.load(base / "step1.pt")
    name, weight = next((n, w) for n, w in state["model"].items() if w.is_floating_point())
    state["model"][name] = weight + 1
    checkpoint.save(plan.step_folder(1) / "step1.pt", state)
    for _ in range(2):  # the second time it has the step that was taught again
        with pytest.raises(StoreError, match="another model than the step before") as err:
            copy.run(copy.plan(course()))
        assert "--fresh" in str(err.value.next_step)


def test_a_first_step_taught_before_0_2_is_shared_too(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    copy = Runs(tmp_path, cache_root)
    plan = copy.plan(course())
    old = tmp_path / "kit" / "_shared" / plan.shared_step1
    shutil.copytree(runs.plan(course()).step_folder(1), old)
    note = files.read_json(old / "step1.json")
    del note["origin"]
    files.write_json(old / "step1.json", note)
    folder, taught = copy.run(plan)
    assert taught == [2]
    assert (folder / "scores.csv").read_bytes() == (base / "scores.csv").read_bytes()
    assert (folder / "events.jsonl").read_bytes() == (base / "events.jsonl").read_bytes()


def test_fresh_teaches_all_anew_and_leaves_other_runs_alone(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    copy = Runs(tmp_path / "out", cache_root)
    shutil.copytree(runs.out, copy.out, copy_function=os.link)
    before = files.sha256(base / "step1.pt")
    _, taught = copy.run(copy.plan(course(), fresh=True))
    assert taught == [1, 2]
    assert files.sha256(base / "step1.pt") == before
    assert not (copy.out / "kit" / "finetune" / base.name / "step1.pt").samefile(base / "step1.pt")


def stopping(step: int, updates: int, seen: list[tuple[int, int, int]]) -> Watch:
    """Notes every update, and asks to stop after so many of a step."""

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "update":
            seen.append((event["step"], event["epoch"], event["iteration"]))
            if [s for s, _, _ in seen].count(step) == updates:
                signals.ask("SIGTERM")

    return watch


def test_a_stopped_step_goes_on_though_another_model_taught_it_before(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    copy = Runs(tmp_path, cache_root)
    shutil.copytree(runs.out / "_shared", tmp_path / "_shared")
    plan = copy.plan(course(), "phantom.test=2")
    taught_elsewhere(plan)
    seen: list[tuple[int, int, int]] = []
    with pytest.raises(signals.Stopped):
        run_plan(plan, stopping(2, 1, seen))
    folder = run_plan(copy.plan(course(), "phantom.test=2"), stopping(2, 0, seen))
    assert len(seen) == len(set(seen)) == 2  # none was made twice
    assert same(*(checkpoint.load(f / "step2.pt")["model"] for f in (folder, base)))


def test_fresh_that_was_stopped_goes_on_and_does_not_take_the_step_it_threw_away(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    copy = Runs(tmp_path / "out", cache_root)
    shutil.copytree(runs.out, copy.out)
    seen: list[tuple[int, int, int]] = []
    with pytest.raises(signals.Stopped, match=r"without --fresh\); it goes on there"):
        run_plan(copy.plan(course(), fresh=True), stopping(1, 1, seen))
    taken: list[Path] = []

    def watch(event: Mapping[str, Any]) -> None:
        stopping(1, 0, seen)(event)
        if event["event"] == "shared":
            taken.append(event["path"])

    plan = copy.plan(course())
    run_plan(plan, watch)
    assert len(seen) == len(set(seen)) == 2
    assert taken == [plan.step_folder(2) / "step2.pt"]  # it goes on from the same bits


@pytest.mark.parametrize("text", ["", '{"schema": 2}', '{"schema": 1, "status": "finished"}'])
def test_fresh_replaces_a_record_that_cannot_be_read(
    text: str, runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    copy = Runs(tmp_path / "out", cache_root)
    plan = copy.plan(course(), fresh=True)
    plan.folder.mkdir(parents=True)
    (plan.folder / "run.json").write_text(text, encoding="utf-8")
    begun: list[object] = []

    class Begun(Course):
        def go(self) -> None:
            begun.append(self.record.status)

    with pytest.raises(StoreError) as refused:
        run_plan(copy.plan(course()), course=Begun)
    assert "--fresh" in str(refused.value)
    run_plan(plan, course=Begun)
    assert begun == ["unfinished"]
    assert not (plan.folder / "run.json").exists()


def test_a_declared_lesion_is_part_of_what_a_step_depends_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling by class treats tumors and cysts apart; clbench's own structures stay what they are."""
    plan = runs.plan(course())
    known = plan.lesson(1).learns[0]
    assert not any("lesions" in step for step in plan.steps)
    own = {name: one for name, one in taxonomy.STRUCTURES.items() if name != known}
    monkeypatch.setattr(identity, "STRUCTURES", own)
    found = []
    for kind in ("organ", "cyst", "tumor"):
        facts = replace(taxonomy.structure(known), kind=kind)  # type: ignore[arg-type]
        monkeypatch.setattr(identity, "structure", lambda name, facts=facts: facts)
        found.append(runs.plan(course()).steps[0])
    assert [step.get("lesions") for step in found] == [None, [known], [known]]
    assert all({**step, "lesions": []} == {**found[0], "lesions": []} for step in found)


def test_a_trace_is_not_begun_half_way(
    runs: Runs, base: Path, cache_root: Path, tmp_path: Path
) -> None:
    """The run's id does not hold it, the steps' ids do."""
    notes: list[str] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["what"])

    run_plan(runs.plan(course(), "examine.trace_every=1"), watch)
    (note,) = notes
    assert "begun with another examine.trace_every" in note
    assert "--set examine.trace_every=0, or --fresh" in note
    copy = Runs(tmp_path / "out", cache_root)
    with pytest.raises(signals.Stopped):
        run_plan(copy.plan(course()), stopping(1, 1, []))
    with pytest.raises(SettingError, match=r"another examine\.trace_every"):
        run_plan(copy.plan(course(), "examine.trace_every=1"))
    folder = run_plan(copy.plan(course(), "examine.trace_every=0"))
    assert (folder / "scores.csv").read_bytes() == (base / "scores.csv").read_bytes()


def identified(plan: Plan, **changed: Any) -> list[str]:
    """Ids of the steps of a plan, as of another identity."""
    steps = identity.step_identities(
        replace(plan.identity, **changed), benchmark=plan.benchmark, catalog=plan.catalog,
        profile=plan.profile, strategy=plan.strategy, vectors=plan.vectors,
    )  # fmt: skip
    return [run_folder.run_id(step) for step in steps]


@pytest.mark.parametrize(
    "word",
    [
        "backbone.size=24", "data.patch_vox=64,64,64",
        "data.window_hu=-100,200", "data.sampling=class_ratio", "data.shift_intensity=0.5",
    ],
)  # fmt: skip
def test_another_network_or_other_crops_share_no_step(runs: Runs, word: str) -> None:
    here, there = ids(runs.plan(course())), ids(runs.plan(course(), word))
    assert not set(here) & set(there)


def test_other_weights_and_other_numerics_share_no_step(runs: Runs) -> None:
    plan = runs.plan(course())
    here = identified(plan)
    assert here == ids(plan)
    for changed in ({"weights": "0" * 64}, {"numerics": plan.identity.numerics + 1}):
        assert not set(here) & set(identified(plan, **changed))


def test_a_trace_of_cleaned_predictions_is_another_one(runs: Runs) -> None:
    traced = ids(runs.plan(course(), "examine.trace_every=1"))
    cleaned = ids(runs.plan(course(), "examine.trace_every=1", "examine.postprocess=true"))
    assert (traced[0] == cleaned[0], traced[1] == cleaned[1]) == (True, False)


def test_code_of_a_backbone_from_elsewhere_counts_and_of_a_plain_first_step_none(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(Finetune):
        pass

    here, mine = runs.plan(course()), runs.plan(course(), strategy=Mine())
    assert ["code" in step for step in mine.steps] == ["code" in here.steps[0], True]
    monkeypatch.setattr(identity.registry, "load", lambda kind, name: Mine)
    (name,) = identity.foreign_code(Finetune(), here.profile)
    assert name.endswith("Mine")


def test_a_first_step_may_have_a_version_of_its_own() -> None:
    class Later(Finetune):
        version = 3
        step1_version = 2

        def first_step(self) -> Strategy:
            return self

    assert identity.first_step(Later())["version"] == 2


def test_what_a_course_declares_of_old_structures_is_part_of_what_a_step_depends_on(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudo labels are cleaned by it; a structure that declares nothing more moves no id."""
    plan = runs.plan(course())
    known = plan.lesson(1).learns[0]
    monkeypatch.setattr(
        identity, "STRUCTURES", {n: s for n, s in taxonomy.STRUCTURES.items() if n != known}
    )
    plain = replace(taxonomy.structure(known), single_component=False, mirror=None, parent=None)
    found = []
    for facts in (
        plain,
        replace(plain, aliases=("x",)),
        replace(plain, parent="pancreas"),  # in the digests of the volumes
        replace(plain, single_component=True),
        replace(plain, mirror="pancreas"),
    ):
        monkeypatch.setattr(identity, "structure", lambda name, facts=facts: facts)
        found.append(runs.plan(course()).steps)
    assert found[0] == found[1] == found[2] == plan.steps
    assert not any("declared" in step for step in plan.steps)
    one, other = ({"single_component": True}, {"mirror": "pancreas"})
    assert [s["declared"] for s in found[3]] == [{known: one}] * 2  # the second does not show it
    assert [s["declared"] for s in found[4]] == [{known: other}] * 2
    assert known not in found[3][1]["shown"]


def test_cases_that_hold_what_they_do_not_annotate_share_no_step_that_saw_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real data; the phantom draws what a case annotates, and nothing else."""
    held = frozenset({"colon"})
    monkeypatch.setattr(VolumeCache, "unannotated", lambda self, files, source: held)
    plan = runs.plan(course())
    before = identified(plan)
    assert not any("hidden" in step for step in plan.steps)
    monkeypatch.setattr(plan.catalog, "patients", True)
    found = []
    for hidden in (held, frozenset()):
        monkeypatch.setattr(VolumeCache, "unannotated", lambda *_, hidden=hidden: hidden)
        monkeypatch.delitem(vars(plan), "steps", raising=False)
        found.append(plan.steps)
    first, second = found[0]
    assert first["hidden"] == ["1001"]  # the others annotate what it hides: all was hidden before
    assert second["hidden"] == ["2000", "2001", "2010"]
    assert [run_folder.run_id(step) for step in found[1]] == before
    assert not {run_folder.run_id(step) for step in found[0]} & set(before)
