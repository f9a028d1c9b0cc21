"""Linear probe: how much of a structure a linear classifier still reads from a frozen body.

Where the probe keeps its Dice on the new body while the model lost it, what told the structure
apart is still in the features, and the head does not use it any more. The probe is fitted on
training cases of the step that taught the structure. It is a diagnosis: it is no part of any
training, and the cases it opened stand in the ledger under `diagnosis`.

Per structure a logistic regression on the last feature map, voxel by voxel, with as much weight on
voxels inside as outside. The threshold is the one with the highest Dice on the voxels it was
fitted on. Equal voxels are drawn for every body.

Source: Alain & Bengio 2016; for forgetting Davari et al., CVPR 2022 (Probing Representation
Forgetting). Differs: voxels instead of images, Dice instead of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from clbench.data.volume import Volume
from clbench.evaluation.sliding_window import VolumePredictor, undisturbed
from clbench.nets.heads import Segmenter
from clbench.nets.output import Output
from clbench.reproducibility import derive_seed
from clbench.types import Bits, bits_dtype

CASES = 10
"""Training cases a probe is fitted on at the most, spread evenly over the list."""
VOXELS = 1000
"""Voxels drawn at the most per case and pattern of structures."""
DECAY = 1e-3
"""Weight decay (L2) of the standardized coefficients."""
UPDATES = 100
"""Iterations of L-BFGS at the most."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear classifier of voxels per structure."""

    structures: tuple[str, ...]
    """The K structures."""
    weight: Tensor
    """(K, C) float32."""
    bias: Tensor
    """(K,) float32; above 0 is foreground."""

    def __call__(self, features: Tensor) -> Tensor:
        """(C, d, H, W) feature map → (K, d, H, W) bool masks."""
        scores = torch.einsum("kc,cdhw->kdhw", self.weight, features)
        return scores + self.bias[:, None, None, None] > 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Voxels of one case or several."""

    features: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N, K) bool; K structures."""
    weights: Tensor
    """(N,) float64: how many voxels each stands for."""
    known: Tensor
    """(N, K) bool: whether the case annotates the structure."""


def last_map(model: nn.Module, learned_at: int, patch_vox: Sequence[int]) -> str:
    """The feature map that the head of some structures reads; empty: there is none to probe.

    Args:
        model: (B, 1, *patch) → `Output`.
        learned_at: step of the structures; where bodies are separate by step, it is that one's map.
        patch_vox: size of a window.
    """
    if not isinstance(model, Segmenter):
        return ""
    device = next(model.parameters()).device
    with undisturbed(model, device), torch.inference_mode():
        maps = model(torch.zeros((1, 1, *patch_vox), device=device)).features
    for name in (f"step{learned_at}.final", "final"):
        if name in maps and tuple(maps[name].shape[2:]) == tuple(patch_vox):
            return name
    return ""


def feature_slabs(
    server: VolumePredictor, volume: Volume, name: str
) -> Iterator[tuple[int, int, Tensor]]:
    """The feature map of a whole volume by the windows of the examination, in slabs along axis 0.

    Args:
        server: the model and its windows.
        volume: the case.
        name: of the map.

    Yields:
        (start, stop, (C, stop - start, H, W) float32 on the CPU).
    """
    reader = VolumePredictor(
        _MapAsLogits(server.model, name),
        server.decode,
        server.structures,
        patch_vox=server.patch_vox,
        overlap=server.overlap,
        windows=server.windows,
        device=server.device,
    )
    yield from reader.logits(volume)


