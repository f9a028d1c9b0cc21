"""Profiles and `--set`: every number a run depends on, as data, typed, and overridable by name.

A profile is a TOML file in `clbench/spec/profiles/`; each of its tables is one
of the groups below. `--set group.name=value` changes one field; `strategy.name=value` reaches the
hyperparameters of the strategy.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, Literal, TypeVar, Union

from clbench.errors import SettingError, closest, unknown_name
from clbench.spec.benchmark import Preprocessing
from clbench.spec.toml import read_toml

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """How volumes become crops. None means: as the benchmark says."""

    spacing_mm: tuple[float, float, float] | None = None
    """Voxel size the network sees."""
    patch_vox: tuple[int, int, int] | None = None
    """Training patch and sliding window."""
    window_hu: tuple[float, float] | None = None
    """HU range mapped to [0, 1]."""
    sampling: Literal["posneg", "class_ratio"] = "posneg"
    """Crop centres: positive to negative, or background to organ to tumor."""
    posneg: tuple[float, float] = (2.0, 1.0)
    """Weights of positive and negative centres."""
    class_ratio: tuple[float, float, float] = (1.0, 1.0, 5.0)
    """Weights of background, organ and tumor centres."""
    rotate90: float = 0.1
    """Probability of a rotation by a multiple of 90 degrees in the axial plane."""
    shift_intensity: float = 0.2
    """Probability of an intensity shift."""
    shift_range: float = 0.1
    """Largest shift, in units of the window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSettings:
    """Which network."""

    name: str = "swin_unetr"
    """Registered backbone."""
    size: int = 48
    """Feature size: channels at full resolution."""
    weights: str | None = None
    """File of self-supervised weights to start from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """Which text encoding conditions the universal head."""

    encoding: str = "minilm"
    """Registered encoding."""
    prompt: Literal["v1", "v2", "v3"] = "v3"
    """Prompt of the paper's Table 7."""
    path: str | None = None
    """File of vectors, for encodings that read one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """One step of teaching."""

    epochs: int = 100
    """Epochs per step."""
    iterations: int | None = None
    """Updates per epoch; None: each training case once."""
    batch: int = 2
    """Crops per update."""
    lr: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """AdamW weight decay."""
    beta2: float = 0.999
    """AdamW's memory of squared gradients; shorter (0.98) suits runs of a few hundred updates."""
    warmup: int = 15
    """Epochs of linear warm-up."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast on CUDA; the CPU always computes in float32."""
    clip_norm: float | None = None
    """Largest gradient norm."""
    generator_lr: float = 1.0
    """Factor on the learning rate of what generates a head's weights (an MLP per structure). Under
    Adam one update moves each generated weight by up to the rate times the MLP's width, some
    hundred times as far as a plain weight; Yang et al., Tensor Programs V (2021), scale it so."""
    prior: float | None = None
    """Probability with which every voxel of a new structure starts (Lin et al., ICCV 2017, section
    3.3); None: torch's initialisation, about 0.5, as the authors start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamineSettings:
    """How a model is examined."""

    overlap: float = 0.5
    """Overlap of neighbouring windows."""
    windows: int = 1
    """Windows per forward pass."""
    postprocess: bool = False
    """Apply the rules of the authors' pseudo-label code to the predictions."""
    trace_every: int = 0
    """Updates between two looks at the validation cases of all steps so far (`trace.csv`, the
    stability gap); 0: none. Changes no number and no run id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomSettings:
    """The embedded phantom's size: cases per source and voxel size."""

    train: int = 16
    """Training cases per source."""
    validation: int = 4
    """Validation cases per source."""
    test: int = 8
    """Test cases per source."""
    spacing_mm: float = 5.0
    """Slice thickness of the coarser source; the tool derives the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All groups of settings."""

    name: str
    """Name for `--profile`."""
    summary: str = ""
    """One line for `clbench list`."""
    data: DataSettings = field(default_factory=DataSettings)
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    text: TextSettings = field(default_factory=TextSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    examine: ExamineSettings = field(default_factory=ExamineSettings)
    phantom: PhantomSettings = field(default_factory=PhantomSettings)

    def preprocessing(self, plan: Preprocessing) -> Preprocessing:
        """The benchmark's preprocessing with this profile's changes."""
        changes = {
            name: value
            for name in ("spacing_mm", "patch_vox", "window_hu")
            if (value := getattr(self.data, name)) is not None
        }
        return dataclasses.replace(plan, **changes)


_POSITIVE = (lambda v: v > 0, "above 0")
_COUNT = (lambda v: v >= 1, "at least 1")
_NATURAL = (lambda v: v >= 0, "at least 0")
_SHARE = (lambda v: 0 <= v <= 1, "from 0 to 1")
_WEIGHTS = (lambda v: min(v) >= 0 < sum(v), "weights of at least 0, not all 0")
BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.spacing_mm": (lambda v: min(v) > 0, "three lengths above 0"),
    "data.patch_vox": (lambda v: min(v) >= 1, "three sizes of at least 1"),
    "data.window_hu": (lambda v: v[0] < v[1], "the lower end, then the upper"),
    "data.posneg": _WEIGHTS,
    "data.class_ratio": _WEIGHTS,
    "data.rotate90": _SHARE,
    "data.shift_intensity": _SHARE,
    "data.shift_range": _NATURAL,
    "backbone.size": _COUNT,
    "train.epochs": _COUNT,
    "train.iterations": _COUNT,
    "train.batch": _COUNT,
    "train.lr": _POSITIVE,
    "train.generator_lr": _NATURAL,
    "train.weight_decay": _NATURAL,
    "train.beta2": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train.warmup": _NATURAL,
    "train.clip_norm": _POSITIVE,
    "train.prior": (lambda v: 0 < v < 1, "between 0 and 1"),
    "examine.overlap": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "examine.windows": _COUNT,
    "phantom.train": _COUNT,
    "phantom.validation": _NATURAL,
    "phantom.test": _COUNT,
    "phantom.spacing_mm": _POSITIVE,
}
"""Setting → what its value must be, and in words. None is never asked."""

