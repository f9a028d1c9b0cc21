"""The one contract of a continual-learning method: Batch, Output, Memory, Kit, Strategy.

A strategy is a frozen dataclass whose fields are its hyperparameters; what it
remembers between steps lives in `Memory` alone, so every checkpoint holds all of it. The loop
(`clbench.training.loop`) owns model, teacher, optimizer, order of cases and crops; a strategy only
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench.data.labels import UNKNOWN as UNKNOWN  # part of the contract
from clbench.data.volume import Volume
from clbench.nets.output import Output
from clbench.reproducibility import derive_seed

Memory = dict[str, "Tensor | int | float | str | list[object]"]
"""All a strategy remembers; saved in every checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What the loop teaches with.

    K structures have been learned so far (this step's included); their order never changes.
    """

    image: Tensor
    """(B, 1, D, H, W) float32 in [0, 1]."""
    label: Tensor
    """(B, K, D, H, W) uint8: 0, 1, or 255 = not annotated here."""
    pseudo: Tensor | None
    """(B, K, D, H, W) uint8: 255 = none, else round(254 p); a hard label is 0 or 254."""
    structures: tuple[str, ...]
    """The K names."""
    new: tuple[bool, ...]
    """K: learned in this step."""
    cases: tuple[str, ...]
    """B case ids."""

    @property
    def old_index(self) -> list[int]:
        """Channels learned before this step."""
        return [k for k, new in enumerate(self.new) if not new]

    @property
    def new_index(self) -> list[int]:
        """Channels learned in this step."""
        return [k for k, new in enumerate(self.new) if new]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """Where in the course we are."""

    number: int
    """1-based step."""
    learns: tuple[str, ...]
    """Structures first taught in this step."""
    structures: tuple[str, ...]
    """All structures learned up to and including this step, in channel order."""
    source: str
    """Data set of this step."""
    cases: tuple[str, ...] = ()
    """This step's training cases."""
    validation: tuple[str, ...] = ()
    """This step's validation cases; see `Phase.validations`."""
    past: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Training cases of each earlier step; a strategy may name them only if `past` allows."""
    voxels: int = 0
    """Voxels of this step's training cases together, model grid; known while the step is taught."""

    @property
    def old(self) -> tuple[str, ...]:
        """Structures learned before this step."""
        return self.structures[: len(self.structures) - len(self.learns)]

    @property
    def new_flags(self) -> tuple[bool, ...]:
        """K flags: learned in this step."""
        return tuple(name in self.learns for name in self.structures)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of training with its own optimizer and schedule."""

    name: str = "train"
    """Name for records; part of the seed of every crop, so equal names see equal crops."""
    effort: float = 1.0
    """Updates per epoch, in units of the profile's."""
    lr: float = 1.0
    """Factor on the profile's learning rate."""
    epochs: int | None = None
    """Epochs; None: the profile's."""
    constant: bool = False
    """One learning rate throughout, instead of warm-up and cosine."""
    validations: int = 0
    """After each of this many last epochs, the served model is measured on the validation cases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseResult:
    """A phase that has ended."""

    phase: Phase
    """The phase."""
    validation: tuple[float, ...] = ()
    """Mean Dice of the structures first taught in this step, model grid, one per measurement; nan
    where no validation case holds any of them."""


Draws = Callable[[int], Iterator[Batch]]
"""n → n batches of this step's own training crops, the same ones at every call."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters trained together. Parameters in no group are frozen."""

    parameters: list[nn.Parameter]
    """The parameters."""
    lr: float = 1.0
    """Factor on the phase's learning rate."""


class Predictor(Protocol):
    """The model served after the previous step, for offline pseudo labels."""

    structures: tuple[str, ...]
    """Names of the K channels."""

    def probabilities(self, volume: Volume) -> Iterator[tuple[int, int, Tensor]]:
        """Slabs (start, stop, (K, stop - start, H, W) probabilities) along axis 0, in order."""
        ...

    def logits(self, volume: Volume) -> Iterator[tuple[int, int, Tensor]]:
        """The same before `decode`: (C, stop - start, H, W) logits."""
        ...


class Kit:
    """What a strategy builds a model from: backbone, text vectors, and seeded randomness."""

    def __init__(
        self,
        *,
        backbone: Callable[[], nn.Module],
        encode: Callable[[Sequence[str]], Tensor],
        seed: int,
        prior: float | None = None,
    ) -> None:
        self._backbone = backbone
        self._encode = encode
        self.seed = seed
        self.prior = prior
        """Probability with which a new structure's voxels start; None: as torch initialises."""

    def backbone(self) -> nn.Module:
        """A new backbone (see `clbench.nets.backbones`), initialised from the current RNG state."""
        return self._backbone()

    def encoding(self, structures: Sequence[str]) -> Tensor:
        """(len(structures), 512) float32 text vectors, in the order asked for."""
        return self._encode(structures)

    def generator(self, step: int, name: str) -> torch.Generator:
        """A CPU generator that depends on seed, step and name only."""
        return torch.Generator().manual_seed(derive_seed(self.seed, step, name))

    @contextmanager
    def fresh(self, step: int, name: str) -> Iterator[None]:
        """Initialise layers in this block: global RNG seeded by (seed, step, name), restored."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, step, name))
            yield


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A continual-learning method. Override what differs; every hook has a plain default.

    Subclasses are frozen dataclasses; their fields are hyperparameters (`--set strategy.x=…`).
    """

    version: ClassVar[int] = 1
    """Raised when the same settings give other numbers: older runs are left, and not gone on with
    or reused. (A default that changes is no new setting to them.)"""
    past: ClassVar[Literal["nothing", "weights", "predictions", "cases", "images"]] = "weights"
    """What it needs of earlier steps; the runner opens nothing more."""
    starts_from: ClassVar[Literal["previous", "scratch"]] = "previous"
    """The model a step starts with."""
    unlabelled: Literal["ignore", "background"] = "ignore"
    """How voxels of old structures without annotation are treated."""
    keeps_old_logits: ClassVar[bool] = True
    """Growth alone changes no old logit."""
    penalties: ClassVar[tuple[str, ...]] = ()
    """Names of the loss terms that hold on to the past."""
    resumes: ClassVar[Literal["update", "step"]] = "update"
    """Where a stopped run can go on: after any update, or at the start of the step alone."""

    def first_step(self) -> Strategy:
        """The plain strategy whose step 1 this one's equals: trained once and shared."""
        return self

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """A new model for the structures of step 1; its forward returns `Output`."""
        raise NotImplementedError(f"{type(self).__name__} must say how its model is built")

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """Add what the new structures need, in place. Replayed to load any checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} must say how its model grows")

    def takes_teacher(self, step: Lesson) -> bool:
        """Whether the losses need the old model's output on every batch."""
        return False

    def prepare_case(
        self, step: Lesson, volume: Volume, old: Predictor | None
    ) -> Mapping[str, Tensor]:
        """Offline work per training case, cached: `{"pseudo": (K_old, D, H, W) uint8}`, or {}."""
        return {}

    def prepares(self, step: Lesson) -> bool:
        """Whether `prepare_case` has work to do in this step."""
        return False

    def prepare(
        self, step: Lesson, per_case: Mapping[str, Mapping[str, Tensor]], memory: Memory
    ) -> None:
        """A fold over the prepared cases, before training."""

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        """(past step, case) → weight. This step's own cases weigh 1 together.

        A case of weight 0 is opened for the strategy's session, and not drawn by the loop.
        """
        return {}

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """Parameters to train, asked anew for every phase; absent ones are frozen.

        Frozen parameters feel neither gradient nor weight decay, and a module with nothing but
        frozen parameters works in evaluation mode.
        """
        return [Group(parameters=list(model.parameters()))]

    def session(self, desk: Desk) -> Session | None:
        """A companion for one phase, where hooks are not enough (`clbench.strategy.contract`).

        It sees the optimizer, and may replace the batches and add to the loss.
        """
        return None

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        """Named loss terms; the loop adds, guards and logs them."""
        raise NotImplementedError(f"{type(self).__name__} must say what it minimises")

    def after_backward(self, model: nn.Module, memory: Memory) -> None:
        """Change gradients before the update."""

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        """Change weights or memory after the update."""

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        """The phase after those in `history`; None ends the step."""
        return None if history else Phase()

    def enter_phase(self, phase: Phase, model: nn.Module, memory: Memory) -> None:
        """Prepare the model for a phase."""

    def finish(self, step: Lesson, model: nn.Module, draws: Draws, memory: Memory) -> None:
        """Work after the last phase of a step, with training crops at hand if it needs any."""

    def serve(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The model to examine, and the teacher of the next step."""
        return model

    def prunes(self, model: nn.Module) -> int:
        """How many weights of a model it sets to zero at the most, for what a method costs."""
        return 0

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, C, D, H, W) logits → (B, K, D, H, W) probabilities; above 0.5 is foreground."""
        return torch.sigmoid(logits)

    def axial_ranges(
        self,
        image_hu: NDArray[np.int16],
        spacing_mm: tuple[float, float, float],
        structures: tuple[str, ...],
        memory: Memory,
    ) -> Mapping[str, tuple[int, int]]:
        """Where along the body a structure may be: structure → (start, stop) on axis 2.

        Asked once per whole volume, in examination and for pseudo labels: outside its range a
        structure's probability is 0. Structures not named are not limited.

        Args:
            image_hu: (D, H, W) the volume, read-only; axis 2 grows towards the head.
            spacing_mm: its voxel size.
            structures: those the model answers for.
            memory: the strategy's memory.
        """
        return {}


# --------------------------------------------------------------------------------------------------
# What happens around each update of a phase: by default, the hooks of the strategy.
# Most methods need no more than those hooks. One that must see the optimizer,
# draw crops of its own or replace the batches brings a session of its own (`Strategy.session`); the
# loop, its phases and its schedule stay the same.


Draw = Callable[["Volume | tuple[int, str]", Sequence[object]], tuple[Tensor, Tensor]]
"""(case, place) → image (1, *patch) and label (K, *patch); the crop depends on the place alone. A
case is (step, name) as the step may draw it, or a volume at hand."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What the loop lays out for one phase."""

    strategy: Strategy
    """The method."""
    model: nn.Module
    """The model; its forward returns `Output`."""
    teacher: nn.Module | None
    """The model served after the previous step, where the strategy takes it."""
    optimizer: torch.optim.Optimizer
    """The loop sets its learning rates before every update."""
    lesson: Lesson
    """The step."""
    phase: Phase
    """The phase."""
    memory: Memory
    """What the strategy remembers."""
    epochs: int
    """Of the phase."""
    updates: int
    """Per epoch."""
    batch: int
    """Crops per update."""
    seed: int
    """Of the run."""
    device: torch.device
    """Where to compute."""
    draw: Draw
    """Cuts a crop of a case that this step may open."""
    validation: Callable[[str], Volume] | None = None
    """Opens a validation case of this step."""
    done: int = 0
    """Updates of the phase that an earlier attempt has done."""


class Session:
    """The plain one: batches as they come, losses and changes as the strategy says."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def batches(self, own: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of the phase, one per update that is still to do.

        Args:
            own: those the loop draws; not drawn where nobody asks for them.
        """
        return own

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward pass and named loss terms, inside the loop's autocast."""
        d = self.desk
        new: Output = d.model(batch.image)
        old: Output | None = None
        if d.teacher is not None:
            with torch.no_grad():
                old = d.teacher(batch.image)
        return d.strategy.losses(batch, new, old, d.memory)

    def after_backward(self) -> None:
        """Gradients are there, unscaled; they may be clipped next."""
        self.desk.strategy.after_backward(self.desk.model, self.desk.memory)

    def before_update(self) -> None:
        """Gradients are final."""

    def after_update(self) -> None:
        """The weights have changed."""
        self.desk.strategy.after_update(self.desk.model, self.desk.memory)
