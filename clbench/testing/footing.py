"""Rules about what a benchmark stands on: text vectors, the default network, the phantom.

Room: row 5 (torch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from clbench import registry, store
from clbench.data.phantom import known_structures
from clbench.losses import dice_bce, targets
from clbench.nets.heads import ConvHead, Segmenter
from clbench.plan import RunSettings, make_plan
from clbench.run import run_plan
from clbench.settings import load_profile
from clbench.spec import Benchmark, Source, Step
from clbench.splits import Split
from clbench.strategy import Batch, Kit, Lesson, Memory, Output, Strategy
from clbench.testing.bed import tiny_kit
from clbench.testing.rules import Broken, Exempt
from clbench.testing.tiny import OVERRIDES

REAL_PROFILE, PHANTOM_PROFILE = "paper", "quick"
"""The profiles a run takes by default, on data and on the phantom."""


class Exam:
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


def every_structure_has_a_text_vector(exam: Exam) -> None:
    """Language-driven heads stop at the first structure they have no words for."""
    text = load_profile(REAL_PROFILE).text
    structures = exam.benchmark.structures(len(exam.benchmark.steps))
    registry.load("encoding", text.encoding)(structures, prompt=text.prompt, path=text.path)


def the_default_network_takes_its_patches(exam: Exam) -> None:
    """Else the first real run ends with an error that the phantom never showed."""
    settings = load_profile(REAL_PROFILE).backbone
    stride, smallest = _sizes(settings.name, settings.size)
    patch = exam.benchmark.preprocessing.patch_vox
    if any(n % stride for n in patch) or min(patch) < smallest:
        raise Broken(
            f"{settings.name}, the network of profile {REAL_PROFILE!r}, cannot work on the patches",
            where="preprocessing.patch_vox",
            expected=f"multiples of {stride}, at least {smallest}",
            got=patch,
        )


@lru_cache
def _sizes(name: str, size: int) -> tuple[int, int]:
    """Stride and smallest patch of a backbone; building a large one takes seconds."""
    network = registry.load("backbone", name)(size)
    return int(network.stride), int(network.smallest)


# -------------------------------------------------------------------------------- the phantom


def _on_phantom(exam: Exam, steps: Sequence[Step]) -> None:
    """Exempt where the phantom lacks a structure of these steps."""
    absent = [n for step in steps for n in step.learns if n not in known_structures()]
    if absent:
        raise Exempt(f"the phantom has no {', '.join(absent)}")


def the_phantom_has_cases_enough(exam: Exam) -> None:
    """`clbench run` without --data takes as many cases as the profile asks for."""
    _on_phantom(exam, exam.benchmark.steps)
    settings = load_profile(PHANTOM_PROFILE).phantom
    for kind, step, _, split in exam.splits():
        for part in ("train", "validation", "test") if kind == "phantom" else ():
            if len(getattr(split, part)) < getattr(settings, part):
                raise Broken(
                    f"the phantom split has too few {part} cases",
                    where=f"step {step.name!r}, phantom_split {split.name!r}",
                    expected=f"{getattr(settings, part)}, as profile {PHANTOM_PROFILE!r} asks for",
                    got=len(getattr(split, part)),
                    next_step="list more (any number will do), or leave phantom_split out",
                )


@dataclass(frozen=True, kw_only=True)
class _Plain(Strategy):
    """Plain training with one output per structure: enough to walk through a course."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        with kit.fresh(step.number, "model"):
            backbone = kit.backbone()
            head = ConvHead(int(backbone.final_channels), background=False)  # type: ignore[arg-type]  # every backbone has it
            model = Segmenter(backbone, head)
            model.add(step.learns)
        return model

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        assert isinstance(model, Segmenter)  # noqa: S101  # built above
        with kit.fresh(step.number, "grow"):
            model.add(step.learns)

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        return dice_bce(new.logits, *targets(batch))


def two_steps_run_on_the_phantom(exam: Exam) -> None:
    """What a reader of the benchmark will try first."""
    steps = exam.benchmark.steps[:2]
    _on_phantom(exam, steps)
    plan = make_plan(
        RunSettings(
            bench=exam.name, strategy="plain", profile="smoke", out=exam.folder / "runs",
            overrides=OVERRIDES, cache=exam.cache, device="cpu", keep_predictions=False,
        ),
        benchmark=replace(exam.benchmark, steps=steps, groups={}),
        strategy=_Plain(),
    )  # fmt: skip
    tiny_kit(plan)
    folder = run_plan(plan)
    rows = store.read_scores(folder / "scores.csv")
    for number, step in enumerate(steps, 1):
        scored = {r.structure for r in rows if r.step == number}
        if absent := [n for n in step.learns if n not in scored]:
            raise Broken(
                "learned structures have no row in the scores",
                where=f"step {step.name!r}, on the phantom",
                got=", ".join(absent),
            )
