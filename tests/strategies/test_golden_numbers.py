"""What strategies return, weights and options included, held to golden numbers or to hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor
from torch.nn import functional

from clbench.errors import SettingError
from clbench.nets.backbones import small_unet
from clbench.nets.growing_decoders import one_winner
from clbench.nets.output import Output
from clbench.strategies.decoder_growth.method import DecoderGrowth
from clbench.strategies.ilt import Ilt
from clbench.strategies.lwf import Lwf
from clbench.strategies.mbs import Mbs
from clbench.strategies.mib import Mib
from clbench.strategies.paper_baselines.ilt_ct import IltCt
from clbench.strategies.paper_baselines.lwf_ct import LwfCt
from clbench.strategies.paper_baselines.plop_ct import PlopCt
from clbench.strategies.parameter_isolation.frozen_softmax import FrozenSoftmax
from clbench.strategies.plop import THRESHOLDS, Plop
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategies.universal import Universal
from clbench.strategy.contract import Batch, Kit, Lesson, Memory, Strategy
from clbench.strategy.distillation import entropy_histogram, gated_ce, legacy_thresholds, pod
from clbench.strategy.partial_labels import allowed_channels, sigmoid_dice

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "distillation.json").read_text())
KD, POD, PLANE, ENTROPY, ILT = (
    GOLDEN[name]
    for name in (
        "kd_softmax", "ct_pod_3d", "plop_original_pod_2d", "plop_entropy_pseudo", "ct_ilt_sigmoid",
    )
)  # fmt: skip
FOUR = ("liver", "spleen", "stomach", "aorta")  # channels 1 to 4; the first two are old
TWO_OLD = (False, False, True, True)


def batch_of(labels: Tensor, *, old_known: bool = True, new: tuple[bool, ...] = TWO_OLD) -> Batch:
    """A batch in which each voxel shows the structure of its channel; 255: nothing is known."""
    seen = labels != 255
    one = functional.one_hot(labels.where(seen, 0).long(), 5).movedim(-1, 1)[:, 1:]
    label = one.to(torch.uint8).masked_fill(~seen.unsqueeze(1), 255)
    if not old_known:
        label[:, :2] = 255
    return Batch(
        image=torch.zeros(len(label), 1, *label.shape[2:]), label=label, pseudo=None,
        structures=FOUR, new=new, cases=("1", "2"),
    )  # fmt: skip


LABELS = torch.tensor(KD["labels"])[..., None]  # their planes as thin volumes
NEW = Output(
    logits=torch.tensor(KD["inputs"])[..., None],
    features={"bottleneck": torch.tensor(ILT["feat_new"])},
)
OLD = Output(
    logits=torch.tensor(KD["targets"])[..., None],
    features={"bottleneck": torch.tensor(ILT["feat_old"])},
)


def terms_of(made: Strategy, batch: Batch, memory: Memory | None = None) -> dict[str, float]:
    found = made.losses(batch, NEW, OLD, memory or {})
    return {name: value.item() for name, value in found.items()}


# --------------------------------------------------------------------------------- golden numbers


def test_lwf_returns_the_ports_number() -> None:
    terms = terms_of(Lwf(), batch_of(LABELS))
    assert terms["distill"] == pytest.approx(KD["plain_times_100"], rel=1e-5)
    assert terms["ce"] == pytest.approx(KD["plain_ce_ignore255"], abs=1e-5)
    textbook = Lwf(weight=3.0, temperature=2.0)  # a sum over its three channels, times T squared
    want = 4 * KD["lwf_paper_T2_numpy_not_from_repo"]
    assert terms_of(textbook, batch_of(LABELS))["distill"] == pytest.approx(want, rel=1e-5)
    sharp = terms_of(Lwf(alpha=0.5), batch_of(LABELS))["distill"]
    assert sharp == pytest.approx(100 * KD["plain_alpha_0_5"], rel=1e-5)


def test_ilt_returns_the_ports_numbers() -> None:
    terms = terms_of(Ilt(), batch_of(LABELS))
    assert terms["distill"] == pytest.approx(KD["plain_times_100"], rel=1e-5)
    assert terms["features"] == pytest.approx(100 * ILT["feature_mse"], rel=1e-5)
    some = terms_of(Ilt(where="old_and_background", feature_weight=7.0), batch_of(LABELS))
    # the port divides by all voxels, the strategy by those it keeps; unknown ones are kept
    kept = (LABELS < 3) | (LABELS == 255)
    per_voxel = -(OLD.logits.softmax(1) * NEW.logits[:, :3].log_softmax(1)).mean(1)
    assert (per_voxel * (LABELS < 3)).mean().item() == pytest.approx(KD["plain_mask_old"], abs=1e-5)
    assert some["distill"] == pytest.approx(100 * per_voxel[kept].mean().item(), rel=1e-5)
    assert some["features"] == pytest.approx(7 * ILT["feature_mse"], rel=1e-5)


def test_mib_returns_the_published_codes_numbers() -> None:
    terms = terms_of(Mib(), batch_of(LABELS, old_known=False))
    assert terms["distill"] == pytest.approx(KD["unbiased_times_10"], rel=1e-5)
    assert terms["ce"] == pytest.approx(KD["unbiased_ce_oldcl3"], abs=1e-5)
    sharp = terms_of(Mib(alpha=0.5), batch_of(LABELS, old_known=False))["distill"]
    assert sharp == pytest.approx(10 * KD["unbiased_alpha_0_5"], rel=1e-5)


def test_ilt_of_the_authors_weighs_the_bottleneck_by_1() -> None:
    assert terms_of(IltCt(), batch_of(LABELS))["features"] == pytest.approx(
        ILT["feature_mse"], rel=1e-5
    )


def test_plop_of_the_authors_returns_their_number() -> None:
    new, old = (
        {f"dec{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(POD[k])}
        for k in ("new_features", "old_features")
    )
    # four structures, one of them new: their count of classes has no background
    batch = batch_of(LABELS, new=(False, False, False, True))
    terms = PlopCt().losses(
        batch, replace(NEW, features={**new, "final": torch.ones(2, 1, 2, 2, 2)}),
        replace(OLD, features={**old, "final": torch.zeros(2, 1, 2, 2, 2)}), {},
    )  # fmt: skip
    assert terms["pod"].item() == pytest.approx(POD["value_float64_reimplementation"], rel=1e-5)


def test_plop_returns_the_published_codes_number() -> None:
    new, old = (
        {str(i): torch.tensor(v, dtype=torch.float64) for i, v in enumerate(PLANE[k])}
        for k in ("new_attentions", "old_attentions")
    )
    logits = [torch.tensor(PLANE[f"{k}_logits_small"]) for k in ("new", "old")]
    batch = batch_of(torch.full((len(logits[0]), *logits[0].shape[2:]), 3))
    memory: Memory = {THRESHOLDS: torch.full((3,), 0.5)}
    published = Plop(dice=False, pooled_axes=1, logit_factor=0.0005)
    terms = published.losses(  # planes, where Dice takes volumes
        batch, Output(logits=logits[0], features=new), Output(logits=logits[1], features=old),
        memory,
    )  # fmt: skip
    assert terms["pod"].item() == pytest.approx(PLANE["value"], rel=1e-5)


def test_pseudo_labels_and_truth_of_lits_merge_as_the_authors_merge_them() -> None:
    g = GOLDEN["pseudo_merge_lits"]
    ids = {"spleen": 1, "esophagus": 5, "liver": 6, "stomach": 7, "pancreas": 11, "liver_tumor": 27}
    truth, said = torch.tensor(g["lits_gt"]), torch.tensor(g["prediction_template_ids"])
    label, pseudo = torch.full((2, 2, len(ids), 4), 255, dtype=torch.uint8)
    for k, name in enumerate(ids):
        pseudo[:, k] = 254 * (said == ids[name])
    pseudo[:, -1] = 255  # the new structure
    label[:, 2], label[:, -1] = truth > 0, truth == 2  # what LiTS annotates
    label, pseudo = label[..., None, None], pseudo[..., None, None]
    batch = Batch(
        image=torch.zeros(2, 1, 4, 1, 1), label=label, pseudo=pseudo, structures=tuple(ids),
        new=tuple(n == "liver_tumor" for n in ids), cases=("1", "2"),
    )  # fmt: skip
    allowed = allowed_channels(batch)
    assert (allowed.sum(1) == 1).all()
    template = torch.tensor([0, *ids.values()])
    assert torch.equal(template[allowed.long().argmax(1)[..., 0, 0]], torch.tensor(g["pseudo"]))


# --------------------------------------------------------------------------------------- options


def test_two_axes_may_be_pooled_in_plop() -> None:
    features = {"enc0": torch.rand(2, 1, 4, 4, 4)}, {"enc0": torch.rand(2, 1, 4, 4, 4)}
    new, old = replace(NEW, features=features[0]), replace(OLD, features=features[1])
    memory: Memory = {THRESHOLDS: torch.full((3,), 0.5)}
    found = [
        Plop(pooled_axes=n, logit_factor=0.0).losses(batch_of(LABELS), new, old, memory)["pod"]
        for n in (1, 2)
    ]
    for n, value in zip((1, 2), found, strict=True):
        want = pod(*features, factors={"enc0": 0.01}, current=5, learned=2, pooled_axes=n)
        assert value.item() == pytest.approx(want.item() / 2, rel=1e-5)  # the logits' map counts
    assert found[0].item() != pytest.approx(found[1].item(), rel=1e-3)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_gate_of_plop_by_its_options(legacy: bool, adaptive: bool) -> None:
    old = torch.tensor(ENTROPY["old_logits"])[..., None]
    labels = torch.tensor(ENTROPY["labels"])[..., None]
    thresholds = torch.tensor(ENTROPY["thresholds"])[: old.shape[1]]
    batch = batch_of(labels, old_known=False)
    new = Output(logits=torch.randn(2, 5, *labels.shape[1:], generator=torch.manual_seed(0)))
    made = Plop(legacy_median=legacy, adaptive=adaptive)
    found = made.losses(batch, new, Output(logits=old), {THRESHOLDS: thresholds})["ce"]
    # PLOP's code: a mean over the 3 old channels, divided by ln 5 (channels so far) once more
    scale = 1 / (3 * math.log(5)) if legacy else 1.0
    want = gated_ce(
        new.logits, allowed_channels(batch), old, thresholds, scale=scale, adaptive=adaptive
    )
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    if legacy:  # by hand, from the published code's labels and factors
        taught = torch.tensor(ENTROPY["new_labels"])[..., None]
        loss = functional.cross_entropy(new.logits, taught, ignore_index=255, reduction="none")
        factor = torch.tensor(ENTROPY["classif_adaptive_factor"]) if adaptive else torch.ones(2)
        by_hand = (loss * factor.view(2, 1, 1, 1)).sum() / (labels != 255).sum()
        assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("kind", [Plop, Mib, Mbs])
def test_a_new_structure_that_a_case_does_not_annotate_is_not_pushed_down(kind: Any) -> None:
    """The old model never knew it, and calls it background."""
    label = torch.tensor([255, 255, 0, 255], dtype=torch.uint8).view(1, 4, 1, 1, 1)
    batch = Batch(
        image=torch.zeros(1, 1, 1, 1, 1), label=label, pseudo=None, structures=FOUR, new=TWO_OLD,
        cases=("1",),
    )  # fmt: skip
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0]).view(1, 5, 1, 1, 1).requires_grad_()
    old = torch.tensor([10.0, 0.0, 0.0]).view(1, 3, 1, 1, 1)
    features = {"final": torch.zeros(1, 1, 1, 1, 1)}
    memory: Memory = {THRESHOLDS: torch.full((3,), 0.5)}
    ce = kind().losses(
        batch, Output(logits=logits, features=features), Output(logits=old, features=features),
        memory,
    )["ce"]  # fmt: skip
    (grad,) = torch.autograd.grad(ce, logits)
    assert grad[0, 4] < 0 < grad[0, 3]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_thresholds_of_plop_by_its_options(legacy: bool) -> None:
    logits = torch.randn(3, 4, 4, 4, generator=torch.manual_seed(1))
    shown = torch.zeros(2, 4, 4, 4, dtype=torch.uint8)
    shown[0, :2] = 1  # an annotated structure: its voxels are not counted
    lesson = Lesson(number=2, learns=("stomach", "aorta"), structures=FOUR, source="x")
    volume: Any = SimpleNamespace(labels=lambda names, at: shown.numpy())
    old: Any = SimpleNamespace(logits=lambda v: [(0, 4, logits)])
    made = Plop(legacy_median=legacy, floor=0.125)
    memory: Memory = {}
    case = made.prepare_case(lesson, cast(Any, volume), old)
    made.prepare(lesson, {"1": case, "2": case}, memory)
    assert case["entropy"].shape == (3, 100 if legacy else 10_000)
    assert case["entropy"].sum() == 2 * 16
    scale = 1 / (3 * math.log(5)) if legacy else 1.0
    p = logits[:, 2:].softmax(0)
    entropy = -(p * p.log()).sum(0) / math.log(3) * scale
    if legacy:
        where = torch.ones(1, 2, 4, 4, dtype=torch.bool)
        counts = entropy_histogram(logits[None, :, 2:], where, bins=100, scale=scale)
        want = legacy_thresholds(2 * counts, floor=0.125).tolist()
    else:
        winner = logits[:, 2:].argmax(0)
        want = [max(0.125, entropy[winner == c].quantile(0.5).item()) for c in range(3)]
    found = cast(Tensor, memory[THRESHOLDS]).tolist()
    assert found == pytest.approx(want, abs=1e-3 if legacy else 0.05)  # a median lies between two
    assert min(found) >= 0.125
    again: Memory = {}
    stored = {"1/a": {"logits": torch.zeros(3, 4, 4, 4)}}  # as a strategy that stores cases adds
    made.prepare(lesson, {"1": case, **stored, "2": case}, again)
    assert torch.equal(cast(Tensor, again[THRESHOLDS]), cast(Tensor, memory[THRESHOLDS]))
    made.prepare(lesson, stored, again := {})
    assert not again


@pytest.mark.parametrize("made", [SoftmaxFinetune, Lwf, Ilt, Mib, LwfCt, IltCt, PlopCt, Plop])
def test_options_of_all_softmax_methods(made: Any) -> None:
    memory: Memory = {THRESHOLDS: torch.full((3,), 0.5)}
    batch = batch_of(LABELS, old_known=False)
    plain, without, slices = (
        terms_of(made(**o), batch, memory)
        for o in ({}, {"dice": False}, {"legacy_slice_dice": True})
    )
    dice = {name for name in plain if name.startswith("dice")}
    assert dice
    assert without == {k: v for k, v in plain.items() if k not in dice}
    allowed = allowed_channels(batch, unlabelled=made().unlabelled)
    parts = {"new": [2, 3], "old": [0, 1]}
    for name in dice:
        among = parts.get(name.removeprefix("dice_"), range(4))
        for terms, slicewise in ((plain, False), (slices, True)):
            want = sigmoid_dice(NEW.logits, allowed, batch, among, slicewise=slicewise)
            assert terms[name] == pytest.approx(want.item(), abs=1e-6)


def test_what_a_case_does_not_annotate_is_background_as_the_authors_taught_it() -> None:
    """The organs that BTCV's cases 61 to 80 lack; padding stays unknown, old structures, too."""
    first = batch_of(LABELS, new=(True, True, True, True))
    first.label[1, 3] = 255
    zero = replace(first, label=first.label.clone())
    zero.label[1, 3] = torch.where(LABELS[1] == 255, 255, 0)
    for made in (SoftmaxFinetune, LwfCt, IltCt, PlopCt):
        legacy = made(legacy_unannotated_background=True).first_step()
        found = [s.losses(b, NEW, None, {})["ce"].item()
                 for s, b in ((legacy, first), (legacy, zero), (made().first_step(), first))]  # fmt: skip
        assert found[0] == found[1] != found[2]
    old = batch_of(LABELS, old_known=False)
    legacy, plain = (LwfCt(legacy_unannotated_background=b) for b in (True, False))
    assert terms_of(legacy, old) == terms_of(plain, old)


