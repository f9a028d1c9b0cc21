"""Softmax methods: one channel per voxel from partial labels, the authors' numbers, whole courses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from locations import GOLDEN_FILES
from networks import map_shapes
from rounding import assert_same_to_rounding, assert_untouched, weights_of
from torch import Tensor

from clbench.errors import UnknownName
from clbench.nets.backbones import Backbone, small_unet, swin_unetr
from clbench.nets.output import Output
from clbench.nets.resenc_unet import resenc_unet_6
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec import registry
from clbench.store import checkpoint, run_folder
from clbench.strategies.ilt import Ilt
from clbench.strategies.paper_baselines.ilt_ct import IltCt
from clbench.strategies.paper_baselines.lwf_ct import LwfCt
from clbench.strategies.paper_baselines.plop_ct import PlopCt
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Batch, Kit, Lesson, Session, Strategy
from clbench.strategy.partial_labels import allowed_channels, decode_channels, marginal_ce, mean_ce

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "distillation.json").read_text())
METHODS = ("softmax_finetune", "lwf", "ilt", "plop", "mib", "lwf_ct", "ilt_ct", "plop_ct")
LIVER = ("liver", "spleen", "liver_tumor")


def voxels(
    label: list[list[int]],
    pseudo: list[list[int]] | None = None,
    *,
    structures: tuple[str, ...] = LIVER,
    new: tuple[bool, ...] = (False, False, True),
) -> Batch:
    """A batch of one case; each inner list is one voxel's labels."""

    def shaped(rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.uint8).t()[None, :, :, None, None]

    return Batch(
        image=torch.zeros(1, 1, len(label), 1, 1),
        label=shaped(label),
        pseudo=None if pseudo is None else shaped(pseudo),
        structures=structures,
        new=new,
        cases=("1",),
    )


def sets(allowed: Tensor) -> list[set[int]]:
    """The allowed channels of each voxel of the first case."""
    return [{int(c) for c in column.nonzero()} for column in allowed[0, :, :, 0, 0].t()]


@pytest.mark.parametrize(
    ("label", "pseudo", "channels"),
    [
        ([1, 0, 0], None, {1}),  # liver
        ([1, 0, 1], None, {3}),  # the tumor wins over the liver around it
        ([0, 0, 0], None, {0}),  # all known to be absent
        ([0, 255, 0], None, {0, 2}),  # may be background or spleen
        ([0, 255, 255], None, {0, 2}),  # no liver, so no tumor in it
        ([255, 255, 255], None, {0, 1, 2, 3}),  # padding: anything
        ([1, 255, 255], None, {1, 3}),  # liver, perhaps its tumor
        ([0, 255, 0], [255, 254, 255], {2}),  # the old model saw the spleen
        ([1, 255, 0], [255, 254, 255], {1}),  # annotation beats prediction
        ([255, 255, 1], [254, 254, 255], {3}),
        ([255, 255, 0], [0, 0, 255], {0}),  # the old model saw nothing
    ],
)
def test_which_channels_labels_allow(
    label: list[int], pseudo: list[int] | None, channels: set[int]
) -> None:
    batch = voxels([label], None if pseudo is None else [pseudo])
    assert sets(allowed_channels(batch)) == [channels]


def test_background_closes_old_structures_but_not_padding() -> None:
    batch = voxels([[255, 255, 0], [255, 255, 255]])
    assert sets(allowed_channels(batch, unlabelled="background")) == [{0}, {0, 1, 2, 3}]


def test_cross_entropy_of_a_set_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, 4.0]).log().view(1, 3, 1)
    for which, p in (([1, 0, 0], 1 / 7), ([1, 1, 0], 3 / 7), ([1, 1, 1], 1.0)):
        allowed = torch.tensor(which).bool().view(1, 3, 1)
        assert marginal_ce(logits, allowed).item() == pytest.approx(-math.log(p), abs=1e-6)


