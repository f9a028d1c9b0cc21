"""The honesty kit on strategies: honest ones pass, and each broken one is caught by its rule."""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.volume import Volume
from clbench.errors import SettingError, UnknownName
from clbench.nets.heads import ConvHead, Segmenter
from clbench.nets.output import Output
from clbench.run import teach as runner
from clbench.spec import registry
from clbench.strategies.finetune import Finetune
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategy import contract
from clbench.strategy.contract import (
    Batch,
    DrawBatches,
    Group,
    Kit,
    Lesson,
    Memory,
    PhaseContext,
    Predictor,
    Session,
    Strategy,
)
from clbench.strategy.losses import dice_bce, targets
from clbench.strategy.partial_labels import allowed_channels, mean_ce
from clbench.strategy.search_space import Range, SearchSpace
from clbench.strategy.sharding import denominator
from clbench.testing.fixtures import PATCH, reproducible
from clbench.testing.harness import StrategyHarness
from clbench.testing.report import Report, judge
from clbench.testing.rules.whole_run import (
    ALIKE,
    MIN_COPIED_ROWS,
    MOST_ROWS,
    ROW,
    _copied,
    _held,
    _rough_rows,
)
from clbench.testing.strategy_check import LATE, RULES, check_strategy

# ------------------------------------------------------------------------- an honest strategy


@dataclass(frozen=True, kw_only=True)
class Honest(Strategy):
    """Sigmoid outputs, a distillation penalty, a frozen first block: true to all it declares."""

    past: ClassVar[Any] = "predictions"
    penalties: ClassVar[Any] = ("kd",)

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        with kit.fresh(step.number, "model"):
            backbone = kit.backbone()
            model = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
            model.add(step.learns)
        return model

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        with kit.fresh(step.number, "grow"):
            model.add(step.learns)

    def takes_teacher(self, step: Lesson) -> bool:
        return bool(step.old)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        frozen = {id(p) for p in model.backbone.encoder.fine.parameters()}
        return [Group(parameters=[p for p in model.parameters() if id(p) not in frozen])]

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch, unlabelled=self.unlabelled)
        return {**dice_bce(new.logits, target, known), **self.kd(new, old)}

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        if old is None:
            return {}
        kept = new.logits[:, : old.logits.shape[1]]
        return {"kd": ((kept.sigmoid() - old.logits.sigmoid()) ** 2).mean()}


# ---------------------------------------------------------------- broken, each in one way


class Thawed(Honest):
    """Not a dataclass of its own, but its parent is: allowed. A word that does not exist is not."""

    past: ClassVar[Any] = "everything"


class ForgetsItsDecorator(Honest):
    """Has a hyperparameter that no setting can reach: the parent is the dataclass."""

    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OfAParentWithout(ForgetsItsDecorator):
    """The same, a class further up."""


class OnePenalty(Honest):
    """Forgets the comma of a tuple of one."""

    penalties: ClassVar[Any] = "kd"


class Named(Honest):
    """Counts its versions in words."""

    version: ClassVar[Any] = "v2"


class Unbounded(Honest):
    """Leaves out one end of its search space."""

    search_space: ClassVar[SearchSpace] = {"train.lr": Range(low=1e-5, log=True)}


@dataclass(kw_only=True, unsafe_hash=True)
class Loose:
    """A dataclass that is not frozen."""

    version: ClassVar[int] = 1
    past: ClassVar[Any] = "weights"
    starts_from: ClassVar[Any] = "previous"
    unlabelled: Literal["ignore", "background"] = "ignore"
    keeps_old_logits: ClassVar[bool] = True
    penalties: ClassVar[Any] = ()


class NoModel(Honest):
    """Answers with a bare tensor."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        return nn.Conv3d(1, len(step.learns), 1)


class Shrinks(Honest):
    """Answers at half the resolution."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        model = super().build(kit, step)
        model.head.register_forward_hook(lambda m, args, out: functional.avg_pool3d(out, 2))
        return model


class OneAtATime(Honest):
    """Grows by one structure only."""

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        (_name,) = step.learns
        super().grow(model, kit, step)


class Numbered(Honest):
    """Names what grows by a counter that never starts again: no checkpoint fits."""

    count: ClassVar[list[int]] = [0]

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        super().grow(model, kit, step)
        Numbered.count[0] += 1
        model.add_module(f"extra{Numbered.count[0]}", nn.Linear(1, 1))