def rates_of(made: Strategy) -> tuple[list[float], dict[str, float]]:
    """Rates of step 1's groups; in step 2 the rate of each row, and of the body as "body"."""
    kit = Kit(
        backbone=lambda: small_unet(8), encode=lambda names: torch.zeros(len(names), 512), seed=0
    )
    first = Lesson(number=1, learns=FOUR[:2], structures=FOUR[:2], source="x")
    second = Lesson(number=2, learns=FOUR[2:], structures=FOUR, source="x")
    model = made.first_step().build(kit, first)
    rates = [g.lr for g in made.first_step().groups(model, first, {})]
    made.grow(model, kit, second)
    names = {p: n.split(".")[-1] if n.startswith("head") else "body"
             for n, p in model.named_parameters()}  # fmt: skip
    groups = made.groups(model, second, {})
    every = [p for g in groups for p in g.parameters]
    assert len(every) == len(set(every))
    return rates, {names[p]: g.lr for g in groups for p in g.parameters}


def test_the_output_layer_keeps_its_rate_but_where_a_source_says_otherwise() -> None:
    same: tuple[type[SoftmaxFinetune], ...] = (SoftmaxFinetune, Lwf, Ilt, Mib, Plop, Mbs, IltCt)
    rows = dict.fromkeys(("background", *FOUR), 100.0)
    for kind in same:
        assert rates_of(kind()) == ([1.0, 100.0], {"body": 1.0, **rows}), kind
        version = 3 if kind is Plop else 2  # for its own defaults, see `earlier_defaults`
        assert (kind.version, kind.first_step(kind())) == (version, SoftmaxFinetune())
        assert [kind.serves(v) for v in (1, version, version + 1)] == [True, True, False]
    for kind in (LwfCt, PlopCt):  # the authors' code
        assert rates_of(kind()) == ([1.0, 100.0], dict.fromkeys(("body", *rows), 1.0)), kind
        assert kind.version == 1
        assert [kind.serves(v) for v in (1, 2)] == [True, False]
    assert rates_of(IltCt(legacy_fresh_classifier=True))[1] == {"body": 1.0, **rows}
    assert rates_of(IltCt(head="sigmoid"))[1]["body"] == 1.0


