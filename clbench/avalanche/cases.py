"""Data sets and experiences of a course for Avalanche: cases and their crops.

Which crop a plugin gets depends on when it asks alone, so a step
that is repeated shows it the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from clbench.avalanche.lazy_import import load
from clbench.data.volume import Volume
from clbench.strategy.contract import PhaseContext
from clbench.training.batches import CaseKey

_data = load("avalanche.benchmarks.utils.data")
_attribute = load("avalanche.benchmarks.utils.data_attribute")
_dataset = load("avalanche.benchmarks.scenarios.dataset_scenario")
_generic = load("avalanche.benchmarks.scenarios.generic_scenario")


class CropSource:
    """Where every crop of a plugin comes from: a function of when it was asked for."""

    def __init__(self, context: PhaseContext) -> None:
        self.context = context
        self.place: tuple[object, ...] = ()
        self.drawn: list[str] = []

    def at(self, *place: object) -> None:
        """Crops asked for from now on belong to this moment."""
        self.place, self.drawn = place, []

    def crop(self, case: CaseKey | Volume, name: str) -> tuple[Tensor, Tensor]:
        """Image and label of a new crop of a case."""
        self.drawn.append(name)
        image, label = self.context.draw(case, ("plugin", *self.place, len(self.drawn), name))
        return image, label


class Cases(Dataset[tuple[Tensor, Tensor]]):
    """Cases as samples (image (1, *patch), label (K, *patch)): a new crop at every access."""

    def __init__(self, crops: CropSource, keys: Sequence[CaseKey | Volume], names: Sequence[str]):
        self.crops, self.keys, self.names = crops, list(keys), list(names)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.crops.crop(self.keys[index], self.names[index])


def dataset(crops: CropSource, keys: Sequence[CaseKey | Volume], names: Sequence[str]) -> Any:
    """Cases as an Avalanche data set; every subset of it knows its cases by name.

    A mini-batch is (image, label, task), and the task is 0 throughout.

    Args:
        crops: cuts crops of the cases.
        keys: the cases, each as (step, case id), or as an open volume.
        names: what each is called in the data set, the same length.
    """
    if not keys:
        return _data.AvalancheDataset([])
    # a buffer that is balanced over classes has one class per step: a case shows many structures
    steps = [key[0] - 1 if isinstance(key, tuple) else 0 for key in keys]
    return _data.AvalancheDataset(
        [Cases(crops, keys, names)],
        data_attributes=[
            _attribute.DataAttribute(list(names), "case_keys"),
            _attribute.DataAttribute(steps, "targets"),
            _attribute.DataAttribute([0] * len(keys), "targets_task_labels", use_in_getitem=True),
        ],
    )


class Experience(_dataset.DatasetExperience):  # type: ignore[misc, name-defined]  # untyped
    """A step; classes are channels, in the order in which the course teaches them."""

    def __init__(self, data: Any, context: PhaseContext, stream: str) -> None:
        number = context.lesson.number - 1
        super().__init__(dataset=data, current_experience=number)
        self.origin_stream = _generic.EagerCLStream(stream, [self], set_stream_info=False)
        known, old = len(context.lesson.structures), len(context.lesson.old)
        self.structures = context.lesson.structures
        self.classes_in_this_experience = list(range(old, known))
        self.classes_seen_so_far = list(range(known))
        self.previous_classes = list(range(old))
        self.task_labels, self.task_label = [0], 0
