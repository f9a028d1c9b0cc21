"""What a run is, decided before anything is taught: names resolved, data found, identity fixed.

The identity (benchmark and version, strategy and hyperparameters, profile, data
fingerprint, splits, seed, numerics) makes the run id: equal settings lead to the same folder. Host,
device, threads and git commit are recorded, but are not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import clbench
from clbench.data.cache import default_root
from clbench.data.catalog import Catalog, build_catalog
from clbench.errors import SettingError
from clbench.nets.backbones import Backbone
from clbench.nets.pretrained import WeightReport, load_weights
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.names import need_name
from clbench.spec.settings import Profile, apply_overrides, change, load_profile, split_overrides
from clbench.spec.splits import Split
from clbench.store import run_folder
from clbench.store.files import sha256
from clbench.strategy.contract import Kit, Lesson, Strategy


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the command line asks for."""

    bench: str
    """Registered benchmark, or path of a TOML file."""
    strategy: str
    """Registered strategy."""
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
    workers: int = 0
    """Loader processes."""
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


@dataclass(kw_only=True)
class Plan:
    """Everything decided before anything is taught."""

    settings: RunSettings
    benchmark: Benchmark
    profile: Profile
    strategy: Strategy
    strategy_name: str
    catalog: Catalog
    kit: Kit
    text_record: dict[str, Any]
    weights: WeightReport | None
    device: torch.device
    folder: Path
    shared: Path
    identity: dict[str, Any]

    def lesson(self, number: int) -> Lesson:
        """The 1-based step as a strategy sees it."""
        step = self.benchmark.steps[number - 1]
        return Lesson(
            number=number,
            learns=step.learns,
            structures=self.benchmark.structures(number),
            source=step.source,
            cases=self.catalog.splits[number - 1].train,
            validation=self.catalog.splits[number - 1].validation,
            past={i: self.catalog.splits[i - 1].train for i in range(1, number)},
        )


def load_strategy(name: str, overrides: Mapping[str, Any]) -> Strategy:
    """The registered strategy, or that of `module:Class`, with its hyperparameters changed."""
    if ":" in name:
        found: Strategy = registry.load("resolver", "module")(name, overrides)
        return found
    made: Strategy = change(registry.load("strategy", name)(), overrides, "strategy")
    return made


def pick_device(name: str) -> torch.device:
    """`auto` takes the first GPU, or the CPU.

    Raises:
        SettingError: a device that does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(
            "unknown device", where="--device", expected="auto, cpu, cuda, cuda:0, …", got=name
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(
            "no CUDA device is visible", where="--device", got=name, next_step="use --device cpu"
        )
    return device


def _describe(strategy: Strategy) -> dict[str, Any]:
    """What a run id knows of a strategy."""
    own = {"version": strategy.version} if strategy.version != 1 else {}
    return {"class": type(strategy).__name__, **own, **sparse(strategy)}


def sparse(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, groups likewise.

    So a setting that a later version adds, with a default that changes nothing, changes no run id.
    A default that changes moves numbers, and raises `numerics`, or the version of its strategy.
    """
    found: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            if inner := sparse(value):
                found[f.name] = inner
        elif f.default is dataclasses.MISSING or value != f.default:
            found[f.name] = value
    return found


def make_plan(
    settings: RunSettings,
    *,
    benchmark: Benchmark | None = None,
    strategy: Strategy | None = None,
) -> Plan:
    """Resolve names, find data, fix the run's identity. Trains nothing, writes no run folder.

    Args:
        settings: what is asked for.
        benchmark: stands in for the registered one, for those who have the object at hand.
        strategy: the same.
    """
    overrides = split_overrides(list(settings.overrides))
    if benchmark is None:
        benchmark = registry.benchmark(settings.bench)
    name = settings.profile or ("quick" if settings.data is None else "paper")
    profile = apply_overrides(load_profile(name), overrides)
    called = settings.strategy.replace(":", ".")  # `module:Class`, as a folder may be called
    need_name(called, "--strategy")
    if strategy is None:
        strategy = load_strategy(settings.strategy, overrides.get("strategy", {}))
    device = pick_device(settings.device)
    make_backbone = registry.load("backbone", profile.backbone.name)
    encoder = registry.load("encoding", profile.text.encoding)
    preprocessing = profile.preprocessing(benchmark.preprocessing)
    with torch.random.fork_rng(devices=[]):
        trial = make_backbone(profile.backbone.size)
    if isinstance(trial, Backbone):  # before anything is written, not in the first update
        trial.check(preprocessing.patch_vox, train=True)
    catalog = build_catalog(
        benchmark,
        preprocessing,
        data=settings.data,
        cache_root=settings.cache or default_root(),
        phantom=profile.phantom,
        splits=settings.splits,
    )
    catalog.past = strategy.declaration.past
    vectors = encoder(
        benchmark.structures(len(benchmark.steps)),
        prompt=profile.text.prompt,
        path=profile.text.path,
    )
    place = {n: i for i, n in enumerate(vectors.names)}

    weights = profile.backbone.weights
    mark = _file_hash(weights)
    report = load_weights(trial, Path(weights)) if weights else None
    del trial

    def backbone() -> nn.Module:
        made: nn.Module = make_backbone(profile.backbone.size)
        if weights is not None:
            load_weights(made, Path(weights))
        return made

    kit = Kit(
        backbone=backbone,
        encode=lambda names: torch.from_numpy(vectors.array[[place[n] for n in names]]),
        seed=settings.seed,
        prior=profile.train.prior,
    )
    groups = sparse(profile)
    if catalog.patients:
        groups.pop("phantom", None)  # has no influence on real data
    groups.pop("summary", None)
    groups.get("examine", {}).pop("trace_every", None)  # looks on, and moves no number
    if not groups.get("examine", True):
        del groups["examine"]
    splits = [dataclasses.asdict(s) for s in catalog.splits]
    identity = {
        "bench": benchmark.name,
        "bench_version": benchmark.version,
        "strategy": _describe(strategy),
        "profile": groups,
        "data_fingerprint": catalog.fingerprint,
        "splits": splits,
        "vectors": hashlib.sha256(vectors.array.tobytes()).hexdigest(),
        "weights": mark,
        "seed": settings.seed,
        "numerics": clbench.NUMERICS,
    }
    if registry.is_path(settings.bench):  # nobody guards the version of a file of one's own
        identity["course"] = benchmark.digest()
    first = {**identity, "strategy": _describe(strategy.first_step())}
    first["splits"] = splits[:1]
    base = settings.out / benchmark.name
    return Plan(
        settings=settings,
        benchmark=benchmark,
        profile=profile,
        strategy=strategy,
        strategy_name=called,
        catalog=catalog,
        kit=kit,
        text_record=dict(vectors.record),
        weights=report,
        device=device,
        folder=base / called / run_folder.run_id(identity),
        shared=base / "_shared" / run_folder.run_id(first),
        identity=identity,
    )


def _file_hash(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path)
    if not file.is_file():
        raise SettingError(
            "the file of backbone weights does not exist", where="backbone.weights", got=path
        )
    return sha256(file)