def test_rates_of_old_and_of_new_rows_are_options() -> None:
    old, new = ("background", *FOUR[:2]), FOUR[2:]
    made = Lwf(classifier_lr=7.0, new_classifier_lr=5.0, old_classifier_lr=3.0)
    want = {"body": 1.0, **dict.fromkeys(old, 3.0), **dict.fromkeys(new, 5.0)}
    assert rates_of(made) == ([1.0, 7.0], want)
    assert rates_of(Ilt(freeze_encoder=True, old_classifier_lr=3.0))[1]["liver"] == 3.0
    assert rates_of(FrozenSoftmax(new_classifier_lr=5.0))[1] == dict.fromkeys(new, 5.0)
    with pytest.raises(SettingError, match="old_classifier_lr"):
        LwfCt(old_classifier_lr=-1.0)


def test_splitting_the_background_is_an_option_of_plop() -> None:
    kit = Kit(
        backbone=lambda: small_unet(8), encode=lambda names: torch.zeros(len(names), 8), seed=0
    )
    first = Lesson(number=1, learns=FOUR[:2], structures=FOUR[:2], source="x")
    second = Lesson(number=2, learns=FOUR[2:], structures=FOUR, source="x")
    for splits in (True, False):
        made = Plop(splits_background=splits)
        model: Any = made.build(kit, first)
        made.grow(model, kit, second)
        weight = model.head.weight
        assert torch.equal(weight[FOUR[2]], weight["background"]) == splits
        assert made.declaration.keeps_old_logits == (not splits)


