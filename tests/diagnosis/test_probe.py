"""The linear probe: what it reads from a map, which voxels it is fitted on, and what has no map."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clbench.diagnosis import probe as probe_module
from clbench.diagnosis.probe import Sample, draw, feature_slabs, fit, last_map, probed_bits
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.backbones import small_unet
from clbench.nets.growing_decoders import GrowingDecoders
from clbench.nets.heads import ConvHead, Segmenter
from clbench.nets.output import Output
from clbench.nets.step_networks import add_network

NAMES = ("spleen", "liver")
PATCH = (8, 8, 8)


class Shades(nn.Module):
    """Maps of an image: powers of its intensity; with `blind`, noise instead."""

    def __init__(self, *, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Output:
        x = image - 0.5
        if self.blind:
            x = torch.sin(1e4 * torch.arange(image.numel()).view(image.shape).float())
        final = torch.cat([x, x**2, x**3, torch.ones_like(x)], dim=1)
        return Output(logits=final[:, :2], features={"final": final})


def volume() -> Any:
    """A case of two structures of their own shade, and another one that is not annotated."""
    rng = np.random.default_rng(1)
    bits = np.zeros((20, 9, 8), dtype=np.uint8)
    bits[2:8, 2:7, 1:7], bits[11:17, 1:8, 2:6], bits[18, :, :] = 1, 2, 4
    shade = np.select([bits == 1, bits == 2], [0.3, 0.7], 0.5)
    image = (shade + rng.normal(0, 0.01, bits.shape)).astype(np.float32)

    def labels(structures: Any, index: Any) -> Any:
        known = {"spleen": bits & 1, "liver": (bits >> 1) & 1}
        unknown = np.full(bits.shape, 255, dtype=np.uint8)
        return np.stack([known.get(s, unknown) for s in structures])

    return SimpleNamespace(
        source="btcv", case="7", bits=bits, image=image, labels=labels,
        windowed=lambda index: image[index],
    )  # fmt: skip


def server(model: nn.Module) -> VolumePredictor:
    return VolumePredictor(model, lambda logits, names: logits, NAMES, patch_vox=PATCH)


def dice(bits: Any, truth: Any, k: int) -> float:
    p, t = (bits >> k) & 1, (truth >> k) & 1
    return float(2 * (p & t).sum() / (p.sum() + t.sum()))


def test_a_probe_finds_what_a_map_holds_and_nothing_else() -> None:
    case = volume()
    for blind, low, high in ((False, 0.9, 1.0), (True, 0.0, 0.5)):
        asked = server(Shades(blind=blind))
        found = fit([draw(asked, case, "final", NAMES, 0)], NAMES)
        bits = probed_bits(found, asked, case, "final")
        for k in range(2):
            assert low <= dice(bits, case.bits, k) <= high, (blind, k)


def test_drawn_voxels_stand_for_all_of_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(probe_module, "VOXELS", 20)
    case, asked = volume(), server(Shades())
    sample = draw(asked, case, "final", NAMES, 0)
    assert len(sample.weights) == 3 * 20
    for k in range(2):
        stood_for = float(sample.weights[sample.labels[:, k]].sum())
        assert round(stood_for) == int(((case.bits >> k) & 1).sum())
    assert round(float(sample.weights.sum())) == case.bits.size
    again, other = (draw(asked, case, "final", NAMES, seed) for seed in (0, 1))
    assert torch.equal(sample.features, again.features)
    assert not torch.equal(sample.features, other.features)


def test_features_belong_to_the_voxels_that_were_drawn() -> None:
    case, asked = volume(), server(Shades())
    sample = draw(asked, case, "final", NAMES, 0)
    spleen = sample.features[sample.labels[:, 0], 0]
    assert torch.allclose(spleen.mean(), torch.tensor(0.3 - 0.5), atol=0.01)


def test_a_map_comes_whole_and_in_order() -> None:
    case = volume()
    slabs = list(feature_slabs(server(Shades()), case, "final"))
    whole = torch.cat([s for *_, s in slabs], dim=1)
    assert [s[0] for s in slabs] == [0, *(s[1] for s in slabs[:-1])]
    expected = torch.from_numpy(case.image) - 0.5
    assert torch.allclose(whole[0], expected, atol=1e-5)
    assert torch.allclose(whole[1], expected**2, atol=1e-5)


def test_structures_without_annotation_are_not_learned_from() -> None:
    """A case that does not annotate the liver says nothing about it."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(200, 1, generator=generator) < 0.5
    features = inside.float() * 2 - 1
    told = Sample(
        features=features,
        labels=inside.expand(-1, 2),
        weights=torch.ones(200, dtype=torch.float64),
        known=torch.ones(200, 2, dtype=torch.bool),
    )
    silent = Sample(
        features=torch.full((500, 1), 1.0),
        labels=torch.zeros(500, 2, dtype=torch.bool),
        weights=torch.ones(500, dtype=torch.float64),
        known=torch.tensor([True, False]).expand(500, 2),
    )
    found = fit([told, silent], NAMES)
    # liver: as if the silent case were not there
    score = found.weight[1] * torch.tensor([-1.0, 1.0]) + found.bias[1]
    assert (score > 0).tolist() == [False, True]


def test_a_structure_that_no_case_holds_is_background() -> None:
    sample = draw(server(Shades()), volume(), "final", ("spleen", "stomach"), 0)
    found = fit([sample], ("spleen", "stomach"))
    assert not bool(found(torch.randn(4, 3, 3, 3))[1].any())


def test_which_map_a_head_reads() -> None:
    backbone = small_unet(8)
    one = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
    one.add(NAMES)
    patch = (16, 16, 16)
    assert last_map(one, 1, patch) == "final"
    assert one.training  # the mode is put back
    later = small_unet(8)
    second = Segmenter(later, ConvHead(later.final_channels, background=False))
    second.add(("stomach",))
    add_network(one, second)
    assert last_map(one, 1, patch) == "step1.final"
    assert last_map(one, 2, patch) == "step2.final"
    assert last_map(GrowingDecoders(small_unet(8), NAMES, None), 1, patch) == ""


def test_a_threshold_does_not_divide_voxels_of_equal_score() -> None:
    def dice(scores: Tensor, inside: Tensor, weights: Tensor, threshold: float) -> float:
        found = scores > threshold
        both = float(weights[found & inside].sum())
        return 2 * both / float(weights[found].sum() + weights[inside].sum())

    rng = np.random.default_rng(3)
    shown = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    cases = [(shown, torch.tensor([1, 1, 1, 0, 0]).bool(), torch.ones(5, dtype=torch.float64))]
    for _ in range(50):
        scores = torch.from_numpy(rng.integers(0, 4, 9).astype(float))
        inside = torch.from_numpy(rng.random(9) < 0.5)
        inside[0] = True
        cases.append((scores, inside, torch.from_numpy(rng.random(9) + 0.1)))
    for scores, inside, weights in cases:
        best = max(dice(scores, inside, weights, at) for at in (-1.0, 0.5, 1.5, 2.5))
        threshold = float(probe_module._best_threshold(scores, inside, weights))
        assert dice(scores, inside, weights, threshold) == pytest.approx(best)
