"""A course as an Avalanche scenario: its streams, experiences and samples, by Avalanche's names.

Class c of Avalanche is channel c of clbench: the structures in the
order in which the course teaches them. A sample is (image, label); a mini-batch adds the task
label, which is 0 throughout: the courses are class-incremental, and nobody tells a model at test
time which step a patient belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from clbench.avalanche.lazy_import import load
from clbench.data.catalog import Purpose, exam_cases
from clbench.data.crops import crop
from clbench.data.volume import Volume
from clbench.errors import SettingError
from clbench.reproducibility import derive_seed
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.spec.benchmark import Benchmark
from clbench.spec.settings import Profile
from clbench.spec.splits import Split
from clbench.strategy.contract import UNKNOWN, Phase, Strategy
from clbench.training.batches import CaseKey, Crops, Material
from clbench.training.loop import phase_length

_CLScenario: Any = load("avalanche.benchmarks.scenarios.generic_scenario").CLScenario
_EagerCLStream: Any = load("avalanche.benchmarks.scenarios.generic_scenario").EagerCLStream
_DatasetExperience: Any = load("avalanche.benchmarks.scenarios.dataset_scenario").DatasetExperience
_data = load("avalanche.benchmarks.utils.data")
_attribute = load("avalanche.benchmarks.utils.data_attribute")
_flat = load("avalanche.benchmarks.utils.flat_data")

Sample = tuple[Tensor, Tensor]
"""(1, *patch) float32; (all structures, *patch) uint8: 0, 1, 255 = not annotated."""


def scenario(
    bench: str | Benchmark,
    *,
    data: str | Path | None = None,
    profile: str | None = None,
    seed: int = 0,
    splits: Mapping[str, Split] | None = None,
    overrides: Sequence[str] = (),
    cache: Path | None = None,
) -> Scenario:
    """A clbench benchmark for Avalanche's strategies; the arguments are those of `clbench run`.

    One pass of Avalanche over an experience (`train_epochs=1`) sees the crops of all epochs of the
    profile, each once: those that `clbench run` draws with the same seed, in the same order where
    `strategy.train(experience, shuffle=False)` asks for it. A crop is a function of its number, so
    loader workers never repeat one, and a replay buffer keeps what was seen.

    Args:
        bench: registered benchmark, path of a TOML file, or the benchmark itself.
        data: `name=PATH,…` or one folder; None: the phantom.
        profile: None: `quick` on the phantom, `paper` on real data.
        seed: of order, crops and initial weights.
        splits: source or step → split that replaces the benchmark's.
        overrides: `group.name=value` words, as after `--set`.
        cache: where preprocessed volumes and the phantom are kept.

    Raises:
        ClbenchError: a name, setting or data that cannot be used; nothing is trained.
    """
    if named := [word for word in overrides if word.startswith("strategy.")]:
        raise SettingError(
            "a scenario has no strategy whose settings could be changed",
            where="overrides",
            got=", ".join(named),
            next_step="give them to Avalanche's strategy",
        )
    benchmark = bench if isinstance(bench, Benchmark) else None
    settings = RunSettings(
        bench=bench if isinstance(bench, str) else bench.name,
        strategy="avalanche",
        seed=seed,
        profile=profile,
        data=None if data is None else str(data),
        splits=splits or {},
        overrides=tuple(overrides),
        device="cpu",  # Avalanche's strategy says where it computes
        cache=cache,
    )
    return Scenario(resolve(settings, benchmark=benchmark, strategy=_AvalancheModel()).open())


@dataclass(frozen=True, kw_only=True)
class _AvalancheModel(Strategy):
    """Stands in for a strategy where a plan asks for one: Avalanche does the teaching."""

    past: ClassVar[Literal["nothing"]] = "nothing"


class Scenario(_CLScenario):  # type: ignore[misc]  # Avalanche has no types
    """An Avalanche benchmark with `train_stream` and `test_stream`.

    There is a `valid_stream` too where every step of the course has validation cases.
    """

    def __init__(self, plan: Plan) -> None:
        for step in plan.benchmark.steps:
            if not step.learns:
                raise SettingError(
                    "a step that only teaches again has no class for Avalanche",
                    where=f"{plan.benchmark.name}, step {step.name!r}",
                    expected="a course whose every step learns a structure",
                    got=f"again = {', '.join(step.again)}",
                    next_step="teach this course with `clbench run`",
                )
        self.plan = plan
        benchmark, splits = plan.benchmark, plan.catalog.splits
        numbers = range(1, len(benchmark.steps) + 1)
        self.n_experiences = len(numbers)
        self.structures: tuple[str, ...] = benchmark.structures(self.n_experiences)
        """Structure of every class."""
        self.n_classes = len(self.structures)
        self.n_classes_per_exp = [len(step.learns) for step in benchmark.steps]
        streams = [
            _EagerCLStream("train", [Experience(self, n, "train") for n in numbers]),
            _EagerCLStream("test", [Experience(self, n, "test") for n in numbers]),
        ]
        if all(split.validation for split in splits):
            valid = [Experience(self, n, "validation") for n in numbers]
            streams.append(_EagerCLStream("valid", valid))
        super().__init__(streams)
        for stream in streams:
            stream.benchmark = self

    @property
    def profile(self) -> Profile:
        """All settings; `profile.train` holds learning rate and batch of a run of clbench."""
        return self.plan.profile


class Experience(_DatasetExperience):  # type: ignore[misc]  # Avalanche has no types
    """One step of the course, or its test or validation cases.

    Attributes are Avalanche's: `dataset`, `current_experience`, `origin_stream`, `benchmark`,
    `task_label`, `task_labels`, `classes_in_this_experience`, `previous_classes`,
    `classes_seen_so_far`, `future_classes`; and of clbench: `structures`, `cases`, `volume`.

    A test experience holds every test case of the source that teaches its structures.
    """

    def __init__(self, scenario: Scenario, number: int, purpose: Purpose) -> None:
        plan, split = scenario.plan, scenario.plan.catalog.splits[number - 1]
        self.cases: tuple[str, ...] = split.train if purpose == "train" else split.validation
        """Case ids."""
        if purpose == "test":
            own = plan.catalog.source(number).name
            self.cases = tuple(c for _, source, c in exam_cases(plan.catalog) if source == own)
        self._number, self._purpose, self._plan = number, purpose, plan
        kind = _Crops if purpose == "train" else _Views
        super().__init__(dataset=_wrapped(kind(self)), current_experience=number - 1)
        self.benchmark = scenario
        self.structures: tuple[str, ...] = plan.benchmark.steps[number - 1].learns
        """Structures that this step teaches, one for each of its classes."""
        ends = np.cumsum([0, *scenario.n_classes_per_exp]).tolist()
        self.classes_in_this_experience = list(range(ends[number - 1], ends[number]))
        self.previous_classes = list(range(ends[number - 1]))
        self.classes_seen_so_far = list(range(ends[number]))
        self.future_classes = list(range(ends[number], ends[-1]))
        self.task_label, self.task_labels = 0, [0]

    def volume(self, case: str) -> Volume:
        """A whole case: as this step shows it, or with all its annotation in the test stream.

        Raises:
            SettingError: a case of another experience.
        """
        if case not in self.cases:
            raise SettingError(
                "the experience does not hold this case",
                where=f"step {self._number}, {self._purpose}",
                expected=f"one of {', '.join(self.cases)}",
                got=case,
            )
        catalog = self._plan.catalog
        catalog.step = self._number  # the ledger and the guard of the past go by it
        return catalog.open(self._number, case, self._purpose)


class _Volumes(Mapping[CaseKey, Volume]):
    """The cases of an experience, opened when they are first asked for."""

    def __init__(self, experience: Experience) -> None:
        self.experience = experience

    def __getitem__(self, key: CaseKey) -> Volume:
        return self.experience.volume(key[1])

    def __iter__(self) -> Iterator[CaseKey]:
        return ((self.experience._number, case) for case in self.experience.cases)

    def __len__(self) -> int:
        return len(self.experience.cases)


class _Crops(Dataset[Sample]):
    """The crops of a step, as clbench's own loop draws them; item i depends on i alone."""

    def __init__(self, experience: Experience) -> None:
        plan, number = experience._plan, experience._number
        train, lesson = plan.profile.train, plan.lesson(number)
        volumes = _Volumes(experience)
        self.crops = Crops(
            lesson,
            Phase(),
            Material(
                volumes=volumes,
                weights={key: 1.0 / len(volumes) for key in volumes},
                pseudo={},
                patch_vox=plan.catalog.preprocessing.patch_vox,
                data=plan.profile.data,
            ),
            epochs=train.epochs,
            per_epoch=phase_length(Phase(), lesson, train) * train.crops,
            seed=plan.settings.seed,
        )
        self.classes = len(plan.benchmark.structures(len(plan.benchmark.steps)))

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends a plain `for` loop over the dataset
        item = self.crops[index]
        return _sample(item["image"], item["label"], self.classes)