def test_annotated_old_structures_may_be_taught_by_predictions() -> None:
    """The annotation of an old structure is not looked at; the pseudo label stands in."""
    torch.manual_seed(0)
    shape = (2, 4, 4, 4, 4)
    annotated = torch.randint(0, 2, shape, dtype=torch.uint8)
    pseudo = (254 * torch.randint(0, 2, shape)).to(torch.uint8)
    pseudo[:, 2:] = 255
    hidden = annotated.clone()
    hidden[:, :2] = 255
    first, second = (
        Batch(image=torch.zeros(2, 1, 4, 4, 4), label=label, pseudo=pseudo, structures=FOUR,
              new=TWO_OLD, cases=("1", "2"))
        for label in (annotated, hidden)
    )  # fmt: skip
    for made, channels in ((Universal, 4), (LwfCt, 5), (PlopCt, 5)):
        features = {"bottleneck": torch.rand(2, 1, 2, 2, 2)}
        new = Output(logits=torch.randn(2, channels, 4, 4, 4), features=features)
        old = Output(logits=torch.randn(2, channels - 2, 4, 4, 4), features=features)

        def loss(kind: Any, word: str, batch: Batch, new: Output = new, old: Output = old) -> float:
            found = kind(annotated_old=word).losses(batch, new, old, {})
            return float(sum(v.item() for v in found.values()))

        assert loss(made, "pseudo", first) == loss(made, "annotation", second)
        assert loss(made, "pseudo", first) != loss(made, "annotation", first)


