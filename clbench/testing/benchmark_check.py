"""`check_benchmark`: rules for a course, read from its file and tried on the phantom.

What contradicts itself is refused when the file is read; here stands what is
well formed and still makes a bad benchmark: cases that leak, structures nobody can learn or score.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NoReturn

from clbench.data.layouts import find_layout
from clbench.data.phantom.generate import known_structures
from clbench.nets.backbones import Backbone, new_backbone
from clbench.run.course import run_plan
from clbench.run.plan import RunSettings, resolve
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark, Source, Step
from clbench.spec.settings import BackboneSettings, load_profile
from clbench.spec.splits import Draw, Split
from clbench.store import run_folder
from clbench.testing.fixtures import OVERRIDES, reproducible
from clbench.testing.harness import tiny_kit
from clbench.testing.report import Broken, Exempt, Report, Rule, judge

# -------------------------------------------------------------------------------- the file


def the_file_is_valid(harness: BenchmarkHarness) -> None:
    """A field nobody reads, or a structure nobody knows, is a misunderstanding."""
    _ = harness.benchmark


def it_goes_by_its_name(harness: BenchmarkHarness) -> None:
    """The name is what one types after --bench, and the folder its results go to."""
    name = harness.benchmark.name
    if not registry.is_path(harness.name) and name != harness.name:
        raise Broken(
            "the file has another name than the entry point",
            where="name",
            expected=harness.name,
            got=name,
            next_step="make entry point, file name and `name` equal",
        )
    version = harness.benchmark.version
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Broken(
            "the version is not a whole number from 1 up",
            where="version",
            got=version,
            next_step="raise it with every change that moves a number",
        )


def it_says_what_it_is(harness: BenchmarkHarness) -> None:
    """A table without title, citation and licences cannot be published."""
    benchmark = harness.benchmark
    absent = [f for f in ("title", "citation") if not getattr(benchmark, f).strip()]
    absent += [f"licence of source {s.name!r}" for s in benchmark.sources if not s.licence.strip()]
    if absent:
        harness.owe(
            Broken(
                "something a reader needs is empty",
                where=f"benchmark {benchmark.name!r}",
                expected="title, citation, and the licence of every source ('private' is one)",
                got=f"empty: {', '.join(absent)}",
            )
        )


def every_source_is_used_and_can_be_read(harness: BenchmarkHarness) -> None:
    """A source that no step uses, or of a layout nobody reads, is found out in mid-run at best."""
    used = {part.source for part in harness.benchmark.with_cases}
    for source in harness.benchmark.sources:
        if source.name not in used:
            raise Broken(f"no step uses the source {source.name!r}", next_step="remove it")
        find_layout(source.layout)


def there_is_something_to_forget(harness: BenchmarkHarness) -> None:
    """Continual learning starts with the second step."""
    if len(harness.benchmark.steps) < 2:
        raise Broken(
            "the course has one step",
            where="step",
            expected="two or more",
            got=1,
        )


# --------------------------------------------------------------------------------- cases


def no_test_case_is_trained_on_in_any_step(harness: BenchmarkHarness) -> None:
    """Splits that are clean alone may leak together: a later step trains on an earlier test."""
    for a, b in itertools.product(list(harness.splits()), repeat=2):
        (kind, one, source, split), (other_kind, two, other_source, other) = a, b
        if (kind, source.name) != (other_kind, other_source.name):
            continue
        where = f"{kind}, source {source.name!r}, steps {one.name!r} and {two.name!r}"
        if split.draw is not None or other.draw is not None:
            _one_deck(split, other, where)
            continue
        # on the phantom every case is a subject of its own
        who = source.patient_of if kind == "real data" else str
        learned = {who(case) for case in other.train + other.validation}
        if both := [case for case in split.test if who(case) in learned]:
            raise Broken(
                f"test cases of step {one.name!r} are learned from in step {two.name!r}",
                where=where,
                expected="no test patient among the training or validation cases of any step",
                got=", ".join(both[:10]),
                next_step="move them to one side in every split of this source",
            )


def _one_deck(a: Split, b: Split, where: str) -> None:
    """Two drawn splits are safe if they deal from one deck: same order, same block size."""
    alike = ("seed", "train", "validation", "test", "needs", "among", "without")
    if a.draw is None or b.draw is None:
        raise Broken(
            "of two steps on one source, one draws its cases and one lists them",
            where=where,
            expected="both drawn, or both listed: else nobody can say that they do not overlap",
        )
    if differs := [f for f in alike if _any_order(a.draw, f) != _any_order(b.draw, f)]:
        raise Broken(
            "two steps draw from one source by different rules, so their cases may overlap",
            where=where,
            expected=f"equal {', '.join(alike)}, and another `part` for each step",
            got=f"different {', '.join(differs)}",
        )


def _any_order(draw: Draw, field: str) -> object:
    """A field of a rule; the order in which names and case ids are listed draws nothing else."""
    value = getattr(draw, field)
    return frozenset(value) if isinstance(value, tuple) else value


def every_learned_structure_can_be_taught_and_scored(harness: BenchmarkHarness) -> None:
    """A structure that no training case annotates is never learned; untested, never measured."""
    listed = 0
    for kind, step, source, split in harness.splits():
        if split.draw is not None:
            continue
        listed += 1
        for part in ("train", "test"):
            cases = getattr(split, part)
            for name in step.learns:
                if not any(name in source.annotated(case) for case in cases):
                    raise Broken(
                        f"no {part} case of the step annotates {name!r}",
                        where=f"step {step.name!r}, {kind}, split {split.name!r}",
                        expected="at least one",
                        got=f"{len(cases)} {part} cases without it (see `partial`)",
                        next_step="add cases that annotate it, or learn it in another step",
                    )
    if not listed:
        raise Exempt("every split is drawn from the data at hand")


def no_split_leaves_out_the_choices(harness: BenchmarkHarness) -> None:
    """Without validation cases, choices are made on test cases."""
    for kind, step, _, split in harness.splits():
        count = len(split.validation) if split.draw is None else split.draw.validation
        if not count and NO_VALIDATION not in split.origin:
            harness.owe(
                Broken(
                    "a split has no validation cases",
                    where=f"step {step.name!r}, {kind}, split {split.name!r}",
                    expected="one or more",
                    next_step="take them from the training cases; where a published protocol has "
                    f"none, say {NO_VALIDATION!r} in the split's `origin`",
                )
            )


# -------------------------------------------------------------------------- tables, networks


def table_groups_cover_every_structure(harness: BenchmarkHarness) -> None:
    """What stands in no group is in no table."""
    groups = harness.benchmark.groups
    if not groups:
        raise Exempt("no groups are named: tables show the mean over all structures")
    for group, names in groups.items():
        if not names:
            raise Broken("a table group is empty", where=f"groups.{group}")
    learned = harness.benchmark.structures(len(harness.benchmark.steps))
    if absent := [n for n in learned if all(n not in names for names in groups.values())]:
        harness.owe(
            Broken(
                "learned structures stand in no table group",
                where="groups",
                expected="each in at least one",
                got=", ".join(absent),
            )
        )


# --------------------------------------------------------------------------------------------------
# Rules about what a benchmark stands on: text vectors, the default network, the phantom.


NO_VALIDATION = "no validation cases"
"""In the `origin` of a split: a published protocol has none, and none are to be taken off."""
REAL_PROFILE, PHANTOM_PROFILE = "paper", "quick"
"""The profiles a run takes by default, on data and on the phantom."""


class BenchmarkHarness:
    """A benchmark under examination.

    What only a published benchmark owes its readers is asked of registered ones; of a file of one's
    own it is remarked on.

    Args:
        name: registered name, or path of a TOML file.
        folder: an empty folder for what is written.
        cache: where the phantom is kept.
    """

    def __init__(self, name: str, *, folder: Path, cache: Path) -> None:
        self.name, self.folder, self.cache = name, folder, cache

    @cached_property
    def benchmark(self) -> Benchmark:
        """The parsed file."""
        return registry.benchmark(self.name)

    def owe(self, debt: Broken) -> NoReturn:
        """Complain of a registered benchmark; remark on a file."""
        if registry.is_path(self.name):
            got = f": {debt.got}" if debt.got is not None else ""
            raise Exempt(f"a file of your own may leave this: {debt.what}{got}")
        raise debt

    def splits(self) -> Iterator[tuple[str, Step, Source, Split]]:
        """(on real data or phantom, step, source, split) of every split the file names."""
        for step in self.benchmark.steps:
            yield "real data", step, self.benchmark.source(step.source), step.split
        for step in self.benchmark.steps:
            if step.phantom_split is not None:
                source = self.benchmark.source(step.source)
                yield "phantom", step, source, step.phantom_split


def every_structure_has_a_text_vector(harness: BenchmarkHarness) -> None:
    """Language-driven heads stop at the first structure they have no words for."""
    text = load_profile(REAL_PROFILE).text
    structures = harness.benchmark.structures(len(harness.benchmark.steps))
    registry.load("encoding", text.encoding)(structures, prompt=text.prompt, path=text.path)


def the_default_network_takes_its_patches(harness: BenchmarkHarness) -> None:
    """Else the first real run ends with an error that the phantom never showed."""
    settings = load_profile(REAL_PROFILE).backbone
    fitting = _network(settings).fitting(patch := harness.benchmark.preprocessing.patch_vox)
    if fitting != patch:
        raise Broken(
            f"{settings.name}, the network of profile {REAL_PROFILE!r}, cannot work on the patches",
            where="preprocessing.patch_vox",
            expected=f"{' x '.join(map(str, fitting))}, say",
            got=" x ".join(map(str, patch)),
        )


@lru_cache
def _network(settings: BackboneSettings) -> Backbone:
    """A backbone, to be asked what it takes; building a large one takes seconds."""
    return new_backbone(settings)


# -------------------------------------------------------------------------------- the phantom


def _on_phantom(harness: BenchmarkHarness, steps: Sequence[Step]) -> None:
    """Exempt where the phantom lacks a structure of these steps."""
    absent = [n for step in steps for n in step.learns if n not in known_structures()]
    if absent:
        raise Exempt(f"the phantom has no {', '.join(absent)}")


def the_phantom_has_cases_enough(harness: BenchmarkHarness) -> None:
    """`clbench run` without --data takes as many cases as the profile asks for."""
    _on_phantom(harness, harness.benchmark.steps)
    settings = load_profile(PHANTOM_PROFILE).phantom
    for kind, step, _, split in harness.splits():
        for part in ("train", "validation", "test") if kind == "phantom" else ():
            asked = getattr(settings, part)
            least = 1 if asked is None else asked  # None: all that are listed
            if len(getattr(split, part)) < least:
                raise Broken(
                    f"the phantom split has too few {part} cases",
                    where=f"step {step.name!r}, phantom_split {split.name!r}",
                    expected=f"{least}, as profile {PHANTOM_PROFILE!r} asks for",
                    got=len(getattr(split, part)),
                    next_step="list more (any number will do), or leave phantom_split out",
                )


def two_steps_run_on_the_phantom(harness: BenchmarkHarness) -> None:
    """What a reader of the benchmark will try first."""
    steps = harness.benchmark.steps[:2]
    _on_phantom(harness, steps)
    plan = resolve(
        RunSettings(
            bench=harness.name, strategy="finetune", profile="smoke", out=harness.folder / "runs",
            overrides=OVERRIDES, cache=harness.cache, device="cpu", keep_predictions=False,
        ),
        benchmark=replace(harness.benchmark, steps=steps, groups={}, order=()),
        strategy=registry.load("strategy", "finetune")(),
    )  # fmt: skip
    tiny_kit(plan)
    folder = run_plan(plan)
    rows = run_folder.read_scores(folder / "scores.csv")
    for number, step in enumerate(steps, 1):
        scored = {r.structure for r in rows if r.step == number}
        if absent := [n for n in step.learns if n not in scored]:
            raise Broken(
                "learned structures have no row in the scores",
                where=f"step {step.name!r}, on the phantom",
                got=", ".join(absent),
            )


_FILE = (the_file_is_valid,)
RULES: tuple[Rule[BenchmarkHarness], ...] = (
    Rule(check=the_file_is_valid),
    Rule(check=it_goes_by_its_name, needs=_FILE),
    Rule(check=it_says_what_it_is, needs=_FILE),
    Rule(check=every_source_is_used_and_can_be_read, needs=_FILE),
    Rule(check=there_is_something_to_forget, needs=_FILE),
    Rule(check=no_test_case_is_trained_on_in_any_step, needs=_FILE),
    Rule(check=every_learned_structure_can_be_taught_and_scored, needs=_FILE),
    Rule(check=no_split_leaves_out_the_choices, needs=_FILE),
    Rule(check=table_groups_cover_every_structure, needs=_FILE),
    Rule(check=every_structure_has_a_text_vector, needs=_FILE),
    Rule(check=the_default_network_takes_its_patches, needs=_FILE),
    Rule(check=the_phantom_has_cases_enough, needs=_FILE),
    Rule(
        check=two_steps_run_on_the_phantom,
        needs=(the_file_is_valid, every_source_is_used_and_can_be_read),
    ),
)
"""Every rule; each stands behind those it needs."""


def check_benchmark(name: str, *, only: Sequence[str] = (), cache: Path | None = None) -> Report:
    """Try every rule on a benchmark, and two steps of it on the phantom where it can.

    Args:
        name: a registered name, or the path of a TOML file.
        only: names of rules; others are left out, unless one of these needs them.
        cache: where the phantom is kept; None: in a folder that is thrown away.

    Returns:
        The report: `report.ok`, `report.failed`, and `print(report)`.

    Raises:
        ClbenchError: there is no such benchmark or rule.
    """
    path = registry.benchmark_path(name)
    report = Report(title=f"benchmark {name}", facts=(f"read from {path}",))
    with tempfile.TemporaryDirectory(prefix="clbench-check-") as folder, reproducible():
        home = Path(folder)
        return judge(
            BenchmarkHarness(name, folder=home, cache=cache or home / "cache"), RULES, report, only
        )
