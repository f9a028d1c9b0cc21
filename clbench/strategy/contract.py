"""The contract of a continual-learning method: Strategy and its hooks, and what they are handed.

A strategy is a frozen dataclass whose fields are its hyperparameters; what it remembers between
steps lives in `Memory` alone, so every checkpoint holds all of it. The loop
(`clbench.training.loop`) owns model, teacher, optimizer, order of cases and crops; a strategy only
answers. Before a run, `refuse_course` may refuse it; the hooks of one step, in the order in which
they are called:

    build or grow                                       the model
    store_cases                                         which old cases to store
    prepares, prepare_case, prepare_stored (per case)   pseudo labels and other offline work
    prepare                                             its sum
    extra_cases, takes_teacher                          data and old model
    next_phase -> None ends the step
        enter_phase, groups, session                    once per phase
            losses, after_backward, after_update        once per update
        serve                                           where the phase is validated
    finish
    serve, decode, axial_ranges                         examination; teacher of the next step

In step 1 they are the hooks of `first_step()`. A hook must repeat to the bit: the loop seeds all
random states before `enter_phase`, every update and `finish`; elsewhere draw from `Kit.fresh` or
`Kit.generator` alone. A runnable example is in `clbench.strategy`.

Shapes: B crops; K structures learned so far, K_old of them before this step; C channels of logits;
D, H, W voxels, left-right, back-front and feet-head (RAS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench.data.labels import UNKNOWN as UNKNOWN  # part of the contract
from clbench.data.volume import Volume
from clbench.nets.output import Output
from clbench.reproducibility import derive_seed
from clbench.strategy.search_space import Range, SearchSpace

Terms = dict[str, Tensor]
"""Loss terms by name, each of one element."""
CaseTensors = Mapping[str, Tensor]
"""What a strategy prepares of a case, by names of its own."""
Memory = dict[str, "Tensor | int | float | str | list[object]"]
"""All a strategy remembers from update to update and from step to step: a plain dict by names of
its own. Empty before step 1, saved in every checkpoint; tensors of any shape, on any device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The crops of one update.

    K structures have been learned so far, this step's included; their order never changes. Tensors
    lie on the run's device. Losses must not change them: `dataclasses.replace` makes another batch.
    """

    image: Tensor
    """(B, 1, D, H, W) float32: HU clipped to the benchmark's window and mapped to [0, 1]."""
    label: Tensor
    """(B, K, D, H, W) uint8: 0 absent, 1 present, `UNKNOWN` (255) not annotated, or padding."""
    pseudo: Tensor | None
    """(B, K, D, H, W) uint8, what `prepare_case` returned: round(254 p), a hard label 0 or 254,
    `UNKNOWN` (255) where there is none (new structures, padding); None: no case has any."""
    structures: tuple[str, ...]
    """The K names, in channel order."""
    new: tuple[bool, ...]
    """K flags: learned in this step."""
    cases: tuple[str, ...]
    """B names "step/case id", for records and error messages."""
    again: tuple[str, ...] = ()
    """Names of old structures that this step teaches again, see `Lesson.again`."""

    @property
    def old_index(self) -> list[int]:
        """Channels learned before this step."""
        return [k for k, new in enumerate(self.new) if not new]

    @property
    def new_index(self) -> list[int]:
        """Channels learned in this step."""
        return [k for k, new in enumerate(self.new) if new]

    @property
    def taught_index(self) -> list[int]:
        """Channels that this step teaches: those learned in it, and old ones taught again."""
        return [k for k, name in enumerate(self.structures) if self.new[k] or name in self.again]

    @property
    def untaught_index(self) -> list[int]:
        """The other channels: structures of earlier steps alone."""
        taught = set(self.taught_index)
        return [k for k in range(len(self.structures)) if k not in taught]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """One step of the course: what is learned, and from which cases."""

    number: int
    """1-based step."""
    learns: tuple[str, ...]
    """Structures first taught in this step."""
    structures: tuple[str, ...]
    """All structures learned up to and including this step, in channel order."""
    source: str
    """Name of this step's data set."""
    cases: tuple[str, ...] = ()
    """Ids of this step's training cases."""
    validation: tuple[str, ...] = ()
    """Ids of this step's validation cases; see `Phase.validations`."""
    past: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Earlier step → ids of its training cases; `extra_cases` may name them only where
    `Declaration.past` is `cases` or `images`."""
    voxels: int = 0
    """Voxels of this step's training cases together, model grid; known while the step is taught."""
    again: tuple[str, ...] = ()
    """Structures of earlier steps that this step teaches again, from another source. Their labels
    are known, as of every structure that the step's cases show."""

    @property
    def taught(self) -> tuple[str, ...]:
        """Structures that this step teaches, new and again."""
        return (*self.again, *self.learns)

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
    """A stretch of training with an optimizer and a learning-rate schedule of its own."""

    name: str = "train"
    """Name for records; part of the seed of every crop, so equal names see equal crops."""
    effort: float = 1.0
    """Factor on the profile's updates per epoch."""
    lr: float = 1.0
    """Factor on the profile's learning rate."""
    epochs: int | None = None
    """Number of epochs; None: the profile's."""
    constant: bool = False
    """One learning rate throughout, instead of warm-up and cosine."""
    validations: int = 0
    """After each of this many last epochs, the served model is measured on the validation cases; a
    step without any is then an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseResult:
    """A phase that has ended."""

    phase: Phase
    """The phase, as `next_phase` returned it."""
    validation: tuple[float, ...] = ()
    """Mean Dice of the structures first taught in this step, model grid, one per measurement; nan
    where no validation case holds any of them."""


DrawBatches = Callable[[int], Iterator[Batch]]
"""n → n batches of this step's own training crops, the same ones at every call."""
Draws = DrawBatches  # its name in 0.1.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters trained together. Parameters in no group are frozen."""

    parameters: list[nn.Parameter]
    """Parameters of the model, each in one group alone."""
    lr: float = 1.0
    """Factor on the phase's learning rate."""


