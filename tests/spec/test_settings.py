"""Settings: typed, overridable by name, with errors that help."""

import pickle
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pytest

from clbench.errors import SettingError, UnknownName
from clbench.run.identity import sparse
from clbench.spec.registry import benchmark
from clbench.spec.settings import (
    DataSettings,
    Profile,
    apply_overrides,
    change,
    load_profile,
    profile_names,
    refuse_idle,
    split_overrides,
)


def changed(word: str) -> object:
    group, _, rest = word.partition(".")
    profile = apply_overrides(load_profile("paper"), split_overrides([word]))
    return getattr(getattr(profile, group), rest.partition("=")[0])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("train.epochs=50", 50),
        ("train.lr=1e-3", 1e-3),
        ("train.iterations=none", None),
        ("train.iterations=7", 7),
        ("data.spacing_mm=2,2,3", (2.0, 2.0, 3.0)),
        ("data.spacing_mm=[2, 2, 3]", (2.0, 2.0, 3.0)),
        ("data.patch_vox=3,3,3", (3, 3, 3)),
        ("data.patch_vox=none", None),
        ("examine.postprocess=true", True),
        ("text.prompt=v1", "v1"),
        ("backbone.weights=a b.pt", "a b.pt"),
    ],
)
def test_words_of_the_command_line_get_their_type(word: str, value: object) -> None:
    assert changed(word) == value


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.epoch=5", "did you mean train.epochs?"),
        ("trian.epochs=5", "did you mean train.epochs?"),
        ("train.epochs=many", "a whole number"),
        ("train.epochs=1.5", "a whole number"),
        ("examine.postprocess=maybe", "true or false"),
        ("data.spacing_mm=1,2", "3 values"),
        ("text.prompt=v9", "v1, v2, v3"),
        ("epochs=5", "group.name=value"),
        ("train.lr=-1", "above 0"),
        ("train.lr=nan", "a number"),
        ("train.lr=inf", "a number"),
        ("train.epochs=0", "at least 1"),
        ("train.iterations=0", "at least 1"),
        ("train.batch=0", "at least 1"),
        ("train.prior=1", "above 0 and below 1"),
        ("data.spacing_mm=0,1,1", "above 0"),
        ("data.patch_vox=0,8,8", "at least 1"),
        ("data.window_hu=250,-175", "the lower end"),
        ("data.posneg=0,0", "not all 0"),
        ("data.rotate90=2", "at least 0 and at most 1"),
        ("examine.overlap=1", "below 1"),
        ("examine.windows=0", "at least 1"),
        ("phantom.test=0", "at least 1"),
    ],
)
def test_a_wrong_setting_says_what_is_right(word: str, says: str) -> None:
    with pytest.raises(SettingError) as err:
        changed(word)
    assert says in str(err.value)


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="twice"):
        split_overrides(["train.lr=1e-3", "train.epochs=2", "train.lr=1e-4"])


