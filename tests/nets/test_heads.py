"""Heads: the authors' numbers, the plain form, exact growth, and bounded work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from locations import GOLDEN_FILES
from networks import dynamic_head_plain
from rounding import assert_same_to_rounding, assert_untouched, weights_of
from torch import nn

from clbench.errors import TrainingError
from clbench.nets import heads
from clbench.nets.heads import ConvHead, Segmenter, UniversalHead, dynamic_head

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "heads.json").read_text())


def test_the_dynamic_head_equals_the_authors_numbers() -> None:
    g = GOLDEN["dynamic_head"]
    features = torch.tensor(g["features_8ch"], dtype=torch.float64)[None]
    params = torch.tensor(g["params"], dtype=torch.float64)[None]
    want = torch.tensor(g["logits"], dtype=torch.float64).reshape(1, 2, *features.shape[2:])
    for form in (dynamic_head, dynamic_head_plain):
        torch.testing.assert_close(form(features, params), want, atol=1e-6, rtol=1e-6)


def test_the_shared_layers_equal_the_authors_numbers() -> None:
    g = GOLDEN["precls_and_gap"]

    def gen(seed: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        drawn = np.random.default_rng(seed).standard_normal(shape) * scale
        return torch.from_numpy(np.round(drawn, 6)).float()

    head = UniversalHead(48, 768)
    with torch.no_grad():
        for layer, w, b, scale in ((head.pre[2], 80, 81, 0.1), (head.gap[3], 82, 83, 0.05)):
            layer.weight.copy_(
                gen(w, tuple(layer.weight.shape[:2]), scale).reshape(layer.weight.shape)
            )
            layer.bias.copy_(gen(b, tuple(layer.bias.shape), scale))
        got = head.pre(gen(84, (1, 48, 2, 2, 2), 1.0))
        image = head.gap(gen(85, (1, 768, 2, 2, 2), 1.0)).flatten()
    want = torch.tensor(g["precls_out"])
    torch.testing.assert_close(got.reshape(want.shape), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(image[:8], torch.tensor(g["gap_first8"]), atol=1e-5, rtol=0)
    assert image.sum().item() == pytest.approx(g["gap_sum"], abs=1e-3)


def test_parameter_counts_are_the_papers() -> None:
    head = UniversalHead(48, 768)
    shared = sum(p.numel() for p in head.parameters())
    norms = 2 * 48 + 2 * 768
    assert shared == (768 * 256 + 256) + (48 * 8 + 8) + norms == 198_400 + 488
    head.add("liver", torch.zeros(512))
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert trained - shared == 472_217


@pytest.mark.parametrize(
    ("channels", "groups"), [(48, 16), (16, 16), (12, 12), (24, 12), (17, 1), (8, 8)]
)
def test_any_width_of_a_backbone_can_be_normalized(channels: int, groups: int) -> None:
    head = UniversalHead(channels, 2 * channels)  # Swin UNETR 24 has 24, Swin UNETR 48 has 48
    (norm,) = (m for m in head.pre if isinstance(m, nn.GroupNorm))
    assert norm.num_groups == groups


@pytest.mark.parametrize("count", [1, 5, 33])
@pytest.mark.parametrize("block", [256 * 8, 1 << 18])
def test_it_equals_the_plain_form_with_gradients(
    count: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "BLOCK_VALUES", block)  # many blocks, or one
    torch.manual_seed(count)
    features = torch.randn(2, 8, 9, 10, 11)
    params = torch.randn(2, count, 153)
    weight = torch.randn(2, count, 9, 10, 11)
    got = []
    for form in (dynamic_head, dynamic_head_plain):
        f, p = features.clone().requires_grad_(), params.clone().requires_grad_()
        out = form(f, p)
        (out * weight).sum().backward()
        got.append((out, f.grad, p.grad))
    for a, b in zip(*got, strict=True):
        assert a is not None
        assert b is not None
        scale = b.detach().abs().max()
        torch.testing.assert_close(a / scale, b / scale, atol=1e-5, rtol=0)


def test_threads_share_the_blocks_and_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BLOCK_VALUES", 256 * 8)
    before = torch.get_num_threads()
    torch.manual_seed(0)
    weight = torch.randn(2, 5, 9, 10, 11)  # 990 voxels: four blocks, the last one shorter
    features, params = torch.randn(2, 8, 9, 10, 11), torch.randn(2, 5, 153)
    used, got = set[str](), []
    compiled = heads._compiled

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def share(*arguments: Any) -> Any:
            used.add(threading.current_thread().name)
            assert torch.get_num_threads() == 1, "products inside a block are not divided"
            return compiled(work)(*arguments)

        return share

    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            monkeypatch.setattr(heads, "_compiled", compiled if threads == 1 else noted)
            f, p = features.clone().requires_grad_(), params.clone().requires_grad_()
            out = dynamic_head(f, p)
            (out * weight).sum().backward()
            assert torch.get_num_threads() == threads, "the caller's own setting stays"
            got.append((out, f.grad, p.grad))
            with torch.inference_mode():
                assert torch.equal(dynamic_head(features, params), out)
    finally:
        torch.set_num_threads(before)
    assert len(used) > 1
    assert torch.equal(got[0][0], got[1][0])
    assert torch.equal(got[0][1], got[1][1])
    torch.testing.assert_close(got[0][2], got[1][2])  # a sum over voxels, in another order


@pytest.mark.parametrize("voxels", [1, 7, 16, 33, 50])
def test_compiled_it_runs_without_python_and_finds_the_same_bits(voxels: int) -> None:
    torch.manual_seed(voxels)
    head = heads.split_parameters(torch.randn(3, 153))
    features, given = torch.randn(8, voxels), torch.randn(3, voxels)
    cases: list[tuple[Callable[..., Any], list[torch.Tensor]]] = [
        (heads._logits, [given]),
        (heads._gradient, [given, torch.empty(8, voxels)]),
    ]
    for work, maps in cases:
        compiled = heads._compiled(work)
        assert isinstance(compiled, torch.jit.ScriptFunction)
        found = []
        for one in (work, compiled, compiled):  # the second time it is optimized
            filled = [t.clone() for t in maps]
            found.append((*(one(head, features, *filled, 16) or ()), *filled))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


def test_where_torch_cannot_compile_the_head_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, params = torch.randn(1, 8, 5, 6, 7), torch.randn(1, 3, 153)
    compiled = dynamic_head(features, params)
    monkeypatch.delattr(torch.jit, "script")
    heads._compiled.cache_clear()
    try:
        assert torch.equal(dynamic_head(features, params), compiled)
        assert heads._compiled(heads._logits) is heads._logits
    finally:
        heads._compiled.cache_clear()


def test_gradients_are_right_to_double_precision() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 8, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    params = torch.randn(2, 3, 153, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dynamic_head, (features, params))


def test_nothing_of_size_classes_times_voxels_times_width_is_kept() -> None:
    held: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.numel())
        return tensor

    features = torch.randn(1, 8, 16, 16, 16, requires_grad=True)
    params = torch.randn(1, 32, 153, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dynamic_head(features, params).sum().backward()
    assert sum(held) <= features.numel() + params.numel()


def maps(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"bottleneck": torch.randn(2, 32, 2, 2, 2), "final": torch.randn(2, 16, 4, 4, 4)}


@pytest.mark.parametrize("kind", ["universal", "sigmoid", "softmax"])
def test_growth_changes_no_old_logit(kind: str) -> None:
    torch.manual_seed(0)
    head: Any = (
        UniversalHead(16, 32, text_dim=4, hidden=8)
        if kind == "universal"
        else ConvHead(16, background=kind == "softmax")
    )
    for name in ("a", "b"):
        head.add(name, torch.randn(4))
    first, weights = head(maps(), ["a", "b"]), weights_of(head)
    for name in ("c", "d", "e"):
        head.add(name, torch.randn(4))
    grown = head(maps(), ["a", "b", "c", "d", "e"])
    assert grown.shape[1] == first.shape[1] + 3
    assert_untouched(head, weights)
    assert_same_to_rounding(grown[:, : first.shape[1]], first)
    assert_same_to_rounding(head(maps(), ["e", "a"])[:, -1], first[:, -2])


def test_only_the_structures_in_use_are_computed() -> None:
    head = UniversalHead(16, 32, text_dim=4, hidden=8)
    for name in ("a", "b"):
        head.add(name, torch.randn(4))
    head(maps(), ["b"]).sum().backward()
    assert all(p.grad is None for p in head.controllers["a"].parameters())
    assert all(p.grad is not None for p in head.controllers["b"].parameters())
    assert not head.vectors["b"].requires_grad


def test_text_vectors_are_saved_and_never_trained() -> None:
    head = UniversalHead(16, 32, text_dim=4, hidden=8)
    vector = torch.randn(4)
    head.add("a", vector)
    head.requires_grad_(True)  # as the loop does with everything a strategy trains
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    head(maps(), ["a"]).sum().backward()
    optimizer.step()
    assert torch.equal(head.vectors["a"], vector)
    other = UniversalHead(16, 32, text_dim=4, hidden=8)
    other.add("a", torch.zeros(4))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.vectors["a"], vector)


@pytest.mark.parametrize("head", [UniversalHead(16, 32, text_dim=4), ConvHead(16, background=True)])
def test_a_name_is_added_once(head: Any) -> None:
    head.add("liver", torch.zeros(4))
    with pytest.raises(TrainingError, match="liver"):
        head.add("liver", torch.zeros(4))


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(TrainingError, match="cannot take") as err:
        UniversalHead(16, 32).add("liver", torch.zeros(384))
    assert "512" in str(err.value)


def test_the_softmax_head_is_a_1x1x1_convolution() -> None:
    head = ConvHead(16, background=True)
    head.add("a")
    head.add("b")
    conv = nn.Conv3d(16, 3, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.stack([head.weight[n] for n in ("background", "a", "b")]))
        assert conv.bias is not None
        conv.bias.copy_(torch.cat([head.bias[n] for n in ("background", "a", "b")]))
    torch.testing.assert_close(head(maps(), ["a", "b"]), conv(maps()["final"]))


def test_the_segmenter_orders_channels_by_learning() -> None:
    class Fixed(nn.Module):
        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return maps()

    model = Segmenter(Fixed(), ConvHead(16, background=False))
    model.add(["b"])
    model.add(["a", "c"])
    out = model(torch.zeros(2, 1, 4, 4, 4))
    assert model.structures == ("b", "a", "c")
    assert out.logits.shape == (2, 3, 4, 4, 4)
    assert list(out.features) == ["bottleneck", "final"]
