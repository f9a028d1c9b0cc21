"""Profiles and `--set`: every number a run depends on, as data, typed, and overridable by name.

A profile is a TOML file in `clbench/spec/profiles/`; each of its tables is one
of the groups below. `--set group.name=value` changes one field; `strategy.name=value` reaches the
hyperparameters of the strategy.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import field, fields
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from clbench.errors import SettingError, closest, unknown_name
from clbench.spec.benchmark import Preprocessing
from clbench.spec.toml import read_toml
from clbench.spec.validation import CONFIG, Predicate, checked, from_toml, from_validation_error

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
LARGEST_SEED = 2**63 - 1
"""Tables hold seeds as 64-bit integers."""
Weights = Field(description="weights of at least 0, not all 0")


@checked(SettingError)
class DataSettings:
    """How volumes become crops. None means: as the benchmark says."""

    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Voxel size the network sees."""
    patch_vox: tuple[Count, Count, Count] | None = None
    """Training patch and sliding window."""
    window_hu: Annotated[
        tuple[float, float] | None,
        Predicate(lambda w: w is None or w[0] < w[1]),
        Field(description="two numbers: the lower end, then the upper"),
    ] = None
    """HU range mapped to [0, 1]."""
    sampling: Literal["posneg", "class_ratio"] = "posneg"
    """Crop centres: positive to negative, or background to organ to tumor."""
    posneg: Annotated[tuple[NotNegative, NotNegative], Predicate(any), Weights] = (2.0, 1.0)
    """Weights of positive and negative centres."""
    class_ratio: Annotated[
        tuple[NotNegative, NotNegative, NotNegative], Predicate(any), Weights
    ] = (1.0, 1.0, 5.0)
    """Weights of background, organ and tumor centres."""
    rotate90: Share = 0.1
    """Probability of a rotation by a multiple of 90 degrees in the axial plane."""
    shift_intensity: Share = 0.2
    """Probability of an intensity shift."""
    shift_range: NotNegative = 0.1
    """Largest shift, in units of the window."""
    expect_hu: bool = True
    """Refuse a source whose images are no CTs in HU, and warn of single ones. Without it values are
    taken as they are, rounded to whole numbers: 0 to 1 and z-scores need a `rescale` of the source,
    {slope = 1000}, and a `window_hu` to match. Changes no number and no run id."""


@checked(SettingError)
class BackboneSettings:
    """Which network."""

    name: str = "swin_unetr"
    """Registered backbone."""
    size: Count = 48
    """Feature size: channels at full resolution."""
    architecture: str | None = None
    """Of `nnunet`: JSON of its stages (`clbench/nets/nnunet.py`), as `clbench extend` reads it from
    nnU-Net's plans. None: as the backbone is by itself."""
    weights: str | None = None
    """File of weights to start from, .pt, .pth or .safetensors: a whole network in MONAI's own
    names, its encoder alone, or either within `state_dict` or `module.`. A file that sets less than
    90 % of a part that it names is refused."""


@checked(SettingError)
class TextSettings:
    """Which text encoding conditions the universal head."""

    encoding: str = "minilm"
    """Registered encoding."""
    prompt: Literal["v1", "v2", "v3"] = "v3"
    """Prompt of the paper's Table 7."""
    path: str | None = None
    """File of vectors, for encodings that read one."""
    declared: Literal["encoded", "random"] = "encoded"
    """Vectors of structures that a course declares itself: `random` draws each from its name, where
    the encoding has none (minilm); such a vector says nothing of the structure's meaning."""