def test_voxels_that_say_nothing_have_no_part_in_the_mean() -> None:
    logits = torch.randn(1, 3, 4).requires_grad_()
    allowed = torch.ones(1, 3, 4, dtype=torch.bool)
    allowed[0, 1:, 0] = False
    loss = mean_ce(logits, allowed)
    assert loss.item() == pytest.approx(marginal_ce(logits, allowed)[0, 0].item())
    loss.backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[0, :, 1:]) == 0
    assert mean_ce(logits, torch.ones_like(allowed)).item() == 0


def test_decoding_is_the_argmax_read_through_the_taxonomy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 5, 5)
    logits[0, :, 0, 0, 0] = 0.0  # a draw: background comes first
    winner = logits.argmax(1)
    found = decode_channels(logits, LIVER, exclusive=False)
    assert ((found >= 0) & (found <= 1)).all()
    liver, spleen, tumor = (found > 0.5).unbind(1)
    assert torch.equal(liver, (winner == 1) | (winner == 3))
    assert torch.equal(spleen, winner == 2)
    assert torch.equal(tumor, winner == 3)
    alone = decode_channels(logits, LIVER, exclusive=True) > 0.5
    assert torch.equal(alone[:, 0], winner == 1)


def test_lwf_of_the_authors_with_sigmoid_heads() -> None:
    g = GOLDEN["ct_lwf_sigmoid"]
    batch = authors_batch(g["y"])
    made = LwfCt(head="sigmoid", legacy_slice_dice=True)
    terms = made.losses(batch, Output(logits=torch.tensor(g["logits"])), None, {})
    assert sum(t.item() for t in terms.values()) == pytest.approx(g["value"], abs=1e-5)


def test_ilt_of_the_authors_with_sigmoid_heads() -> None:
    g = GOLDEN["ct_ilt_sigmoid"]
    new, old = (
        Output(logits=torch.tensor(g[a]), features={"bottleneck": torch.tensor(g[b])})
        for a, b in (("logits", "feat_new"), ("old_logits", "feat_old"))
    )
    terms = IltCt(head="sigmoid", legacy_slice_dice=True).losses(
        authors_batch(g["y"]), new, old, {}
    )
    want = {"features": "feature_mse", "distill": "output_kd_bce", "dice_new": "dice_new",
            "bce_new": "bce_new"}  # fmt: skip
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {k: g[name] for k, name in want.items()}, abs=1e-5
    )


def authors_batch(y: list[Any]) -> Batch:
    label = torch.tensor(y).to(torch.uint8)
    return Batch(
        image=torch.zeros(len(label), 1, *label.shape[2:]),
        label=label,
        pseudo=None,
        structures=("liver_tumor", "spleen", "stomach"),
        new=(True, False, False),
        cases=("1", "2"),
    )


def test_the_shifted_dice_is_taught_by_the_next_template_id() -> None:
    order = ("pancreas", "liver_tumor", "stomach", "aorta")  # ids 11, 27, 7, 8: not by channel
    batch = voxels(
        [[0, 0, 1, 255], [0, 0, 0, 255], [0, 1, 0, 255]],
        pseudo=[[255, 255, 255, 0], [255, 255, 255, 254], [255, 255, 255, 0]],
        structures=order, new=(False, True, True, False),
    )  # fmt: skip
    logits = torch.zeros(1, 5, 3, 1, 1)
    logits[0, 2], logits[0, 3] = (
        torch.tensor(v).view(3, 1, 1) for v in ([-9.0, -9, 9], [9.0, -9, -9])
    )
    out = Output(logits=logits, features={"bottleneck": torch.zeros(1, 1, 1, 1, 1)})
    right = IltCt().losses(batch, out, out, {})["dice_new"]
    assert right.item() == pytest.approx(1 / 3, abs=1e-3)  # 1 - 2 · 1 / (1 + 1 + 1), both found
    shifted = IltCt(legacy_shifted_dice=True).losses(batch, out, out, {})["dice_new"]
    # the stomach is taught the aorta's voxel, which it missed; of pancreas_tumor (28) nothing is
    # known, so the liver tumor is taught 255 in all three voxels
    p = torch.tensor([-9.0, -9, 9]).sigmoid().sum().item()
    want = (1 - 2 * 255 * p / (p + 3 * 255 + 1) + 1) / 2
    assert shifted.item() == pytest.approx(want, abs=1e-3)


