"""LoRA: the numbers of the authors' functions, what learns, and old logits equal to the bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.backbones import Backbone, segresnet, small_unet, swin_unetr, unet
from clbench.nets.low_rank import Expert, ExpertBackbone, LowRankWeight, adapted_layers
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.strategies.finetune import Finetune
from clbench.strategies.parameter_isolation.lora import Lora
from clbench.strategy.contract import Batch, Kit, Lesson
from clbench.training.loop import freeze

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
PARTS = (("liver", "spleen"), ("stomach",), ("aorta", "pancreas"))


def numbers(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def lesson(number: int) -> Lesson:
    return Lesson(
        number=number,
        learns=PARTS[number - 1],
        structures=tuple(s for part in PARTS[:number] for s in part),
        source="btcv",
    )


def kit() -> Kit:
    return Kit(
        backbone=lambda: small_unet(8),
        encode=lambda names: torch.stack([torch.full((512,), len(n) / 8) for n in names]),
        seed=0,
    )


def adapted(layer: Any, case: dict[str, Any], down: Tensor, up: Tensor) -> Any:
    """The layer with the golden weights, and its addition merged into it."""
    addition = LowRankWeight(layer, rank=case["r"], alpha=case["alpha"]).double()
    with torch.no_grad():
        addition.down.copy_(down)
        addition.up.copy_(up)
        layer.weight += addition()
    assert sum(p.numel() for p in addition.parameters()) == case["extra_parameters"]
    return layer


def test_a_linear_layer_is_the_authors() -> None:
    case = GOLDEN["lora_linear"]
    layer = nn.Linear(4, 3).double()
    layer.load_state_dict({"weight": numbers(case["weight"]), "bias": numbers(case["bias"])})
    adapted(layer, case, numbers(case["A"]), numbers(case["B"]))
    torch.testing.assert_close(layer.weight.data, numbers(case["merged_weight"]))
    torch.testing.assert_close(layer(numbers(case["x"])).data, numbers(case["y"]))


def test_a_convolution_equals_its_two_convolutions() -> None:
    case = GOLDEN["lora_conv3d"]
    weight = numbers(case["weight"])
    layer = nn.Conv3d(weight.shape[1], weight.shape[0], 3, padding=1).double()
    layer.load_state_dict({"weight": weight, "bias": numbers(case["bias"])})
    adapted(layer, case, numbers(case["A"]), numbers(case["B"]))
    assert layer.weight.sum().item() == pytest.approx(case["merged_weight_sum"])
    x = numbers(case["x"])
    x = x if x.ndim == 5 else x[None]
    torch.testing.assert_close(layer(x).data.flatten(), numbers(case["y"]).flatten())


def test_a_transposed_convolution_too() -> None:
    case = GOLDEN["lora_conv_transpose3d"]
    weight = numbers(case["weight_in_out"])
    layer = nn.ConvTranspose3d(weight.shape[0], weight.shape[1], 2, 2).double()
    layer.load_state_dict({"weight": weight, "bias": numbers(case["bias"])})
    adapted(layer, case, numbers(case["A"]), numbers(case["B_r_out"]))
    x = numbers(case["x"])
    x = x if x.ndim == 5 else x[None]
    torch.testing.assert_close(layer(x).data.flatten(), numbers(case["y"]).flatten())


def parameters(backbone: Backbone, target: Any, rank: int = 8) -> int:
    expert = Expert(backbone, rank=rank, alpha=16, target=target)
    return sum(p.numel() for p in expert.parameters())


def test_an_expert_of_swin_unetr_has_the_printed_parameters() -> None:
    case = GOLDEN["lora_parameters"]
    backbone = swin_unetr(48)
    counts = case["r8"]
    assert len(adapted_layers(backbone, "all")) == 68
    assert parameters(backbone, "all") == counts["all linear and conv (68)"] == 1_338_144
    assert parameters(backbone, "all", 1) == case["per_rank_all"]
    assert parameters(backbone, "linear") == counts["all linear incl. patch merging (36)"]
    assert parameters(backbone, "attention") == counts["attention qkv and proj (16 linear)"]
    convolutions = "all convs and transposed convs incl. patch embedding and 1x1x1 shortcuts (32)"
    assert parameters(backbone, "conv") == counts[convolutions]


@pytest.mark.parametrize(
    ("make", "count"), [(small_unet, 126_296), (unet, 364_504), (segresnet, 401_752)]
)
def test_an_expert_of_other_backbones_too(make: Any, count: int) -> None:
    with torch.device("meta"):
        assert parameters(make(), "all") == count


def test_an_expert_computes_what_merged_weights_compute() -> None:
    base, image = small_unet(8).eval(), torch.rand(1, 1, 16, 16, 16)
    backbone = ExpertBackbone(copy.deepcopy(base))
    backbone.add_expert(rank=2, alpha=4, target="all")
    expert: Any = backbone.experts[0]
    with torch.no_grad():
        before = base(image)["final"]
        assert torch.equal(backbone(image)["final"], before)  # B is 0: exactly the base
        for addition in expert.additions:
            nn.init.normal_(addition.up, std=0.1)
        for name, change in zip(expert.names, expert.generate(), strict=True):
            base.get_parameter(f"{name}.weight").add_(change)
        maps = backbone(image)
        assert torch.equal(maps["step1.final"], before)
        torch.testing.assert_close(maps["step2.final"], base(image)["final"], rtol=0, atol=1e-5)
        assert not torch.allclose(maps["step2.final"], before, atol=1e-2)


def learn(model: nn.Module, method: Lora, step: Lesson) -> None:
    """Two updates of what the step trains: B starts at 0, so A moves from the second on."""
    trained = [p for g in method.groups(model, step, {}) for p in g.parameters]
    start = [p.detach().clone() for p in trained]
    model.zero_grad()
    freeze(model, trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    image = torch.rand(1, 1, 16, 16, 16)
    label = (torch.rand(1, len(step.structures), 16, 16, 16) > 0.7).byte()
    batch = Batch(
        image=image,
        label=label,
        pseudo=None,
        structures=step.structures,
        new=step.new_flags,
        cases=("1",),
    )
    for _ in range(2):
        optimizer.zero_grad()
        terms = method.losses(batch, model(image), None, {})
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in trained}
    assert not any(torch.equal(p, old) for p, old in zip(trained, start, strict=True))


def test_old_logits_stay_equal_to_the_bit_through_three_steps() -> None:
    method, image = Lora(rank=2), torch.rand(1, 1, 16, 16, 16)
    model: Any = method.first_step().build(kit(), lesson(1))
    with torch.no_grad():
        before = model.eval()(image)
    for number in (2, 3):
        step = lesson(number)
        method.grow(model, kit(), step)
        with torch.no_grad():
            grown = model.eval()(image)
        first = "final" if number == 2 else "step1.final"
        assert torch.equal(grown.features["final"], before.features[first])
        learn(model, method, step)
        with torch.no_grad():
            after = model.eval()(image)
        assert torch.equal(after.logits[:, : len(step.old)], before.logits)
        assert not torch.equal(after.features["final"], grown.features["final"])
        before = after
    assert method.declaration.past == "weights"
    again: Any = method.build(kit(), lesson(1))
    for number in (2, 3):
        method.grow(again, kit(), lesson(number))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(image).logits, before.logits)


def test_the_step_trains_the_newest_expert_and_its_head_at_rates_of_their_own() -> None:
    method = Lora(rank=2, expert_lr=0.5, head_lr=3)
    model: Any = Finetune().build(kit(), lesson(1))
    for number in (2, 3):
        method.grow(model, kit(), lesson(number))
    expert, head = method.groups(model, lesson(3), {})
    assert [expert.lr, head.lr] == [0.5, 3]
    assert [*map(id, expert.parameters)] == [*map(id, model.backbone.experts[1].parameters())]
    assert [*map(id, head.parameters)] == [*map(id, model.head.steps[2].parameters())]


@pytest.mark.parametrize("name", ["rank", "alpha"])
def test_an_expert_that_adds_nothing_is_refused(name: str) -> None:
    options: Any = {name: 0}
    with pytest.raises(SettingError, match=rf"strategy\.{name}"):
        Lora(**options)


def test_a_backbone_without_such_layers_is_refused() -> None:
    method = Lora(target="attention")
    model = Finetune().build(kit(), lesson(1))
    with pytest.raises(SettingError, match=r"strategy\.target"):
        method.grow(model, kit(), lesson(2))
    with pytest.raises(SettingError, match="groups=2"):
        LowRankWeight(nn.Conv3d(4, 4, 3, groups=2), rank=2, alpha=4)


def test_exclusive_experts_share_no_voxel() -> None:
    logits = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1, 1)
    names = ("liver", "spleen")
    assert (Lora().decode(logits, names) > 0.5).all()
    assert (Lora(exclusive=True).decode(logits, names) > 0.5).flatten().tolist() == [False, True]


def test_a_network_without_such_layers_is_refused_before_step_1(
    tmp_path: Path, cache_root: Path
) -> None:
    settings = RunSettings(
        bench="tumor_ext", strategy="lora", profile="smoke", out=tmp_path, cache=cache_root,
        overrides=("strategy.target=linear", "phantom.train=2", "phantom.test=1"),
    )  # fmt: skip
    with pytest.raises(SettingError, match="no layer that an expert could adapt"):
        run_course(settings)
    assert not list(tmp_path.iterdir())


def test_a_trial_of_the_network_draws_no_random_number() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Lora().refuse_course([lesson(1), lesson(2)], kit())
    assert torch.equal(torch.get_rng_state(), before)