@pytest.mark.parametrize(
    ("words", "beside"),
    [
        ("data.class_ratio=1,1,9", "data.sampling=class_ratio"),
        ("data.sampling=class_ratio data.posneg=1,1", "data.sampling=posneg"),
        ("data.shift_intensity=0 data.shift_range=0.3", "data.shift_intensity=0.2"),
        ("text.encoding=onehot text.prompt=v1", "text.encoding=minilm"),
        ("text.encoding=clip text.path=a.pth text.prompt=v1", "text.encoding=minilm"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(words: str, beside: str) -> None:
    def refuse(said: list[str]) -> None:
        changes = split_overrides(said)
        refuse_idle(changes, apply_overrides(load_profile("paper"), changes))

    with pytest.raises(SettingError, match="nothing reads") as err:
        refuse(words.split())
    assert beside in str(err.value)
    advised = [w for w in words.split() if w.partition("=")[0] != beside.partition("=")[0]]
    refuse([w for w in advised if not w.startswith("text.path")] + [beside])


def test_a_wrong_setting_keeps_its_whole_range_its_value_and_a_guess() -> None:
    with pytest.raises(SettingError) as err:
        changed("examine.overlap=1")
    assert err.value.what == "examine.overlap must be a number at least 0 and below 1"
    assert err.value.fields() == {"where": "--set or profile", "got": "'1'"}
    with pytest.raises(SettingError) as err:
        changed("data.sampling=posnegs")
    assert err.value.next_step == "did you mean 'posneg'?"


def test_a_group_made_in_python_is_checked_too() -> None:
    assert DataSettings(spacing_mm=(1, 2, 3)).spacing_mm == (1.0, 2.0, 3.0)
    with pytest.raises(SettingError, match="lr must be a number above 0") as err:
        replace(load_profile("paper").train, lr=-1.0)
    assert err.value.where == "trainsettings"
    with pytest.raises(SettingError, match="unknown field 'patch'") as err:
        DataSettings(patch=(1, 2, 3))  # type: ignore[call-arg]
    assert err.value.next_step == "did you mean 'patch_vox'?"


def test_a_profile_goes_to_another_process_and_into_a_record_unchanged() -> None:
    paper = load_profile("paper")
    assert pickle.loads(pickle.dumps(paper)) == paper  # noqa: S301  # our own bytes
    assert hash(paper) == hash(load_profile("paper"))
    assert isinstance(asdict(paper)["data"]["posneg"][0], float)
    assert Profile(**asdict(paper)) == paper


def test_options_of_a_plain_dataclass_get_their_type() -> None:
    """Strategies of other packages are plain dataclasses, with fields of any type."""

    @dataclass(frozen=True, kw_only=True)
    class Method:
        level: Literal[1, 2] = 1
        names: tuple[str, ...] = ()
        tool: type[Any] | None = None
        limit: int | float | str | None = None

    made = change(
        Method(), {"level": "2", "names": "['a', \"b\"]", "tool": "none", "limit": "7"}, "strategy"
    )
    assert made == Method(level=2, names=("a", "b"), limit=7)
    assert change(made, {"names": "a, b"}, "strategy").names == ("a", "b")
    with pytest.raises(SettingError, match=r"strategy\.tool must be"):
        change(Method(), {"tool": "hammer"}, "strategy")


def test_profiles_load_and_paper_is_the_papers() -> None:
    assert {"smoke", "quick", "paper"} <= set(profile_names())
    paper = load_profile("paper")
    t = paper.train
    assert (t.epochs, t.batch, t.lr, t.weight_decay, t.warmup) == (100, 2, 1e-4, 1e-5, 15)
    assert (paper.backbone.name, paper.backbone.size) == ("swin_unetr", 48)
    plan = benchmark("tumor_ext").preprocessing
    assert paper.preprocessing(plan) == plan
    assert plan.spacing_mm == (1.5, 1.5, 1.5)
    assert plan.window_hu == (-175.0, 250.0)
    assert plan.patch_vox == (96, 96, 96)
    assert load_profile("smoke").preprocessing(plan).patch_vox == (24, 24, 24)
    with pytest.raises(UnknownName, match="there is no profile"):
        load_profile("quik")


def test_a_run_is_known_by_what_differs_from_the_defaults() -> None:
    """A later version's new setting, at its default, must not orphan the runs there are."""

    @dataclass(frozen=True, kw_only=True)
    class Before:
        name: str
        lr: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class After(Before):
        trace: int | None = None

    assert sparse(Before(name="a")) == sparse(After(name="a")) == {"name": "a"}
    assert sparse(After(name="a", trace=5)) == {"name": "a", "trace": 5}
    paper = load_profile("paper")
    changed = replace(paper, train=replace(paper.train, epochs=7))
    assert sparse(paper)["name"] == "paper"
    assert "epochs" not in sparse(paper).get("train", {})
    assert sparse(changed)["train"] == {**sparse(paper).get("train", {}), "epochs": 7}