class Predictor(Protocol):
    """The model served after the previous step, asked for whole volumes by sliding windows."""

    structures: tuple[str, ...]
    """Names of the K_old channels of `probabilities`."""

    def probabilities(self, volume: Volume) -> Iterator[tuple[int, int, Tensor]]:
        """What the model predicts, decoded by `Strategy.decode`.

        Yields:
            (start, stop, p): slices start to stop along axis 0, in order and without gaps, and
            p (K_old, stop - start, H, W) float32 on the CPU, 0 outside `Strategy.axial_ranges`.
        """
        ...

    def logits(self, volume: Volume) -> Iterator[tuple[int, int, Tensor]]:
        """The same before decoding: (start, stop, (C, stop - start, H, W) float32 logits)."""
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
        """Put the parts together, as a run does from its profile.

        Args:
            backbone: makes a backbone of the profile's size.
            encode: n names → (n, 512) float32 text vectors.
            seed: of the run.
            prior: see the attribute.
        """
        self._backbone = backbone
        self._encode = encode
        self.seed = seed
        """Seed of the run."""
        self.prior = prior
        """Probability in (0, 1) that a new structure's channel starts with in every voxel; None: as
        torch initialises. For `Segmenter.add`."""

    def backbone(self) -> nn.Module:
        """A new backbone on the CPU (see `clbench.nets.backbones`): (B, 1, D, H, W) → named maps.

        Initialised from the global random state; call it inside `fresh`.
        """
        return self._backbone()

    def encoding(self, structures: Sequence[str]) -> Tensor:
        """(len(structures), 512) float32 text vectors on the CPU, in the order asked for."""
        return self._encode(structures)

    def generator(self, step: int, name: str) -> torch.Generator:
        """A new CPU generator that depends on the run's seed, step and name alone.

        Args:
            step: 1-based step.
            name: of the strategy's choosing; another name, other numbers.
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, step, name))

    @contextmanager
    def fresh(self, step: int, name: str) -> Iterator[None]:
        """In this block the CPU's global random state follows from (seed, step, name) alone.

        Initialise layers in it; afterwards the random state is what it was.

        Args:
            step: 1-based step.
            name: of the strategy's choosing; another name, other numbers.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, step, name))
            yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """What a method promises. The runner acts on it; `clbench check strategy` tests it."""

    past: Literal["nothing", "weights", "predictions", "cases", "images"] = "weights"
    """What it needs of earlier steps; the runner opens nothing more.

    `nothing`: no old model to start from or to ask, an empty memory; `weights`: the old model;
    `predictions`: the old model, for what it predicts on this step's cases; `cases`: also training
    cases that it stores, each one in every step until it is dropped for good; `images`: also any
    training case of an earlier step.
    """
    starts_from: Literal["previous", "scratch"] = "previous"
    """The model a step starts with: the previous step's, grown, or a new one."""
    unlabelled: Literal["ignore", "background"] = "ignore"
    """How the losses treat voxels of old structures that are neither annotated nor predicted: left
    out, or background. Those that the step teaches again are always left out."""
    keeps_old_logits: bool = True
    """Growing a model changes no logit of a structure learned before."""
    penalties: tuple[str, ...] = ()
    """Names of the loss terms that tie the new model to the old one: from step 2 on above 0, with a
    gradient, wherever the two differ."""
    resumes: Literal["update", "step"] = "update"
    """Where a stopped run can go on: after any update, or at the start of the step alone."""