class Rebuilds(Honest):
    """Draws the whole output layer anew when it grows."""

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        super().grow(model, kit, step)
        with kit.fresh(step.number, "again"), torch.no_grad():
            for weight in model.head.weight.values():
                weight.normal_()


class ClaimsToForget(Honest):
    """Declares that growth moves old logits; it does not."""

    keeps_old_logits: ClassVar[bool] = False


class FixedSeed(Honest):
    """Initialises with a seed of its own."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        other = Kit(backbone=kit._backbone, encode=kit._encode, seed=42)
        return super().build(other, step)


class Logits(Honest):
    """Decodes to logits."""

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        return logits


class Neighbors(Honest):
    """Decodes with the mean over depth: another answer for every slab."""

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        return torch.sigmoid(logits - logits.mean(2, keepdim=True))


class ZeroByZero(Honest):
    """Dice without a 1 in its denominator."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        terms = super().losses(batch, new, old, memory)
        hit = (batch.label == 1).float()
        return {**terms, "ratio": 1 - (hit * new.logits.sigmoid()).sum() / hit.sum()}


class LaterZeroByZero(Honest):
    """A penalty divided by the number of unknown voxels."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        return {k: v / (old.logits > 50).sum() * 0 + v for k, v in super().kd(new, old).items()}


class Crashes(Honest):
    """Fails in the second step."""

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        memory["updates"] = int(memory.get("updates", 0)) + 1
        if memory["updates"] > 3:
            raise RuntimeError("out of ideas")


class Rolls(Honest):
    """Weighs its penalty by a random number that nobody seeded."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        return {k: v * (1 + random.random()) for k, v in super().kd(new, old).items()}


class Doodles(Honest):
    """Paints over the batch."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        terms = super().losses(batch, new, old, memory)
        batch.image.zero_()
        return terms


@dataclass(frozen=True, kw_only=True)
class Scribbles(Honest):
    """Keeps a running mean on itself."""

    mean: list[float] = field(default_factory=list)

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        self.mean.append(1.0)


class SetsItself(Honest):
    """Goes around frozen."""

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        object.__setattr__(self, "step", 2)


class ServesInPlace(Honest):
    """Rounds the weights it is going to train on."""

    def serve(self, model: nn.Module, memory: Memory) -> nn.Module:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.half().float())
        return model


class AnotherFirstStep(Honest):
    """Says its step 1 is plain, and adds a penalty to it."""

    def first_step(self) -> Strategy:
        return Honest()

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        terms = super().losses(batch, new, old, memory)
        return terms if old is not None else {**terms, "small": new.logits.pow(2).mean()}


class RemembersAlone(Honest):
    """Needs a memory of step 1 that its first_step() never makes."""

    def first_step(self) -> Strategy:
        return Honest()

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        memory["anchor"] = next(model.parameters()).detach().clone()


class Detached(Honest):
    """The classic: the student is compared with itself."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        return (
            {}
            if old is None
            else {"kd": (new.logits.detach() - old.logits.sum() * 0).pow(2).mean()}
        )


class Misnamed(Honest):
    """Declares one name and returns another."""

    penalties: ClassVar[Any] = ("distillation",)


class Zeroed(Honest):
    """A penalty that is always zero, gradient and all."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        return {k: v * 0 for k, v in super().kd(new, old).items()}


class WakesTheTeacher(Honest):
    """Asks for a gradient in the teacher's answer."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        if old is not None:
            old.logits.requires_grad_(True)
        return super().kd(new, old)


class BendsTheTeacher(Honest):
    """Cools the teacher's logits in place."""

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        if old is not None:
            old.logits.div_(2.0)
        return super().kd(new, old)


class Deaf(Honest):
    """Takes a teacher and never listens."""

    penalties: ClassVar[Any] = ()

    def kd(self, new: Output, old: Output | None) -> dict[str, Tensor]:
        return {}


class SecretBackground(Honest):
    """Declares `ignore`, and takes 255 of old structures for background."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch, unlabelled="background")
        return {**dice_bce(new.logits, target, known), **self.kd(new, old)}


class Padder(Honest):
    """Takes padding for background."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch)
        outside = (batch.label == 255).all(1, keepdim=True)
        return {**dice_bce(new.logits, target, known | outside), **self.kd(new, old)}