@checked(SettingError)
class TrainSettings:
    """One step of teaching."""

    epochs: Count = 100
    """Epochs per step."""
    iterations: Count | None = None
    """Updates per epoch; None: each training case once."""
    batch: Count = 2
    """Crops computed at once."""
    accumulate: Count = 1
    """Batches per update: their gradients add up, in the memory of one batch, to that of one batch
    as large as all of them."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    weight_decay: NotNegative = 1e-5
    """AdamW weight decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's memory of squared gradients; shorter (0.98) suits runs of a few hundred updates."""
    warmup: NotNegativeInt = 15
    """Epochs of linear warm-up."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of the forward pass in training: float32, or autocast to bfloat16 or float16 (a GPU
    alone). Predictions are made in float32. `bf16` on a CPU makes runs of their own ids."""
    compile: bool = False
    """Train the network as torch.compile makes it, anew in every phase; moves losses by rounding.
    Not with accumulated batches; needs a compiler (on a GPU Triton)."""
    clip_norm: Positive | None = None
    """Largest gradient norm."""
    generator_lr: NotNegative = 1.0
    """Factor on the learning rate of what generates a head's weights (an MLP per structure). Under
    Adam one update moves each generated weight by up to the rate times the MLP's width, some
    hundred times as far as a plain weight; Yang et al., Tensor Programs V (2021), scale it so."""
    prior: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability with which every voxel of a new structure starts (Lin et al., ICCV 2017, section
    3.3); None: torch's initialisation, about 0.5, as the authors start."""

    @property
    def crops(self) -> int:
        """Crops per update."""
        return self.batch * self.accumulate


@checked(SettingError)
class ExamineSettings:
    """How a model is examined."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Overlap of neighbouring windows."""
    windows: Count | None = None
    """Windows per forward pass, and fewer where a GPU has no room for them; None: one on a CPU, on
    a GPU as many as fit, up to 8. Windows that share a pass move logits by rounding."""
    postprocess: bool = False
    """Apply the rules of the authors' pseudo-label code to the predictions."""
    trace_every: NotNegativeInt = 0
    """Updates between two looks at the validation cases of all steps so far (`trace.csv`, the
    stability gap); 0: none. Changes no number and no run id."""


@checked(SettingError)
class PhantomSettings:
    """The embedded phantom's size: cases per source and voxel size."""

    train: Count = 16
    """Training cases per source, of steps whose cases no split lists."""
    validation: NotNegativeInt = 4
    """Validation cases per source, of the same steps."""
    test: Count | None = None
    """Test cases per source, of the same steps; None: as many as the paper, those that the course
    lists for the phantom, else 20 per step."""
    spacing_mm: Positive = 5.0
    """Slice thickness of the coarser source; the tool derives the rest."""
    version: Annotated[int, Field(ge=2, le=3)] = 3
    """Of the phantom; 3 sets the second source of `tumor_ext` apart, as another hospital."""


@checked(SettingError)
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


GROUPS: dict[str, type[Any]] = {
    name: kind for name, kind in get_type_hints(Profile).items() if kind is not str
}
"""Name of a group of settings → its type."""


def change(target: T, values: Mapping[str, Any], where: str) -> T:
    """A copy of the dataclass `target` with typed changes.

    Args:
        target: a group of settings, or a strategy.
        values: field → TOML value, or word of the command line.
        where: the group's name.

    Raises:
        SettingError: an unknown field, or a wrong type or range.
    """
    hints = get_type_hints(type(target), include_extras=True)
    kinds = {f.name: hints[f.name] for f in fields(target) if f.init}  # type: ignore[arg-type]  # dataclasses only
    group = TypedDict(where, {n: NotRequired[k] for n, k in kinds.items()})  # type: ignore[misc]  # of this type
    # a field of a strategy may be of any type
    checks = TypeAdapter(with_config(CONFIG | {"arbitrary_types_allowed": True})(group))
    given = {
        n: _parse(v, kinds[n]) if isinstance(v, str) and n in kinds else v
        for n, v in values.items()
    }
    try:
        changes = checks.validate_python(given)
    except ValidationError as err:
        raise from_validation_error(
            err, checks, values, raised=SettingError, where="--set or profile", prefix=f"{where}."
        ) from None
    return dataclasses.replace(target, **changes)  # type: ignore[type-var]  # dataclasses only


