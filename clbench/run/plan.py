"""What a run is, decided before anything is taught: names resolved, data found, identity fixed.

The identity (benchmark and version, strategy and hyperparameters, profile, data
fingerprint, splits, seed, numerics) makes the run id: equal settings lead to the same folder. Host,
device, threads and git commit are recorded, but are not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clbench import reproducibility
from clbench.data.cache import default_root
from clbench.data.catalog import Catalog, Look, build_catalog
from clbench.errors import SettingError
from clbench.nets.backbones import Backbone, new_backbone
from clbench.nets.pretrained import WeightReport, load_weights
from clbench.nets.text_encodings import Vectors, encoded
from clbench.run import prepare
from clbench.run.identity import (
    course_identity,
    described,
    file_hash,
    first_step,
    numerics,
    sparse,
    step_identities,
)
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import need_name
from clbench.spec.settings import (
    LARGEST_SEED,
    Profile,
    apply_overrides,
    change,
    load_profile,
    refuse_idle,
    split_overrides,
)
from clbench.spec.splits import Split
from clbench.store import run_folder
from clbench.store.record import Identity
from clbench.strategy.contract import Kit, Lesson, Strategy
from clbench.training.ranks import Ranks
from clbench.training.update import divide


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the command line asks for."""

    bench: str
    """Registered benchmark, or path of a TOML file."""
    strategy: str
    """Registered strategy, `module:Class`, or head and parts (`universal+mbs`)."""
    seed: int = 0
    """Seed of initial weights, order and crops."""
    profile: str | None = None
    """None: `quick` on the phantom, `paper` on real data."""
    data: str | None = None
    """`name=PATH,…` or one folder; None: the phantom."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    """Source → split that replaces the benchmark's."""
    out: Path = Path("results")
    """Where run folders go."""
    overrides: tuple[str, ...] = ()
    """`group.name=value` words."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, …"""
    workers: int | None = None
    """Loader processes; None: none on a CPU, up to four on a GPU."""
    threads: int | None = None
    """CPU threads; None: all."""
    fresh: bool = False
    """Repeat a finished run."""
    keep_predictions: bool = True
    """Store the test predictions."""
    cache: Path | None = None
    """Where preprocessed volumes and the phantom are kept."""
    checkpoint_s: float = 300.0
    """Seconds between two savings within a step; 0: after every update."""
    deterministic: bool = False
    """On CUDA, operators that repeat to the bit, where there are any."""

    def __post_init__(self) -> None:
        if self.seed > LARGEST_SEED:
            raise SettingError(
                "a setting is out of range",
                where="--seed",
                expected=f"at most {LARGEST_SEED}",
                got=self.seed,
            )
        least = {"seed": 0, "workers": 0, "threads": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingError(
                    "a setting is out of range",
                    where=f"--{name}",
                    expected=f"a whole number of at least {low}",
                    got=value,
                )


def load_strategy(name: str, overrides: Mapping[str, Any]) -> Strategy:
    """The registered strategy, `module:Class` or `HEAD+PART`, with its hyperparameters changed."""
    for sign, resolver in ((":", "module"), ("+", "composition")):
        if sign in name:
            resolved: Strategy = registry.load("resolver", resolver)(name, overrides)
            return resolved
    strategy: Strategy = change(registry.load("strategy", name)(), overrides, "strategy")
    return strategy


def pick_device(name: str) -> torch.device:
    """`auto` takes the first GPU, or the CPU.

    Raises:
        SettingError: a device that does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = reproducibility.gpus()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        known = re.fullmatch(r"(cpu|cuda|mps|xpu|hpu|mtia|xla|ipu|meta|vulkan)(:\d+)?", name)
        raise SettingError(
            f"this torch cannot compute on {name}" if known else "unknown device",
            where="--device",
            expected=", ".join(["auto", *here]),
            got=f"{name} (torch {torch.__version__}, {count} CUDA devices visible)",
            next_step="use --device cpu" if not count else "use --device auto",
        )
    return torch.device(name)


@dataclass(kw_only=True)
class Plan:
    """Settings with every name resolved; data, vectors and weights are read when asked for."""

    settings: RunSettings
    """What was asked for."""
    benchmark: Benchmark
    """What is taught."""
    profile: Profile
    """With the changes of `--set`."""
    strategy: Strategy
    """With its hyperparameters."""
    strategy_name: str
    """As its folder is called."""
    device: torch.device
    """Where it computes."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that work on it together; recorded, and part of no id."""
    extends: dict[str, Any] | None = None
    """See `RunRecord.extends`."""
    tuned: dict[str, Any] | None = None
    """See `RunRecord.tuned`."""
    jobs: int | None = None
    """Processes that look at the cases, see `clbench.run.prepare.look`."""
    watch: Callable[[dict[str, Any]], None] = lambda event: None
    """Is told of every case that is looked at."""

    def open(self) -> Plan:
        """Read data, vectors and weights; fix the run's identity. Trains and writes nothing.

        Raises:
            ClbenchError: data, vectors or weights that cannot be read, or processes among which
                the crops of an update cannot be divided.
        """
        if self.ranks.size > 1:  # one alone is refused when it runs: status and plans go on
            divide(self.profile.train, self.ranks)
        _ = self.kit, self.weights  # wrong settings are refused before any image is hashed
        _ = self.identity, self.folder, self.steps
        return self

    @cached_property
    def catalog(self) -> Catalog:
        """The data, opened; the phantom is made where it is not there yet."""
        catalog = open_catalog(
            self.benchmark,
            self.profile,
            data=self.settings.data,
            splits=self.settings.splits,
            cache=self.settings.cache,
            expect_hu=self.profile.data.expect_hu,
            look=lambda cache, cases, what: self.ranks.by_first(
                lambda: prepare.look(cache, cases, what, jobs=self.jobs, watch=self.watch)
            ),
        )
        catalog.past = self.strategy.declaration.past
        return catalog

    @cached_property
    def vectors(self) -> Vectors:
        """A vector per structure of the course."""
        return encoded(self.benchmark.structures(len(self.benchmark.steps)), self.profile.text)

    @cached_property
    def weights(self) -> WeightReport | None:
        """What a file of weights sets, tried once: a wrong one is refused before the first step."""
        path = self.profile.backbone.weights
        if path is None:
            return None
        with torch.random.fork_rng(devices=[]):
            return load_weights(self.new_backbone(), Path(path).expanduser())

    @cached_property
    def kit(self) -> Kit:
        """What a strategy builds its models from."""
        vectors, weights = self.vectors, self.profile.backbone.weights
        place = {n: i for i, n in enumerate(vectors.names)}

        def backbone() -> nn.Module:
            network = self.new_backbone()
            if weights is not None:
                load_weights(network, Path(weights).expanduser())
            return network

        return Kit(
            backbone=backbone,
            encode=lambda names: torch.from_numpy(vectors.array[[place[n] for n in names]]),
            seed=self.settings.seed,
            prior=self.profile.train.prior,
        )

    @cached_property
    def identity(self) -> Identity:
        """What the run id is made from: everything that may move a number of the run.

        Host, device, threads and commit are recorded beside it, but are no part of it.
        """
        return Identity(
            **course_identity(self.settings.bench, self.benchmark, self.catalog)
            | {"numerics": numerics(self.profile)},
            strategy=described(self.strategy, self.strategy.version),
            profile=self.profile_settings(self.profile),
            vectors=hashlib.sha256(self.vectors.array.tobytes()).hexdigest(),
            weights=file_hash(self.profile.backbone.weights),
            seed=self.settings.seed,
        )

    def profile_settings(self, profile: Profile) -> dict[str, Any]:
        """What a run id knows of a profile, on the data of this plan."""
        groups = sparse(profile)
        if self.catalog.patients:
            groups.pop("phantom", None)  # has no influence on real data
        groups.pop("summary", None)
        # one looks on and one refuses: neither moves a number
        for group, name in (("examine", "trace_every"), ("data", "expect_hu")):
            groups.get(group, {}).pop(name, None)
            if not groups.get(group, True):
                del groups[group]
        return groups

    @cached_property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self._home / self.strategy_name / self.identity.run_id

    @cached_property
    def shared_step1(self) -> str:
        """Names the first step among runs that answer the same question."""
        return dataclasses.replace(
            self.identity,
            strategy=first_step(self.strategy),
            splits=self.identity.splits[:1],
            external_tests=(),
        ).run_id

    @cached_property
    def steps(self) -> tuple[Mapping[str, Any], ...]:
        """What each step depends on, see `clbench.run.identity`."""
        return step_identities(
            self.identity,
            benchmark=self.benchmark,
            catalog=self.catalog,
            profile=self.profile,
            strategy=self.strategy,
            vectors=self.vectors,
        )

    def step_folder(self, number: int) -> Path:
        """Where a 1-based step is taught; runs share it that agree in all that it depends on."""
        return self.settings.out / run_folder.SHARED / run_folder.run_id(self.steps[number - 1])

    def host(self) -> dict[str, str | int]:
        """What equal bits depend on besides the settings; processes where there are several."""
        several = {"processes": self.ranks.size} if self.ranks.size > 1 else {}
        return {**reproducibility.host(self.device), **several}

    @property
    def _home(self) -> Path:
        return self.settings.out / self.benchmark.name

    def new_backbone(self) -> nn.Module:
        """The network of the profile, as it is initialised, without weights from a file."""
        return new_backbone(self.profile.backbone)

    def lesson(self, number: int) -> Lesson:
        """The 1-based step as a strategy sees it."""
        step = self.benchmark.steps[number - 1]
        return Lesson(
            number=number,
            learns=step.learns,
            again=step.again,
            structures=self.benchmark.structures(number),
            source=step.source,
            cases=self.catalog.splits[number - 1].train,
            validation=self.catalog.splits[number - 1].validation,
            past={i: self.catalog.splits[i - 1].train for i in range(1, number)},
        )


def open_catalog(
    benchmark: Benchmark,
    profile: Profile,
    *,
    data: str | None,
    splits: Mapping[str, Split],
    cache: Path | None,
    expect_hu: bool | None = None,
    look: Look = prepare.look,
) -> Catalog:
    """The data of a benchmark, as a profile prepares it.

    Args:
        benchmark: names the sources.
        profile: gives the grid, and the size of the phantom.
        data: `name=PATH,…` or one folder; None: the phantom.
        splits: source or step → split that replaces the benchmark's.
        cache: where preprocessed volumes and the phantom are kept; None: the user's cache.
        expect_hu: see `build_catalog`; None: data that a run was made on.
        look: looks at cases before they are asked about.

    Raises:
        DataError: the data cannot be read.
    """
    return build_catalog(
        benchmark,
        profile.preprocessing(benchmark.preprocessing),
        data=data,
        cache_root=cache or default_root(),
        phantom=profile.phantom,
        splits=splits,
        expect_hu=expect_hu,
        look=look,
    )


def resolve_profile(
    name: str | None, overrides: Mapping[str, Mapping[str, str]], *, data: str | None
) -> Profile:
    """The profile called `name` with changes; None: `quick` on the phantom, `paper` on real data.

    Args:
        name: registered profile, or None.
        overrides: group → name → value, as `split_overrides` gives them.
        data: the data named on the command line; None: the phantom.
    """
    return apply_overrides(load_profile(name or ("quick" if data is None else "paper")), overrides)


def resolve(
    settings: RunSettings,
    *,
    benchmark: Benchmark | None = None,
    strategy: Strategy | None = None,
    profile: Profile | None = None,
) -> Plan:
    """Resolve every name, before an image is opened or a file is written.

    Args:
        settings: what is asked for.
        benchmark: stands in for the registered one, for those who have the object at hand.
        strategy: the same.
        profile: the same; it holds the changes of `settings.overrides` already.

    Raises:
        ClbenchError: an unknown name, a setting out of range, a device that is not there, a patch
            that the network cannot take.
    """
    overrides = split_overrides(list(settings.overrides))
    if benchmark is None:
        benchmark = registry.benchmark(settings.bench)
    if profile is None:
        profile = resolve_profile(settings.profile, overrides, data=settings.data)
        refuse_idle(overrides, profile)
    called = settings.strategy.replace(":", ".")  # `module:Class`, as a folder may be called
    need_name(called.lstrip("+"), "--strategy")  # a composition without a head says so itself
    if strategy is None:
        strategy = load_strategy(settings.strategy, overrides.get("strategy", {}))
        if "+" in called:
            called = type(strategy).__name__  # whatever the order of its parts
    plan = Plan(
        settings=settings,
        benchmark=benchmark,
        profile=profile,
        strategy=strategy,
        strategy_name=called,
        device=pick_device(settings.device),
    )
    registry.load("encoding", profile.text.encoding)
    with torch.random.fork_rng(devices=[]):
        trial = plan.new_backbone()
    if isinstance(trial, Backbone):  # before anything is written, not in the first update
        preprocessing = profile.preprocessing(benchmark.preprocessing)
        trial.check(preprocessing.patch_vox, train=True)
    return plan
