"""Crops and batches of training cases, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clbench.data.crops import crop, cut_crop, draw_place
from clbench.data.labels import UNKNOWN
from clbench.data.pseudo_labels import PseudoMap
from clbench.data.volume import Volume
from clbench.reproducibility import derive_seed
from clbench.spec.settings import DataSettings
from clbench.spec.taxonomy import DECLARED, declare
from clbench.strategy.contract import CutCrop, Lesson, Phase

CaseKey = tuple[int, str]
"""(step whose source holds it, case id)."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What one step is taught with."""

    volumes: Mapping[CaseKey, Volume]
    """Every case that may be drawn."""
    weights: Mapping[CaseKey, float]
    """How often a case is drawn; this step's own cases weigh 1 together."""
    pseudo: Mapping[CaseKey, PseudoMap]
    """Offline pseudo labels, where there are any."""
    patch_vox: tuple[int, int, int]
    data: DataSettings
    validation: Callable[[str], Volume] | None = None
    """Opens a validation case of this step, for sessions that ask for one."""


def draw_cases(
    weights: Mapping[CaseKey, float], count: int, *, own: Sequence[CaseKey], seed: int
) -> list[CaseKey]:
    """`count` cases for one epoch.

    Without past cases every case comes once before any comes twice; with them, cases are drawn by
    weight, with replacement. Cases of weight 0 are as if they were not there.

    Args:
        weights: (step, case id) → weight; those of other steps are past cases.
        count: cases of the epoch.
        own: the cases of the step that is being taught.
        seed: of this epoch.
    """
    weights = {key: weight for key, weight in weights.items() if weight > 0}
    rng = np.random.Generator(np.random.PCG64(seed))
    if set(weights) == set(own):
        order: list[CaseKey] = []
        while len(order) < count:
            order += [own[i] for i in rng.permutation(len(own))]
        return order[:count]
    keys = sorted(weights)
    p = np.array([weights[k] for k in keys], dtype=np.float64)
    return [keys[i] for i in rng.choice(len(keys), size=count, p=p / p.sum())]


class Crops(Dataset[dict[str, Any]]):
    """All crops of one phase, numbered; item i is a function of its number alone."""

    def __init__(
        self,
        lesson: Lesson,
        phase: Phase,
        material: Material,
        *,
        epochs: int,
        per_epoch: int,
        seed: int,
        cut_only: bool = False,
    ) -> None:
        """Number the crops.

        Args:
            lesson: the step.
            phase: of the step.
            material: volumes, weights and pseudo labels.
            epochs: of the phase.
            per_epoch: crops of an epoch.
            seed: of the run.
            cut_only: leave augmentation to the device (`clbench.training.device_batches`).
        """
        self.cut_only = cut_only
        self.lesson, self.phase, self.material = lesson, phase, material
        self.epochs, self.per_epoch, self.seed = epochs, per_epoch, seed
        self._own = [(lesson.number, c) for c in lesson.cases]
        self._orders: dict[int, list[CaseKey]] = {}
        self._declared = tuple(DECLARED.values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that was not forked, tell the taxonomy what the course declares."""
        self.__dict__.update(state)
        declare(self._declared, "a loader worker")

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def _order(self, epoch: int) -> list[CaseKey]:
        if epoch not in self._orders:
            seed = derive_seed(self.seed, self.lesson.number, self.phase.name, "order", epoch)
            self._orders = {
                epoch: draw_cases(self.material.weights, self.per_epoch, own=self._own, seed=seed)
            }
        return self._orders[epoch]

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, self.per_epoch)
        key = self._order(epoch)[place]
        case = {"case": f"{key[0]}/{key[1]}"}
        volume, structures = self.material.volumes[key], self.lesson.structures
        drawn: dict[str, Any] = {
            "patch_vox": self.material.patch_vox,
            "data": self.material.data,
            "seed": derive_seed(self.seed, self.lesson.number, self.phase.name, epoch, place),
            "pseudo": self.material.pseudo.get(key),
        }
        if self.cut_only:
            return {**cut_crop(volume, structures, **drawn), **case}
        image, label, pseudo = crop(volume, structures, **drawn)
        return {"image": image, "label": label, "pseudo": pseudo, **case}


STACKED = ("hu", "planes", "window", "shift")
"""Parts of crops that were only cut, which `collate` stacks as they are."""


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack crops; where only some have pseudo labels, the others get 255 (none)."""
    pseudo = [i["pseudo"] for i in items]
    like = next((p for p in pseudo if p is not None), None)
    if like is not None:
        pseudo = [
            p if p is not None else np.full(like.shape, UNKNOWN, dtype=np.uint8) for p in pseudo
        ]
    beside = {
        "pseudo": torch.from_numpy(np.stack(pseudo)) if pseudo[0] is not None else None,
        "cases": tuple(i["case"] for i in items),
    }
    if "hu" in items[0]:
        # torch shifts signed integers of every size, unsigned ones of one byte alone
        size = max(i["bits"].itemsize for i in items)
        bits = np.stack([i["bits"].astype(f"u{size}") for i in items])
        return {
            "bits": torch.from_numpy(bits.view(f"i{size}") if size > 1 else bits),
            **{n: torch.from_numpy(np.stack([i[n] for i in items])) for n in STACKED},
            **{n: [i[n] for i in items] for n in ("pad", "turns")},
            **beside,
        }
    return {
        "image": torch.from_numpy(np.stack([i["image"] for i in items])),
        "label": torch.from_numpy(np.stack([i["label"] for i in items])),
        **beside,
    }


def draw_from(lesson: Lesson, phase: Phase, material: Material, *, seed: int) -> CutCrop:
    """Crops for a session, cut as the loop cuts its own, numbered by places of their own.

    Args:
        lesson: the step.
        phase: the phase of it.
        material: volumes, patch size and data settings.
        seed: of the run.
    """

    def draw(
        case: Volume | CaseKey, place: Sequence[object], beside: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        volume = case if isinstance(case, Volume) else material.volumes[case]
        patch_vox, data = material.patch_vox, material.data
        own_seed = derive_seed(seed, lesson.number, phase.name, *place)
        image, label, _ = crop(
            volume, lesson.structures, patch_vox=patch_vox, data=data, seed=own_seed
        )
        cut = [torch.from_numpy(image), torch.from_numpy(label)]
        if beside is not None:
            at = draw_place(volume, patch_vox=patch_vox, data=data, seed=own_seed)
            cut.append(torch.from_numpy(at.cut(beside.numpy()[(slice(None), *at.index)], 0.0)))
        return tuple(cut)

    return draw