def _parse(word: str, kind: Any) -> Any:
    """What a word stands for where the type does not say it to pydantic."""
    args, origin = get_args(kind), get_origin(kind)
    if origin in (Union, UnionType):
        if NoneType in args and word.lower() == "none":
            return None
        options = [a for a in args if a is not NoneType]
        if len(options) == 1:
            return _parse(word, options[0])
        with contextlib.suppress(ValueError):  # int | str: 7 is a number
            return json.loads(word)
    if origin is Annotated:
        return _parse(word, args[0])
    if origin is Literal:
        return next((a for a in args if str(a) == word), word)
    if origin is tuple:  # 3,3,3 or [3, 3, 3]
        return [w.strip().strip("\"'") for w in word.strip("[]() ").split(",")]
    return word


def described(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Name, default as `--set` takes it, and meaning of every field of a group of settings."""
    source = ast.parse(Path(inspect.getfile(kind)).read_text(encoding="utf-8"))
    body = next(
        n.body for n in source.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__
    )
    meanings = {
        one.target.id: " ".join(str(after.value.value).split())
        for one, after in itertools.pairwise(body)
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    for f in fields(kind):
        default = f.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        elif default is None or isinstance(default, bool):
            default = str(default).lower()
        yield f.name, str(default), meanings.get(f.name, "")


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
    return from_toml(Profile, {"name": name, **raw}, raised=SettingError, where=f"profile {name!r}")


def split_overrides(settings: list[str]) -> dict[str, dict[str, str]]:
    """`["train.lr=1e-3", "strategy.pseudo=soft"]` → {"train": {"lr": "1e-3"}, …}."""
    overrides: dict[str, dict[str, str]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        group, dot, name = key.partition(".")
        if not (equals and dot and group and name):
            raise SettingError(
                "--set needs group.name=value", got=setting, next_step="for example train.epochs=50"
            )
        if group != "strategy" and group not in GROUPS:
            guess = closest(group, [*GROUPS, "strategy"])
            raise SettingError(
                f"there is no group of settings called {group!r}",
                where=f"--set {setting}",
                expected=", ".join([*GROUPS, "strategy"]),
                next_step=f"did you mean {guess}.{name}?" if guess else None,
            )
        if name in overrides.setdefault(group, {}):
            raise SettingError(
                "a setting is given twice", where=f"--set {setting}", got=overrides[group][name]
            )
        overrides[group][name] = value
    return overrides


def refuse_idle(overrides: Mapping[str, Mapping[str, str]], profile: Profile) -> None:
    """Refuse changes that would be passed over beside the other settings.

    Those of the phantom are not refused beside real data: studies share settings among courses.

    Args:
        overrides: group → name → value, as `split_overrides` gives them.
        profile: with these changes.

    Raises:
        SettingError: a setting that nothing reads.
    """
    own, text = profile.data, profile.text
    without_prompt = text.encoding in ("onehot", "random") or (
        text.encoding == "clip" and text.path not in (None, "open_clip")
    )
    read_with = {
        "data.posneg": (own.sampling == "posneg", "--set data.sampling=posneg"),
        "data.class_ratio": (own.sampling == "class_ratio", "--set data.sampling=class_ratio"),
        "data.shift_range": (own.shift_intensity > 0, "--set data.shift_intensity=0.2"),
        "text.prompt": (not without_prompt, "--set text.encoding=minilm"),
    }
    for group, values in overrides.items():
        for name, value in values.items():
            is_read, beside = read_with.get(f"{group}.{name}", (True, ""))
            if not is_read:
                raise SettingError(
                    f"nothing reads {group}.{name} here",
                    where=f"--set {group}.{name}={value}",
                    expected=beside,
                    got=_read_in_place(profile, group),
                    next_step=f"add {beside}, or leave {group}.{name} out",
                )


def _read_in_place(profile: Profile, group: str) -> str:
    """What decides that another setting of the group is not read."""
    own, text = profile.data, profile.text
    if group == "text":
        return f"text.encoding={text.encoding}, text.path={text.path or 'none'}"
    return f"data.sampling={own.sampling}, data.shift_intensity={own.shift_intensity:g}"


def apply_overrides(profile: Profile, overrides: Mapping[str, Mapping[str, str]]) -> Profile:
    """The profile with the overrides of every group but `strategy`."""
    groups = {
        group: change(getattr(profile, group), values, group)
        for group, values in overrides.items()
        if group != "strategy"
    }
    return dataclasses.replace(profile, **groups)