DECLARED = frozenset(f.name for f in fields(Declaration))


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A continual-learning method. Override what differs.

    Subclasses are frozen dataclasses; their fields are hyperparameters (`--set strategy.x=…`).
    `build`, `grow` and `losses` have to be there; every other hook has a plain default.
    """

    version: ClassVar[int] = 1
    """Raised when the same settings give other numbers: older runs are left, and not gone on with
    or reused. (A default that changes is no new setting to them.)"""
    step1_version: ClassVar[int | None] = None
    """Of step 1 alone, where a later `version` left its numbers as they were; None: as `version`.
    Holds for the class that sets it, and not for its subclasses."""
    serves_from: ClassVar[int | None] = None
    """The oldest version whose trained models this one builds, serves and decodes as they were;
    None: `version` alone. Set it in the class that raises `version`."""
    earlier_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {}
    """Older version → its defaults of options that are new or have another default since; with them
    this version teaches as that one did. A version that is not here cannot be repeated. Set it in
    the class that raises `version`."""
    search_space: ClassVar[SearchSpace] = {"train.lr": Range(low=1e-5, high=1e-2, log=True)}
    """What `clbench tune` tries, and within which bounds: name of a field, or `group.name` of the
    profile, → `Range` or `Choice`. A class names its own alone: those of the classes it inherits
    from are added, and None takes one away."""
    unlabelled: Literal["ignore", "background"] = "ignore"
    """How the losses treat voxels of old structures without annotation; see `Declaration`."""

    def declares(self) -> Declaration:
        """What the method promises, computed from its options. Override to promise otherwise.

        *Called* whenever runner, honesty kit or cost model ask for `declaration`; it must depend on
        the options alone. Extend what the parent class promises:
        `return replace(super().declares(), past="images")`.

        Returns:
            By default: the options and class attributes that bear a field's name, the other fields
            as `Declaration` has them.
        """
        return Declaration(**{n: getattr(self, n) for n in DECLARED if hasattr(self, n)})

    @property
    def declaration(self) -> Declaration:
        """What everybody else reads: `declares`, and the class attributes that clbench 0.1.0 knew.

        Up to 0.1.0 a class declared by attributes (`past = "images"`). Where a subclass of a
        method that overrides `declares` still does, its attribute holds: the nearer class decides.
        A class that overrides `declares` below such attributes has to promise them itself.
        """
        by_attribute = set[str]()
        for kind in type(self).__mro__:
            if "declares" in vars(kind):
                break
            by_attribute.update(DECLARED & vars(kind).keys())
        return replace(self.declares(), **{name: getattr(self, name) for name in by_attribute})

    @classmethod
    def serves(cls, version: int) -> bool:
        """Whether a model that a version of this method trained is served as it was.

        Args:
            version: of the run that trained it.
        """
        raised = next(kind for kind in cls.__mro__ if "version" in vars(kind))
        oldest: int | None = vars(raised).get("serves_from")
        return (cls.version if oldest is None else oldest) <= version <= cls.version

    @classmethod
    def defaults_of(cls, version: int) -> Mapping[str, Any] | None:
        """Defaults that a version of this method had and this one has not.

        Args:
            version: of a run.

        Returns:
            Option → value; None where this version cannot teach as that one did.
        """
        raised = next(kind for kind in cls.__mro__ if "version" in vars(kind))
        earlier: Mapping[int, Mapping[str, Any]] = vars(raised).get("earlier_defaults", {})
        return {} if version == cls.version else earlier.get(version)

    def first_step(self) -> Strategy:
        """The plain strategy whose step 1 equals this one's, so that it is trained once and shared.

        *Called* before a run, and by the cost model.

        Returns:
            A strategy whose hooks teach step 1 in place of this one's: with the same network, and
            with none of the options that make no difference in step 1.
        """
        return self

    def idle_options(self) -> tuple[str, ...]:
        """Names of options that nothing reads beside the others, and that are not worth tuning.

        *Called* before a strategy is tuned. A strategy that names any refuses other values of
        them when it is made.
        """
        return ()

    def refuse_course(self, steps: Sequence[Lesson], kit: Kit) -> None:
        """Refuse a course that this method cannot teach to its end, before step 1 is taught.

        *Called* once whenever a run starts or goes on, before a case is read for it.

        Args:
            steps: the steps that are taught; their `voxels` are not known yet.
            kit: as for `build`; draw from it inside `fresh` alone.

        Raises:
            ClbenchError: it cannot; says why.
        """

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """Make the model of step 1.

        *Called* before step 1, before every step if a step starts from `scratch`, and to load a
        checkpoint (followed by `grow` for every later step, so both must give the same shapes).

        Args:
            kit: backbone, text vectors, random numbers; layers are made inside `kit.fresh`.
            step: step 1.

        Returns:
            A model on the CPU: (B, 1, D, H, W) float32 → `Output` with logits (B, C, D, H, W).
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its model is built")

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """Add what the new structures need.

        *Called* before each step from the second on that has new structures, once per step also
        when a checkpoint is loaded: what it adds may depend on arguments and options alone.

        Args:
            model: as trained in the step before; on any device, new layers go to the same.
            kit: as for `build`.
            step: the step that begins; `step.learns` are the new structures.

        May change: the model, in place. Where `keeps_old_logits` is declared, no logit of an old
        structure.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its model grows")

    def takes_teacher(self, step: Lesson) -> bool:
        """Whether the losses need the old model's output on every batch.

        *Called* before a step is taught and by the cost model.

        Args:
            step: any step; in step 1 there is no old model, whatever is returned.

        Returns:
            True: `losses` gets `old`, at the cost of one more forward pass per update.
        """
        return False

    def prepares(self, step: Lesson) -> bool:
        """Whether `prepare_case` has work to do in this step.

        *Called* before a step is taught and by the cost model.

        Args:
            step: any step.

        Returns:
            False: no case is opened for it, and `prepare` gets an empty mapping.
        """
        return False

    def prepare_case(self, step: Lesson, volume: Volume, old: Predictor | None) -> CaseTensors:
        """Offline work for one training case, such as pseudo labels; kept when a run is stopped.

        *Called* once per training case of the step, before training, where `prepares`.

        Args:
            step: the step that begins.
            volume: the whole case, (D, H, W), with the labels this step may see; read-only.
            old: the model served after the step before; None in step 1.

        Returns:
            Name → CPU tensor of any shape. `pseudo`, if there, is (K_old, D, H, W) uint8 as in
            `Batch.pseudo`: cut with every crop, it becomes that field. The others go to `prepare`.
        """
        return {}

    def store_cases(self, step: Lesson, kit: Kit, memory: Memory) -> Sequence[tuple[int, str]]:
        """Choose which training cases to store, where `past` is `cases`.

        *Called* once per step from the second on, before the first `prepare_case`; once more when
        a stopped step goes on, with the memory as the step before left it.

        Args:
            step: the step that begins; `step.past` lists the cases that exist.
            kit: gives seeded random numbers.
            memory: the strategy's memory.

        Returns:
            (earlier step, case id) of the cases that `prepare_stored` is called for.

        May change: memory.
        """
        return ()

    def prepare_stored(self, step: Lesson, volume: Volume, old: Predictor) -> Mapping[str, Tensor]:
        """Offline work for one stored case, such as the old model's logits; kept when stopped.

        *Called* once for every case that `store_cases` named.

        Args:
            step: the step that begins.
            volume: the whole case, (D, H, W), with the labels its own step showed; read-only.
            old: the model served after the step before.

        Returns:
            Name → CPU tensor of any shape; `prepare` gets them as those of the case "step/case id".
        """
        return {}

    def prepare(self, step: Lesson, per_case: Mapping[str, CaseTensors], memory: Memory) -> None:
        """Sum up what was prepared over the cases of the step.

        *Called* once per step, after every `prepare_case` and `prepare_stored`, before training;
        once more when a stopped step goes on.

        Args:
            step: the step that begins.
            per_case: case id → what `prepare_case` returned, without `pseudo`; "step/case id" →
                what `prepare_stored` returned.
            memory: the strategy's memory.

        May change: memory.
        """

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        """Training cases of earlier steps to train on, where `past` is `cases` or `images`.

        *Called* once per step, after `prepare`.

        Args:
            step: the step that begins; `step.past` lists the cases that exist.
            memory: the strategy's memory; must not change here.

        Returns:
            (earlier step, case id) → weight. Crops are drawn in proportion, this step's own cases
            weighing 1 together. A case of weight 0 is opened for the strategy's session, and not
            drawn by the loop.
        """
        return {}

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """The parameters to train; all others are frozen.

        *Called* at the start of every phase, after `enter_phase`.

        Args:
            model: the model in training, on the run's device.
            step: the step.
            memory: the strategy's memory; must not change here.

        Returns:
            Groups of parameters, each with its factor on the learning rate. Frozen parameters get
            neither gradient nor weight decay, and a module with nothing but frozen parameters works
            in evaluation mode.
        """
        return [Group(parameters=list(model.parameters()))]

    def session(self, context: PhaseContext) -> Session | None:
        """An object that takes part in every update of one phase, where hooks are not enough.

        *Called* at the start of every phase, after `groups`.

        Args:
            context: the phase with its model, teacher, optimizer and data.

        Returns:
            A `Session` that may replace the batches, add to the loss and change gradients; None:
            the plain one, which calls `losses`, `after_backward` and `after_update`.
        """
        return None

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """The loss of one update, as named terms.

        *Called* once per update, inside the loop's autocast.

        Args:
            batch: the crops.
            new: the model's output on `batch.image`: logits (B, C, D, H, W), with gradient.
            old: the teacher's on the same crops, logits (B, C_old, D, H, W), without gradient; None
                unless `takes_teacher`, and in step 1.
            memory: the strategy's memory.

        Returns:
            Name → scalar; at least one. The loop adds them up, stops at a term that is not finite
            and logs each by its name. Labels that are `UNKNOWN` must not matter.

        May change: memory; neither batch nor outputs.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it minimises")

    def after_backward(self, model: nn.Module, memory: Memory) -> None:
        """Change the gradients of an update.

        *Called* once per update, after the backward pass; gradients are unscaled, not yet clipped.

        Args:
            model: the model in training; frozen parameters have `grad` None.
            memory: the strategy's memory.

        May change: gradients in place, memory.
        """

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        """Change weights after an update.

        *Called* once per update, after the optimizer's step.

        Args:
            model: the model in training.
            memory: the strategy's memory.

        May change: weights in place (under `torch.no_grad()`), memory.
        """

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        """The next phase of a step.

        *Called* before the first phase of a step and after each.

        Args:
            step: the step.
            memory: the strategy's memory; must not change here.
            history: the phases of this step that have ended, in order, with what validation gave.

        Returns:
            The phase to train; None ends the step. By default one phase as the profile says.
        """
        return None if history else Phase()

    def enter_phase(self, phase: Phase, model: nn.Module, memory: Memory) -> None:
        """Bring the model to where a phase starts.

        *Called* at the start of every phase, before `groups`.

        Args:
            phase: what `next_phase` returned.
            model: the model in training, on the run's device.
            memory: the strategy's memory.

        May change: weights in place, memory.
        """

    def finish(self, step: Lesson, model: nn.Module, draws: DrawBatches, memory: Memory) -> None:
        """Work after the last phase of a step, such as measuring how much each weight matters.

        *Called* once per step, before the model is saved, served and examined.

        Args:
            step: the step that ends.
            model: the trained model, in training mode.
            draws: `draws(n)` gives n batches of this step's own training crops.
            memory: the strategy's memory.

        May change: weights in place, memory.
        """

    def serve(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The model to examine, to validate, and to teach the next step.

        *Called* after every step, and wherever a phase is validated.

        Args:
            model: the model in training; training goes on with it, so it must not change.
            memory: the strategy's memory; must not change here.

        Returns:
            `model` itself, or a copy with other weights.
        """
        return model

    def published(self, memory: Memory) -> Memory:
        """The part of the memory that may leave with a published model.

        *Called* when a run's model is exported.

        Args:
            memory: the strategy's memory; must not change here.

        Returns:
            All of it by default. What shows single patients, such as stored predictions of their
            images, has to be left out; what `serve`, `decode` and `axial_ranges` read has to stay.
        """
        return memory

    def prunes(self, model: nn.Module) -> int:
        """How many weights the method sets to zero at the most.

        *Called* by the cost model.

        Args:
            model: a model of any step.

        Returns:
            A number of parameters of `model`.
        """
        return 0

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """Turn the model's logits into one probability per structure.

        *Called* for every slab of a volume, in examination, validation and for pseudo labels; slab
        by slab must give what the whole volume gives.

        Args:
            logits: (B, C, D, H, W) float32.
            structures: the K names the model answers for, in channel order.

        Returns:
            (B, K, D, H, W) in [0, 1]; above 0.5 is foreground.
        """
        return torch.sigmoid(logits)

    def axial_ranges(
        self,
        image_hu: NDArray[np.int16],
        spacing_mm: tuple[float, float, float],
        structures: tuple[str, ...],
        memory: Memory,
    ) -> Mapping[str, tuple[int, int]]:
        """Where along the body a structure may be; outside, its probability is 0.

        *Called* once per whole volume, in examination, validation and for pseudo labels.

        Args:
            image_hu: (D, H, W) the volume, read-only; axis 2 grows towards the head.
            spacing_mm: its voxel size.
            structures: those the model answers for.
            memory: the strategy's memory; must not change here.

        Returns:
            Structure → (start, stop) on axis 2; structures not named are not limited.
        """
        return {}


# --------------------------------------------------------------------------------------------------
# What happens around each update of a phase: by default, the hooks of the strategy. A method that
# must see the optimizer, draw crops of its own or replace the batches brings a session of its own
# (`Strategy.session`); the loop, its phases and its schedule stay the same.


class CutCrop(Protocol):
    """Cuts crops for a session; each depends on seed, step, phase, case and place alone."""

    def __call__(
        self,
        case: Volume | tuple[int, str],
        place: Sequence[object],
        beside: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Cut a crop, augmented as the loop's own are.

        Args:
            case: (step, name) as the step may draw it, or a volume at hand.
            place: numbers and names of the session's choosing; another place, another crop.
            beside: (C, D, H, W) CPU tensor on the grid of the whole case, such as stored logits;
                cut and turned with the crop, 0 in padding.

        Returns:
            image (1, *patch), label (K, *patch), and where `beside` is given its crop (C, *patch).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PhaseContext:
    """One phase of training: what its session works with."""

    strategy: Strategy
    """The method."""
    model: nn.Module
    """The model in training: (B, 1, D, H, W) → `Output`."""
    teacher: nn.Module | None
    """The model served after the previous step, frozen, where the strategy takes it."""
    optimizer: torch.optim.Optimizer
    """The optimizer; the loop sets its learning rates before every update."""
    lesson: Lesson
    """The step."""
    phase: Phase
    """The phase."""
    memory: Memory
    """The strategy's memory; saved with every checkpoint."""
    epochs: int
    """Epochs of the phase."""
    updates: int
    """Updates per epoch."""
    batch: int
    """Crops per update, on all devices together."""
    seed: int
    """Seed of the run."""
    device: torch.device
    """The device to compute on."""
    draw: CutCrop
    """Cuts a crop of a case that this step may open."""
    validation: Callable[[str], Volume] | None = None
    """Opens a validation case of this step."""
    done: int = 0
    """Updates of the phase that an earlier attempt has done."""


# their names in 0.1.0
Desk = PhaseContext
Draw = CutCrop


class Session:
    """What happens in each update of a phase; this one calls the hooks of the strategy.

    For every update the loop calls, in this order: next of `batches`, `terms`, `after_backward`,
    `before_update`, `after_update`. A subclass may add to each. `terms` is called once for each
    shard of an update that this process computes (`clbench.strategy.sharding`).
    """

    def __init__(self, context: PhaseContext) -> None:
        """Take part in one phase.

        Args:
            context: the phase with its model, teacher, optimizer and data.
        """
        self.context = context

    @property
    def desk(self) -> PhaseContext:
        """`context` by its name in 0.1.0."""
        return self.context

    def batches(self, own: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of the phase, one per update that is still to do.

        Args:
            own: those the loop draws; not drawn where nobody asks for them. Where a subclass
                overrides this, they hold the crops of all processes, and so must what it yields:
                the loop takes this process's.
        """
        return own

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward pass and loss, inside the loop's autocast.

        Returns:
            Name → scalar, as `Strategy.losses`.
        """
        context = self.context
        new: Output = context.model(batch.image)
        old: Output | None = None
        if context.teacher is not None:
            with torch.no_grad():
                old = context.teacher(batch.image)
        return context.strategy.losses(batch, new, old, context.memory)

    def count(self, batch: Batch) -> None:
        """What `terms` computes, for the counts that it divides by, ahead of it.

        *Called* without gradient, where batches are accumulated, once per batch of an update before
        the first `terms`; the model then answers zeros, and the memory is put back afterwards.
        Override it where `terms` must not run twice.
        """
        self.terms(batch)

    def after_backward(self) -> None:
        """After the backward pass: gradients are unscaled, and may be clipped next."""
        self.context.strategy.after_backward(self.context.model, self.context.memory)

    def before_update(self) -> None:
        """Before the optimizer's step: gradients are final."""

    def after_update(self) -> None:
        """After the optimizer's step: the weights have changed."""
        self.context.strategy.after_update(self.context.model, self.context.memory)