@dataclass(frozen=True, kw_only=True)
class NoBackground(Honest):
    """Declares `background`, and ignores."""

    unlabelled: Literal["ignore", "background"] = "background"

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch)
        return {**dice_bce(new.logits, target, known), **self.kd(new, old)}


@dataclass(frozen=True, kw_only=True)
class AllBackground(Honest):
    """Declares `background`, and takes new structures without annotation for background too."""

    unlabelled: Literal["ignore", "background"] = "background"

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch)
        inside = known.any(1, keepdim=True).expand_as(known)
        return {**dice_bce(new.logits, target, inside), **self.kd(new, old)}


@dataclass(frozen=True, kw_only=True)
class SecretSoftmax(SoftmaxFinetune):
    """A softmax that declares `ignore`: its Dice does, its cross-entropy takes 255 for background."""

    unlabelled: Literal["ignore", "background"] = "ignore"

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        every = range(len(batch.structures))
        ce = mean_ce(new.logits, allowed_channels(batch, unlabelled="background"))
        return {"ce": ce, **self.dice_of(batch, new, allowed_channels(batch), every)}


@dataclass(frozen=True, kw_only=True)
class DiceOfNothing(Honest):
    """Declares `background`; only its Dice says so, which has no gradient where a target is empty."""

    unlabelled: Literal["ignore", "background"] = "background"

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch, unlabelled="background")
        bce = dice_bce(new.logits, *targets(batch))["bce"]
        dice = dice_bce(new.logits, target, known)["dice"]
        return {"bce": bce, "dice": dice, **self.kd(new, old)}


class Undeclared(Honest):
    """Declares no penalty and has one."""

    penalties: ClassVar[Any] = ()


class Restarts(Honest):
    """Says it starts from the previous model, and draws every weight anew."""

    keeps_old_logits: ClassVar[bool] = False

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        super().grow(model, kit, step)
        with kit.fresh(step.number, "anew"), torch.no_grad():
            for p in model.parameters():
                p.normal_()


class RestartsLater(Honest):
    """The same, once the step begins."""

    def enter_phase(self, phase: Any, model: nn.Module, memory: Memory) -> None:
        rng = torch.Generator().manual_seed(len(list(model.parameters())))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=rng))


class Guesses(Honest):
    """Says by chance how many weights pruning may leave out."""

    def prunes(self, model: nn.Module) -> int:
        return random.randrange(1000)


class Thaws(Honest):
    """Switches on what it declared frozen."""

    def after_backward(self, model: nn.Module, memory: Memory) -> None:
        model.requires_grad_(True)


class TrainsConstants(Honest):
    """Marks a parameter as fixed and trains all parameters."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        model = super().build(kit, step)
        model.backbone.decoder.middle.requires_grad_(False)
        return model


class Nudges(Honest):
    """Moves frozen weights by hand."""

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        with torch.no_grad():
            next(model.backbone.encoder.fine.parameters()).mul_(1.01)


class Unsaveable(Honest):
    """Remembers a set."""

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        memory["seen"] = {1, 2}


class HiddenState(Honest):
    """Keeps a factor on the model that no state dict holds."""

    def serve(self, model: nn.Module, memory: Memory) -> nn.Module:
        return Scaled(model, getattr(model, "factor", 1.0))

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        model.factor = getattr(model, "factor", 1.0) * 3.0


class Scaled(nn.Module):
    """A model whose logits are multiplied."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, image: Tensor) -> Output:
        return Output(logits=self.model(image).logits * self.factor)


class Greedy(Honest):
    """Takes images of step 1 without saying so."""

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        return {(1, case): 1.0 for case in step.past.get(1, ())}


class Modest(Honest):
    """Declares images and asks for none."""

    past: ClassVar[Any] = "images"


class Understated(Honest):
    """Declares nothing and takes a teacher."""

    past: ClassVar[Any] = "nothing"


class Overstated(Deaf):
    """Declares predictions and asks for none."""

    def takes_teacher(self, step: Lesson) -> bool:
        return False


class Hoards(Honest):
    """Keeps crops in memory."""

    def kept(self, image: Tensor) -> Any:
        return image.clone()

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        memory["picture"] = self.kept(batch.image)
        return super().losses(batch, new, old, memory)