class _MapAsLogits(nn.Module):
    """A model that answers with one of its feature maps in place of logits."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, image: Tensor) -> Output:
        return Output(logits=self.model(image).features[self.name])


def draw(
    server: VolumePredictor, volume: Volume, name: str, structures: Sequence[str], seed: int
) -> Sample:
    """Voxels of a case: up to `VOXELS` of every pattern of structures, with what they stand for.

    Args:
        server: the model.
        volume: a training case of the structures' step, as that step shows it.
        name: of the feature map.
        structures: to be told apart.
        seed: equal seeds draw equal voxels of a case.
    """
    labels = volume.labels(structures, (slice(None),) * 3)
    known = (labels != 255).reshape(len(labels), -1).any(axis=1)
    pattern = np.zeros(volume.bits.shape, dtype=np.int64)
    for k, label in enumerate(labels):
        pattern |= (label == 1).astype(np.int64) << k
    rng = np.random.default_rng(derive_seed(seed, volume.source, volume.case))
    index, weights = [], []
    for value in np.unique(pattern):
        at = np.flatnonzero(pattern.ravel() == value)
        taken = at if at.size <= VOXELS else rng.choice(at, VOXELS, replace=False)
        index.append(taken)
        weights.append(np.full(taken.size, at.size / taken.size))
    order = np.argsort(np.concatenate(index))
    flat, weight = np.concatenate(index)[order], np.concatenate(weights)[order]
    plane = int(np.prod(volume.bits.shape[1:]))
    features = [
        slab.flatten(1)[:, flat[(flat >= start * plane) & (flat < stop * plane)] - start * plane].T
        for start, stop, slab in feature_slabs(server, volume, name)
    ]
    bits = (pattern.ravel()[flat][:, None] >> np.arange(len(structures))) & 1
    return Sample(
        features=torch.cat(features),
        labels=torch.from_numpy(bits.astype(bool)),
        weights=torch.from_numpy(weight),
        known=torch.from_numpy(known).expand(len(flat), -1),
    )


def fit(samples: Iterable[Sample], structures: Sequence[str]) -> Probe:
    """A logistic regression per structure; all-background where no sample holds one.

    Args:
        samples: voxels of the training cases.
        structures: the K names of their labels.
    """
    parts = list(samples)
    features = torch.cat([s.features for s in parts]).double()
    weights = torch.cat([s.weights for s in parts])
    labels, known = (torch.cat([getattr(s, n) for s in parts]) for n in ("labels", "known"))
    share = weights / weights.sum()
    center = share @ features
    spread = (share @ (features - center) ** 2).sqrt().clamp_min(1e-6)
    standard = (features - center) / spread
    rows, biases = [], []
    for k in range(len(structures)):
        own, inside = known[:, k], labels[:, k]
        if not bool(inside.any()):
            rows.append(torch.zeros(features.shape[1], dtype=torch.float64))
            biases.append(torch.tensor(-1.0, dtype=torch.float64))
            continue
        row = _logistic(standard[own], inside[own], weights[own])
        bias = -_best_threshold(standard[own] @ row, inside[own], weights[own])
        rows.append(row / spread)
        biases.append(bias - (row / spread) @ center)
    return Probe(
        structures=tuple(structures),
        weight=torch.stack(rows).float(),
        bias=torch.stack(biases).float(),
    )


def _logistic(x: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """Coefficients (C,) of a regression in which both classes weigh the same."""
    target = inside.double()
    balanced = torch.where(
        inside, weights / weights[inside].sum(), weights / weights[~inside].sum().clamp_min(1e-12)
    )
    row = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([row, bias], max_iter=UPDATES, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = functional.binary_cross_entropy_with_logits(
            x @ row + bias, target, balanced, reduction="sum"
        )
        value = entropy + DECAY * (row**2).sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call,unused-ignore]  # torch
    return row.detach()


def _best_threshold(scores: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """The score above which a voxel is foreground, so that Dice of these voxels is highest.

    Voxels of equal score are foreground together, or not at all.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    both = torch.cumsum(weights[order] * inside[order], dim=0)
    predicted = torch.cumsum(weights[order], dim=0)
    dice = 2 * both / (predicted + both[-1])
    ranked = scores[order]
    dice[:-1][ranked[:-1] == ranked[1:]] = -1.0  # no threshold lies between these two
    best = int(torch.argmax(dice))
    next_one = ranked[min(best + 1, len(ranked) - 1)]
    return (ranked[best] + next_one) / 2 if best + 1 < len(ranked) else ranked[best] - 1


def probed_bits(probe: Probe, server: VolumePredictor, volume: Volume, name: str) -> Bits:
    """What a probe says to a whole case: (D, H, W), bit k = `probe.structures[k]`.

    Args:
        probe: fitted on the same map.
        server: the model.
        volume: the case.
        name: of the feature map.
    """
    dtype = bits_dtype(len(probe.structures))
    bits: NDArray[np.unsignedinteger] = np.zeros(volume.bits.shape, dtype=dtype)
    for start, stop, features in feature_slabs(server, volume, name):
        for k, mask in enumerate(probe(features)):
            bits[start:stop] |= mask.numpy().astype(dtype) << dtype.type(k)
    return bits