GROUPS: dict[str, type[Any]] = {
    "data": DataSettings,
    "backbone": BackboneSettings,
    "text": TextSettings,
    "train": TrainSettings,
    "examine": ExamineSettings,
    "phantom": PhantomSettings,
}


def coerce(value: Any, kind: Any, where: str) -> Any:
    """Turn a TOML value or a word of the command line into the type of a field.

    Args:
        value: from TOML, or a word from the command line.
        kind: annotation of the field.
        where: the field, such as `train.lr`; named in the error.

    Raises:
        SettingError: with the type expected and the value found.
    """
    wrong = SettingError(
        "a setting has the wrong type", where=where, expected=_words(kind), got=repr(value)
    )
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if isinstance(value, str):  # a word of the command line may stand for a number
            value = next((a for a in args if str(a) == value), value)
        if value not in args:
            guess = closest(str(value), [str(a) for a in args])
            raise SettingError(
                "a setting has a value that is not allowed",
                where=where,
                expected=_words(kind),
                got=repr(value),
                next_step=f"did you mean {guess!r}?" if guess else None,
            )
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise wrong
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(kinds):
            raise wrong
        return tuple(
            coerce(i.strip() if isinstance(i, str) else i, k, where)
            for i, k in zip(items, kinds, strict=True)
        )
    if kind is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise wrong
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        try:
            number = kind(value) if isinstance(value, str) else value
        except ValueError:
            raise wrong from None
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise wrong
        return kind(number)
    if kind is str and isinstance(value, str):
        return value
    raise wrong


def _words(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _words(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"{len(args)} values ({', '.join(_words(a) for a in args)})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        kind, str(kind)
    )


def change(target: T, values: Mapping[str, Any], where: str) -> T:
    """A copy of the dataclass `target` with typed changes; unknown names get did-you-mean.

    Args:
        target: instance of a dataclass; not changed.
        values: field → value from TOML or the command line.
        where: name of the group, such as `train`; named in errors.
    """
    hints = typing.get_type_hints(type(target))
    names = [f.name for f in fields(target) if f.init]  # type: ignore[arg-type]  # dataclasses only
    done: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            guess = closest(name, names)
            raise SettingError(
                f"there is no setting {where}.{name}",
                where="--set or profile",
                expected=f"one of {', '.join(f'{where}.{n}' for n in names)}",
                got=f"{where}.{name}",
                next_step=f"did you mean {where}.{guess}?" if guess else None,
            )
        made = coerce(value, hints[name], f"{where}.{name}")
        fits, words = BOUNDS.get(f"{where}.{name}", (None, ""))
        if fits is not None and made is not None and not fits(made):
            raise SettingError(
                "a setting is out of range", where=f"{where}.{name}", expected=words, got=made
            )
        done[name] = made
    return dataclasses.replace(target, **done)  # type: ignore[type-var]  # dataclasses only


def profile_names() -> list[str]:
    """The profiles that come with clbench."""
    folder = resources.files("clbench.spec.profiles")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".toml"))


def load_profile(name: str) -> Profile:
    """The profile called `name`."""
    names = profile_names()
    if name not in names:
        raise unknown_name("profile", name, names)
    with resources.as_file(resources.files("clbench.spec.profiles") / f"{name}.toml") as path:
        raw = read_toml(path)
    profile = Profile(name=name, summary=raw.pop("summary", ""))
    groups = {}
    for group, values in raw.items():
        if group not in GROUPS:
            raise SettingError(
                f"profile {name!r} has an unknown group {group!r}", expected=", ".join(GROUPS)
            )
        groups[group] = change(getattr(profile, group), values, group)
    return dataclasses.replace(profile, **groups)


def split_overrides(words: list[str]) -> dict[str, dict[str, str]]:
    """`["train.lr=1e-3", "strategy.pseudo=soft"]` → {"train": {"lr": "1e-3"}, …}."""
    found: dict[str, dict[str, str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        group, dot, name = key.partition(".")
        if not (equals and dot and group and name):
            raise SettingError(
                "--set needs group.name=value", got=word, next_step="for example train.epochs=50"
            )
        if group != "strategy" and group not in GROUPS:
            guess = closest(group, [*GROUPS, "strategy"])
            raise SettingError(
                f"there is no group of settings called {group!r}",
                where=f"--set {word}",
                expected=", ".join([*GROUPS, "strategy"]),
                next_step=f"did you mean {guess}.{name}?" if guess else None,
            )
        if name in found.setdefault(group, {}):
            raise SettingError(
                "a setting is given twice", where=f"--set {word}", got=found[group][name]
            )
        found[group][name] = value
    return found


def apply_overrides(profile: Profile, overrides: Mapping[str, Mapping[str, str]]) -> Profile:
    """The profile with the overrides of every group but `strategy`."""
    groups = {
        group: change(getattr(profile, group), values, group)
        for group, values in overrides.items()
        if group != "strategy"
    }
    return dataclasses.replace(profile, **groups)