class _Views(Dataset[Sample]):
    """One patch of each case, not augmented, always the same: for losses, not for scores."""

    def __init__(self, experience: Experience) -> None:
        self.experience = experience
        plan = experience._plan
        self.structures = plan.benchmark.structures(len(plan.benchmark.steps))
        self.data = replace(plan.profile.data, rotate90=0.0, shift_intensity=0.0)

    def __len__(self) -> int:
        return len(self.experience.cases)

    def __getitem__(self, index: int) -> Sample:
        plan, case = self.experience._plan, self.experience.cases[index]
        image, label, _ = crop(
            self.experience.volume(case),
            self.structures,
            patch_vox=plan.catalog.preprocessing.patch_vox,
            data=self.data,
            seed=derive_seed(plan.settings.seed, self.experience._number, "view", case),
        )
        return _sample(image, label, len(self.structures))


def _sample(image: NDArray[np.float32], label: NDArray[np.uint8], classes: int) -> Sample:
    """Every sample of the course has all channels: a replay batch mixes samples of many steps."""
    later = ((0, classes - len(label)), (0, 0), (0, 0), (0, 0))
    whole = np.pad(label, later, constant_values=UNKNOWN)
    return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(whole)


def _wrapped(samples: Dataset[Sample]) -> Any:
    """An Avalanche dataset of these samples, with task labels and targets beside them."""
    attribute, targets = _attribute.DataAttribute, _Targets(samples)
    beside = [
        attribute(targets, "targets"),
        attribute(_flat.ConstantSequence(0, len(targets)), "targets_task_labels"),
    ]
    return _data.AvalancheDataset([samples], data_attributes=beside, collate_fn=collate)


class _Targets(Sequence[int]):
    """One class per sample, for buffers that are balanced by class: the last one it holds.

    The class last in the course is the one that samples hold least often; -1 where there is none.
    Made only when asked for, since every crop has to be cut for it.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        held = (self.samples[index][1] == 1).flatten(1).any(dim=1).nonzero()
        return int(held[-1]) if len(held) else -1


def collate(samples: Sequence[Sample]) -> list[Tensor]:
    """Samples → the mini-batch Avalanche expects: x, y and the task labels.

    Returns:
        x (B, 1, *patch) float32; y (B, all structures, *patch) uint8; t (B,) int64, all 0.
    """
    images, labels = [s[0] for s in samples], [s[1] for s in samples]
    return [torch.stack(images), torch.stack(labels), torch.zeros(len(samples), dtype=torch.int64)]