def maps_compared(made: PlopCt, backbone: Backbone, names: Iterable[str]) -> list[str]:
    """Those of the named maps whose distance is a part of the loss."""
    features = {name: torch.zeros(1, 1, 1, 1, 1) for name in names}
    batch = voxels([[0, 0, 1]], pseudo=[[0, 0, 255]])

    class Answers(torch.nn.Module):
        """Says the same to every crop, with this backbone below."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.backbone, self.channels = backbone, channels

        def forward(self, image: Tensor) -> Output:
            moved = {n: m.clone().requires_grad_() for n, m in features.items()}
            for m in moved.values():
                m.data += self.channels  # the two models differ in every map
            said.append(moved)
            return Output(logits=torch.zeros(1, self.channels, 1, 1, 1), features=moved)

    said: list[dict[str, Tensor]] = []
    context: Any = SimpleNamespace(
        strategy=made, model=Answers(4), teacher=Answers(3), lesson=lesson(2), memory={}
    )
    session = made.session(context) or Session(context)
    session.terms(batch)["pod"].backward()
    return [name for name, of in said[0].items() if of.grad is not None]


def test_pod_takes_the_nine_maps_of_the_authors() -> None:
    swin = swin_unetr(12)
    names = maps_compared(PlopCt(), swin, map_shapes(swin, (64, 64, 64)))
    assert names == ["enc0", "enc1", "enc2", "enc3", "bottleneck", "dec3", "dec2", "dec1", "dec0"]


def test_pod_takes_every_stage_of_a_network_without_raw_hidden_states() -> None:
    network = resenc_unet_6(8)
    names = list(map_shapes(network, (64, 64, 64)))
    assert names[4:7] == ["enc4", "bottleneck", "dec3"]
    assert maps_compared(PlopCt(), network, names) == names[:-1]  # `final` alone is left out


# ------------------------------------------------------------------------- every method at once


def lesson(number: int) -> Lesson:
    parts = (("liver", "spleen"), ("liver_tumor",))
    return Lesson(
        number=number,
        learns=parts[number - 1],
        structures=tuple(s for p in parts[:number] for s in p),
        source="x",
    )


def kit() -> Kit:
    return Kit(
        backbone=lambda: small_unet(8), encode=lambda names: torch.zeros(len(names), 512), seed=0
    )


def grown(made: Strategy) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model after step 1, and the same grown for step 2."""
    old, new = (made.build(kit(), lesson(1)) for _ in range(2))
    made.grow(new, kit(), lesson(2))
    return old.eval().requires_grad_(False), new


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0, 1, 255])
def test_losses_are_finite_and_penalties_above_nothing(name: str, value: int) -> None:
    made = registry.load("strategy", name)()
    old, new = grown(made)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(0.05 * torch.randn_like(p))
    image = torch.rand(1, 1, 16, 16, 16)
    batch = Batch(
        image=image,
        label=torch.full((1, 3, 16, 16, 16), value, dtype=torch.uint8),
        pseudo=torch.full((1, 3, 16, 16, 16), 254, dtype=torch.uint8) if "ct" in name else None,
        structures=LIVER,
        new=(False, False, True),
        cases=("1",),
    )
    taken = old(image) if made.takes_teacher(lesson(2)) else None
    terms = made.losses(batch, new(image), taken, {"plop_thresholds": torch.full((3,), 0.5)})
    assert all(torch.isfinite(t) for t in terms.values())
    for penalty in made.declaration.penalties:
        assert terms[penalty].item() > 0
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None for p in new.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_growth_keeps_what_it_says(name: str) -> None:
    made = registry.load("strategy", name)()
    old, new = grown(made)
    image = torch.rand(1, 1, 16, 16, 16)
    before, after = old(image).logits, new.eval()(image).logits
    weights = weights_of(old)
    if not made.declaration.keeps_old_logits:
        weights = {n: w for n, w in weights.items() if not n.endswith(".background")}
    assert_untouched(new, weights)
    assert_same_to_rounding(after[:, 1:3], before[:, 1:])
    if made.declaration.keeps_old_logits:
        assert_same_to_rounding(after[:, :3], before)
    else:  # background is shared with the new channels: old probabilities stay
        torch.testing.assert_close(
            after.softmax(1)[:, 1:3], before.softmax(1)[:, 1:], atol=1e-6, rtol=0
        )