class HoardsInHalf(Hoards):
    """Of half precision."""

    def kept(self, image: Tensor) -> Any:
        return image.to(torch.float16)


class HoardsInBfloat(Hoards):
    """In the other half precision."""

    def kept(self, image: Tensor) -> Any:
        return image.to(torch.bfloat16)


class HoardsNumbers(Hoards):
    """As rows of plain numbers."""

    def kept(self, image: Tensor) -> Any:
        return {"rows": image.squeeze().tolist()}


class HoardsBytes(Hoards):
    """Rounded to a byte a voxel."""

    def kept(self, image: Tensor) -> Any:
        return (image * 255).round().to(torch.uint8)


class HoardsHu(Hoards):
    """In Hounsfield units."""

    def kept(self, image: Tensor) -> Any:
        return (image * 425 - 175).round().to(torch.int16)


class HoardsText(Hoards):
    """As text."""

    def kept(self, image: Tensor) -> Any:
        return base64.b64encode(image.numpy().tobytes()).decode()


class Buffer:
    """A buffer as research code has it."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []


KEPT: list[Tensor] = []
BUFFER = Buffer()


class HoardsInTheModule(Hoards):
    """Keeps crops in a list of its module, which a run that goes on later finds empty."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        KEPT.append(batch.image.clone())
        return Honest.losses(self, batch, new, old, memory)


class Replays(Session):
    """Trains on images of step 1 that an object of its module holds."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().terms(batch)
        if self.context.lesson.number == 1:
            BUFFER.images.append(batch.image.clone())
            return terms
        logits = self.context.model(torch.cat(BUFFER.images[:2])).logits
        return {**terms, "replay": 1e-2 * logits.pow(2).mean()}


class ReplaysFromItsModule(Honest):
    """Declares predictions, and has images of step 1 while the process lives."""

    def session(self, context: PhaseContext) -> Session | None:
        return Replays(context)


class HoardsInAParameter(Honest):
    """Keeps a crop in a parameter that is not trained."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        model = super().build(kit, step)
        kept = nn.Parameter(torch.zeros(PATCH, PATCH, PATCH), requires_grad=False)
        model.register_parameter("kept", kept)
        return model

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        return [
            Group(parameters=[p for p in group.parameters if p is not model.kept])
            for group in super().groups(model, step, memory)
        ]

    def finish(self, step: Lesson, model: nn.Module, batches: DrawBatches, memory: Memory) -> None:
        for batch in batches(1):
            model.kept.data.copy_(batch.image[0, 0])


class Projects(Honest):
    """Keeps a random projection and what images have in common: no image."""

    def finish(self, step: Lesson, model: nn.Module, batches: DrawBatches, memory: Memory) -> None:
        memory["projection"] = torch.rand(16, 65536, generator=torch.Generator().manual_seed(0))
        memory["edges"] = torch.linspace(0, 1, 426)
        for batch in batches(1):
            memory["quantiles"] = torch.quantile(batch.image.flatten(), memory["edges"])


class HoardsInTheModel(Honest):
    """Keeps crops in a buffer of the model."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        model = super().build(kit, step)
        model.register_buffer("statistics", torch.zeros(PATCH, PATCH, PATCH))
        return model

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        memory["picture"] = batch.image[0, 0].clone()
        return super().losses(batch, new, old, memory)

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        if "picture" in memory:
            model.statistics.copy_(memory.pop("picture"))


class Cheats(Honest):
    """Asks for a test case to train on."""

    past: ClassVar[Any] = "images"

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        return {(1, str(1000 + i)): 1.0 for i in range(4)} if step.number == 2 else {}


class Snoops(Honest):
    """Opens every image that lies beside the one it is given."""

    def prepares(self, step: Lesson) -> bool:
        return bool(step.old)

    def prepare_case(
        self, step: Lesson, volume: Volume, old: Predictor | None
    ) -> Mapping[str, Tensor]:
        for path in sorted(volume.files.image.parent.iterdir()):
            if self.wanted(int(path.name.split("-")[-1].split(".")[0].lstrip("img") or 0) % 1000):
                path.read_bytes()
        return {}

    def wanted(self, number: int) -> bool:
        return number == 3  # the test case: the phantom numbers train, validation, test


class LooksBack(Snoops):
    """Opens the images of an earlier step."""

    def prepare_case(
        self, step: Lesson, volume: Volume, old: Predictor | None
    ) -> Mapping[str, Tensor]:
        folder = volume.files.image
        while not (folder / "first").is_dir():
            folder = folder.parent
        for path in sorted((folder / "first").rglob("*1000*.nii*")):
            np.fromfile(path, np.uint8)
            path.read_bytes()
        return {}


class Drops(Honest):
    """Drops more features the longer it is taught; a run that goes on starts counting anew."""

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        model = super().build(kit, step)
        model.backbone.seen = 0  # no checkpoint holds it

        def drop(module: Any, args: Any, maps: dict[str, Tensor]) -> dict[str, Tensor]:
            if not module.training:
                return maps
            module.seen += 1
            return {**maps, "final": maps["final"] / module.seen}

        model.backbone.register_forward_hook(drop)
        return model


class CountsItsPart(Honest):
    """Divides by the known voxels of what it is given, which may be a part of the batch."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        target, known = targets(batch)
        loss = functional.binary_cross_entropy_with_logits(new.logits, target, reduction="none")
        return {"bce": (loss * known).sum() / known.sum().clamp(min=1), **self.kd(new, old)}