def test_exclusive_decoders_and_softmax_tumors_outside_the_liver() -> None:
    torch.manual_seed(0)
    names = ("liver", "spleen", "liver_tumor")
    logits = torch.randn(1, 3, 4, 4, 4)
    free = DecoderGrowth().decode(logits, names)
    assert torch.equal(free, logits.sigmoid())
    alone = DecoderGrowth(exclusive=True).decode(logits, names)
    assert torch.equal(alone, one_winner(logits.sigmoid(), names))
    assert not torch.equal(alone > 0.5, free > 0.5)
    tumor = torch.zeros(1, 4, 1, 1, 1)
    tumor[:, 3] = 5.0
    found = {e: LwfCt(legacy_exclusive=e).decode(tumor, names)[0, 0].item() > 0.5
             for e in (False, True)}  # fmt: skip
    assert found == {False: True, True: False}  # a tumor in the liver is liver, or is not


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((kind, option) for kind in (LwfCt, IltCt, PlopCt) for option in kind.of_softmax),
        (IltCt, "legacy_shifted_dice"),
        (IltCt, "rules"),
    ],
)
def test_options_of_the_softmax_head_are_refused_beside_sigmoids(kind: Any, option: str) -> None:
    other: dict[str, Any] = {
        "rules": (), "unlabelled": "background", "annotated_old": "pseudo",
        **dict.fromkeys(("classifier_lr", "new_classifier_lr", "old_classifier_lr"), 7.0),
    }  # fmt: skip
    value = other.get(option, not getattr(kind(), option))
    kind(**{option: value})
    kind(head="sigmoid")
    with pytest.raises(SettingError, match="softmax head") as err:
        kind(head="sigmoid", **{option: value})
    assert err.value.fields()["where"] == f"strategy.{option}"
    assert "head=sigmoid" in str(err.value.got)