def test_a_fresh_classifier_forgets_the_old_channels() -> None:
    made = IltCt(legacy_fresh_classifier=True)
    old, new = grown(made)
    image = torch.rand(1, 1, 16, 16, 16)
    assert not torch.allclose(new.eval()(image).logits[:, :3], old(image).logits)
    assert made.groups(new, lesson(2), {})[-1].lr == 100


@pytest.mark.parametrize(
    "made",
    [Ilt(), Ilt(freeze_encoder=True), IltCt(), IltCt(head="sigmoid")],
    ids=lambda m: f"{type(m).__name__} {m.declaration.penalties}",
)
def test_options_change_what_is_declared(made: Ilt | IltCt) -> None:
    old, new = grown(made)
    image = torch.rand(1, 1, 16, 16, 16)
    batch = Batch(
        image=image, label=torch.ones(1, 3, 16, 16, 16, dtype=torch.uint8), pseudo=None,
        structures=LIVER, new=(False, False, True), cases=("1",),
    )  # fmt: skip
    terms = set(made.losses(batch, new(image), old(image), {}))
    assert {t for t in terms if t in ("features", "distill")} == set(made.declaration.penalties)
    assert made.declaration.keeps_old_logits
    assert not IltCt(legacy_fresh_classifier=True).declaration.keeps_old_logits


@pytest.mark.parametrize("kind", [Universal, LwfCt])
def test_each_rule_for_pseudo_labels_can_be_left_out(kind: Any) -> None:
    """Two pieces of a liver: the largest stays, unless that rule is left out, or all are."""
    mask = torch.zeros(1, 8, 8, 8)
    mask[0, :2, :2, :2], mask[0, 6, 6, 6] = 1.0, 1.0
    old: Any = SimpleNamespace(structures=("liver",), probabilities=lambda v: [(0, 8, mask)])
    for made, pieces in (
        (kind(), 8), (kind(rules=("largest_lesions",)), 9), (kind(postprocess=False), 9),
    ):  # fmt: skip
        found = made.prepare_case(lesson(2), cast(Any, None), old)["pseudo"]
        assert (found == 254).sum() == pieces
    with pytest.raises(UnknownName, match="largest_component"):
        kind(rules=("largest_componet",))


def test_all_start_alike() -> None:
    for name in METHODS:
        assert registry.load("strategy", name)().first_step() == SoftmaxFinetune()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("softmax")
    base = RunSettings(
        bench="tumor_ext", strategy="", profile="smoke", out=out, cache=cache_root,
        overrides=("train.epochs=1", "backbone.size=8", "phantom.train=2"),
    )  # fmt: skip
    return {name: run_course(replace(base, strategy=name)) for name in ("mib", "lwf_ct", "plop")}


def test_courses_end_scored_and_share_their_first_step(runs: dict[str, Path]) -> None:
    first = {run_folder.read_record(folder)["shared_step1"] for folder in runs.values()}
    assert len(first) == 1
    for folder in runs.values():
        rows = run_folder.read_scores(folder / "scores.csv")
        strict = [r for r in rows if (r.scoring, r.metric) == ("strict", "dice")]
        assert {r.structure for r in strict if r.step == 2} == set(
            registry.benchmark("tumor_ext").structures(2)
        )


def test_courses_log_their_penalties(runs: dict[str, Path]) -> None:
    for name, folder in runs.items():
        made = registry.load("strategy", name)()
        events = [e for e in run_folder.read_events(folder / "events.jsonl") if e.get("step") == 2]
        updates = [e for e in events if e["event"] == "update"]
        assert updates
        for penalty in made.declaration.penalties:
            assert updates[-1]["terms"][penalty] > 0


def test_plop_remembers_a_threshold_per_old_channel(runs: dict[str, Path]) -> None:
    memory = checkpoint.load(runs["plop"] / "step2.pt")["memory"]
    found = memory["plop_thresholds"]
    assert found.shape == (14,)
    assert bool(((found >= 0.001) & (found <= 1)).all())