class CountsWhatItSees(Honest):
    """Asks for a denominator of the structures that are there, and of no other one."""

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        terms = super().losses(batch, new, old, memory)
        for k in range(len(batch.structures)):
            inside = batch.label[:, k] == 1
            if inside.any():
                loss = (functional.softplus(-new.logits[:, k]) * inside).sum()
                terms["bce"] = terms["bce"] + loss / denominator(inside.sum())
        return terms


BROKEN: dict[type, str] = {
    Thawed: "declarations are legal",
    ForgetsItsDecorator: "declarations are legal",
    OfAParentWithout: "declarations are legal",
    OnePenalty: "declarations are legal",
    Named: "declarations are legal",
    Unbounded: "declarations are legal",
    NoModel: "builds",
    Shrinks: "builds",
    OneAtATime: "grows in any order",
    Numbered: "grows in any order",
    Rebuilds: "growth keeps old logits as declared",
    ClaimsToForget: "growth keeps old logits as declared",
    FixedSeed: "another seed gives other weights",
    Logits: "decodes to probabilities",
    Neighbors: "decodes to probabilities",
    ZeroByZero: "losses are finite on empty and full masks",
    LaterZeroByZero: "losses of later steps are finite too",
    Crashes: "a step can be taught",
    Rolls: "hooks repeat to the bit",
    Doodles: "hooks repeat to the bit",
    Scribbles: "hooks leave the strategy as it was",
    SetsItself: "hooks leave the strategy as it was",
    ServesInPlace: "serving leaves the model as it was",
    AnotherFirstStep: "step 1 equals its first step",
    RemembersAlone: "step 1 equals its first step",
    Detached: "declared penalties have gradients",
    Misnamed: "declared penalties have gradients",
    Zeroed: "declared penalties have gradients",
    WakesTheTeacher: "the teacher stays without gradient",
    BendsTheTeacher: "the teacher stays without gradient",
    Deaf: "the teacher is used",
    SecretBackground: "unknown voxels are treated as declared",
    Padder: "unknown voxels are treated as declared",
    NoBackground: "unknown voxels are treated as declared",
    AllBackground: "unknown voxels are treated as declared",
    SecretSoftmax: "unknown voxels are treated as declared",
    DiceOfNothing: "unknown voxels are treated as declared",
    Undeclared: "unknown voxels are treated as declared",
    Restarts: "starts from what it declares",
    RestartsLater: "starts from what it declares",
    Guesses: "hooks repeat to the bit",
    Thaws: "gradient stays in the declared groups",
    TrainsConstants: "gradient stays in the declared groups",
    Nudges: "gradient stays in the declared groups",
    Unsaveable: "memory can be saved",
    HiddenState: "saved and loaded it scores the same",
    Cheats: "no test case is asked for",
    Greedy: "the past is used as declared",
    Modest: "the past is used as declared",
    Understated: "the past is used as declared",
    Overstated: "the past is used as declared",
    Hoards: "the past is used as declared",
    HoardsInHalf: "the past is used as declared",
    HoardsInBfloat: "the past is used as declared",
    HoardsNumbers: "the past is used as declared",
    HoardsInTheModule: "hooks leave the strategy as it was",
    ReplaysFromItsModule: "hooks leave the strategy as it was",
    HoardsBytes: "the past is used as declared",
    HoardsHu: "the past is used as declared",
    HoardsText: "the past is used as declared",
    HoardsInAParameter: "the past is used as declared",
    HoardsInTheModel: "the past is used as declared",
    Snoops: "no test case is read",
    LooksBack: "past data is read through the catalog",
    Drops: "the same seed gives the same numbers",
}


@pytest.fixture(scope="session")
def kit_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny phantom, made once."""
    return tmp_path_factory.mktemp("kit_cache")


@pytest.mark.parametrize("kind", BROKEN, ids=lambda k: k.__name__)
def test_a_broken_strategy_is_caught_by_the_rule_it_breaks(kind: type, kit_cache: Path) -> None:
    report = check_strategy(kind(), cache=kit_cache)
    assert report.failed == (BROKEN[kind],), report
    (finding,) = [f for f in report.findings if f.status == "FAIL"]
    assert finding.error is not None
    assert finding.error.fields(), "says where, expected, got or what to do"


@pytest.mark.parametrize(
    "hide",
    [
        lambda image: {"a": image.numpy()},
        lambda image: [image.numpy().astype(np.float64)],
        lambda image: tuple(image.flatten().numpy()),
        lambda image: image.flatten().tolist(),
        lambda image: {"text": "x", "rows": list(image.flatten(0, 1))},
    ],
    ids=["array", "wide-array", "scalars", "numbers", "rows"],
)
def test_an_image_is_found_in_whatever_holds_it(hide: Any) -> None:
    image = torch.rand(4, 4, 8, generator=torch.Generator().manual_seed(0))
    state: Any = SimpleNamespace(memory={"note": "text", "kept": hide(image)}, model=nn.Identity())
    ((where, numbers),) = _held(state)
    assert where == "memory['kept']"
    assert torch.equal(numbers, image.flatten())


@pytest.mark.parametrize(
    "hide",
    [
        lambda image: image.view(torch.uint8),
        lambda image: image.double().view(torch.int64),
        lambda image: image.half().view(torch.int16).numpy(),
        lambda image: torch.complex(torch.zeros_like(image), image),
        lambda image: 1j * image.numpy(),
        lambda image: image.permute(2, 1, 0).contiguous(),
        lambda image: image.numpy().tobytes(),
        lambda image: image.half().numpy().tobytes().hex(),
    ],
    ids=["bits", "wide-bits", "half-bits", "complex", "complex-array", "turned", "bytes", "hex"],
)
def test_an_image_is_found_in_whatever_encodes_it(hide: Any) -> None:
    image = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0))
    state: Any = SimpleNamespace(memory={"kept": hide(image)}, model=nn.Identity())
    rows = _rough_rows([image.numpy()])
    assert max(_copied(rows, numbers) for _, numbers in _held(state)) >= MIN_COPIED_ROWS


def test_what_images_have_in_common_is_no_image(kit_cache: Path) -> None:
    only = ["the past is used as declared"]
    report = check_strategy(Projects(), only=only, cache=kit_cache)
    assert report.ok, str(report)


def test_numbers_are_an_image_where_its_rows_stand_among_them() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((6, 7, 20), dtype=np.float32)
    rows = _rough_rows([image])
    assert 300 < len(rows) <= 2 * MOST_ROWS
    flat = torch.from_numpy(image).flatten()
    stored = [
        flat, 2 * flat - 1, 1 - flat, flat.half().float(), flat.bfloat16().float(),
        (flat * 255).round(), (flat * 425 - 175).round(), flat[200:400],
        torch.cat([torch.zeros(100_000), flat]), torch.cat([torch.tensor([torch.nan]), flat]),
        torch.cat([torch.full((2,), 3e38), flat]), 1e-13 * flat,
    ]  # fmt: skip
    for numbers in stored:
        assert _copied(rows, numbers) >= MIN_COPIED_ROWS
    generator = torch.Generator().manual_seed(1)
    other = [
        torch.rand(1 << 20, generator=generator),
        torch.rand(200_000, generator=generator).bfloat16().float(),
        torch.linspace(0, 1, 426), torch.linspace(0, 1, 100_000),
        torch.quantile(flat, torch.linspace(0, 1, 256)), flat.sort().values,
        torch.histc(flat, 425, 0, 1), torch.full((4096,), float(flat[0])), torch.zeros(3),
        flat[torch.randperm(len(flat), generator=generator)],
    ]  # fmt: skip
    for numbers in other:
        assert _copied(rows, numbers) == 0
    chance = stats.beta.sf(ALIKE**2, 0.5, (ROW - 2) / 2)  # of two random rows to be that alike
    assert chance * MOST_ROWS * 1e7 < 1  # rows looked for, in ten million numbers
    ramp = np.broadcast_to(np.linspace(0, 1, 20, dtype=np.float32), (6, 7, 20))
    assert len(_rough_rows([ramp])) == 0  # a table that holds no image may hold a ramp


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (SetsItself, ("self.step = 2 was added", "and no other")),
        (Scribbles, ("as it was built: []", "got:       [1.0,")),
        (HoardsInTheModule, (f"{__name__}.KEPT", "got:       list of", "in memory")),
        (ReplaysFromItsModule, (f"{__name__}.BUFFER", "in memory")),
    ],
)
def test_what_a_hook_changed_is_said(
    kind: type[Strategy], says: tuple[str, ...], kit_cache: Path
) -> None:
    report = check_strategy(kind(), only=["hooks leave the strategy as it was"], cache=kit_cache)
    for part in says:
        assert part in str(report)
    assert "None" not in str(report)


PARTS = "gradients of parts add up"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (CountsItsPart, "is not that of the update"),
        (CountsWhatItSees, "counts of different number"),
    ],
)
def test_a_loss_that_cannot_be_computed_in_parts_is_warned_of(
    kind: type[Strategy], what: str, tmp_path: Path, kit_cache: Path
) -> None:
    with reproducible():
        harness = StrategyHarness(kind(), name="mine", folder=tmp_path, cache=kit_cache)
        (rule,) = [replace(rule, needs=()) for rule in RULES if rule.name == PARTS]
        report = judge(harness, [rule], Report(title=""))
    assert report.ok, report
    assert report.warned == (PARTS,)
    assert what in str(report)
    assert "denominator" in str(report)
    assert str(report).endswith("0 FAIL, 1 warn, 0 not looked at")


def test_every_rule_has_a_strategy_that_breaks_it() -> None:
    assert {rule.name for rule in RULES} == {*BROKEN.values(), PARTS}
    assert len(BROKEN) >= 15


def test_every_rule_says_why_in_one_line() -> None:
    assert max(Counter(rule.name for rule in RULES).values()) == 1
    for rule in RULES:
        assert 20 < len(rule.why) <= 100, rule.name
        assert rule.why.endswith((".", "."))


def test_an_honest_strategy_passes_every_rule(kit_cache: Path) -> None:
    report = check_strategy(Honest(), cache=kit_cache)
    assert report.ok, report
    assert {f.status for f in report.findings} == {"pass"}, report


@pytest.mark.parametrize("name", sorted(registry.entries("strategy")))
def test_every_registered_strategy_is_honest(name: str, kit_cache: Path) -> None:
    report = check_strategy(name, cache=kit_cache)
    assert report.ok, report
    assert not report.warned, report


LOSSES_ALONE = [rule.name for rule in RULES if rule.check not in LATE]
"""The rules for options that change nothing but losses: a whole run adds none of its own to them."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("universal", {"unlabelled": "background", "pseudo": "soft"}),
        ("universal_onehot", {"as_built": True}),
        ("lwf_ct", {"unlabelled": "background", "legacy_exclusive": True}),
        ("ilt_ct", {"head": "sigmoid", "legacy_slice_dice": True}),
        ("ilt_ct", {"legacy_shifted_dice": True, "legacy_fresh_classifier": True}),
        ("mib", {"splits_background": False}),
        ("frozen_softmax", {"preallocate": 1}),
        ("plop", {"legacy_median": True, "pooled_axes": 1}),
        ("decoder_growth", {"start": "copy", "ema": 0.9, "body_range": True, "exclusive": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_options_leave_a_strategy_honest(
    name: str, options: dict[str, object], kit_cache: Path
) -> None:
    whole = name == "decoder_growth"
    report = check_strategy(
        registry.load("strategy", name)(**options),
        only=() if whole else LOSSES_ALONE,
        cache=kit_cache,
    )
    assert report.ok, report
    assert not report.warned, report


def test_a_defect_that_is_an_option_fails_and_is_said_to_be_meant(kit_cache: Path) -> None:
    rule = "unknown voxels are treated as declared"
    method = SoftmaxFinetune(legacy_unannotated_background=True)
    report = check_strategy(method, only=[rule], cache=kit_cache)
    assert report.failed == (rule,)
    assert "no declaration allows it" in str(report)


def test_old_labels_may_be_left_unused(kit_cache: Path) -> None:
    """`ignore` does not oblige anyone to learn from the old structures that are annotated."""

    class NewOnly(Honest):
        def losses(
            self, batch: Batch, new: Output, old: Output | None, memory: Memory
        ) -> dict[str, Tensor]:
            label = batch.label.clone()
            label[:, batch.old_index] = 255
            return super().losses(replace(batch, label=label), new, old, memory)

    rule = "unknown voxels are treated as declared"
    report = check_strategy(NewOnly(), only=[rule], cache=kit_cache)
    assert report.ok, report


def test_a_dataclass_that_is_not_frozen(kit_cache: Path) -> None:
    report = check_strategy(Loose(), cache=kit_cache)  # type: ignore[arg-type]
    assert report.failed == ("declarations are legal",)
    assert "frozen" in str(report)


def test_rules_by_name(kit_cache: Path) -> None:
    report = check_strategy(Honest(), only=["grows in any order"], cache=kit_cache)
    assert [f.rule for f in report.findings] == [
        "declarations are legal", "builds", "grows in any order",
    ]  # fmt: skip
    with pytest.raises(UnknownName, match="no rule called"):
        check_strategy(Honest(), only=["grows"], cache=kit_cache)


def test_the_global_random_state_is_left_as_it_was(kit_cache: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    check_strategy(Honest(), only=["hooks repeat to the bit"], cache=kit_cache)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_the_command_prints_every_rule(monkeypatch: pytest.MonkeyPatch, kit_cache: Path) -> None:
    monkeypatch.setattr("clbench.testing.strategy_check.RULES", RULES[:3])
    words = ["check", "strategy", "universal", "--set", "strategy.pseudo=soft"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "pseudo='soft'" in lines[0]
    assert "past=predictions" in lines[1]
    assert lines[2] == f"  pass    {RULES[0].name}: {RULES[0].why}"
    assert lines[-1].startswith("3 rules in ")
    load = registry.load
    monkeypatch.setattr(
        registry, "load", lambda kind, name: OneAtATime if kind == "strategy" else load(kind, name)
    )
    done = CliRunner().invoke(app, ["check", "strategy", "one_at_a_time"])
    assert done.exit_code == 1
    assert "  FAIL    grows in any order" in done.output
    assert "ValueError: too many values" in done.output


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["universl"], UnknownName, "did you mean 'universal'"),
        (["universal", "--set", "strategy.pseud=soft"], SettingError, "strategy.pseudo"),
        (["universal", "--set", "train.lr=1"], SettingError, "of the strategy only"),
    ],
)
def test_the_command_refuses_a_wrong_word(
    words: list[str], kind: type[Exception], says: str
) -> None:
    done = CliRunner().invoke(app, ["check", "strategy", *words])
    assert isinstance(done.exception, kind)
    assert says in str(done.exception)


def test_a_runner_that_trains_nothing_breaks_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "train_step", lambda *args, **more: None)
    report = check_strategy(Finetune(), only=("a step can be taught",))
    assert "taught without an update" in str(report)
    assert not report.ok


def test_a_runner_that_skips_an_update_breaks_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = runner.train_step

    def skip_one(plan: Any, state: Any, material: Any, watch: Any, **more: Any) -> None:
        own = contract.Session.batches
        with monkeypatch.context() as patch:
            patch.setattr(
                contract.Session, "batches", lambda self, all_of: islice(own(self, all_of), 1)
            )
            train_step(plan, state, material, watch, **more)

    monkeypatch.setattr(runner, "train_step", skip_one)
    report = check_strategy(Finetune(), only=("a step can be taught",))
    assert "updates of a phase are missing" in str(report)
    assert not report.ok
